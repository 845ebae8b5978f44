"""Objects in a place of their own, as a tier needs them, and the names that make a listing an index. Pure but for
the interface: ``kvstore/tiers/s3.py`` and ``kvstore/tiers/fake_objects.py`` implement it.

An object is one block, and its name says all that an index must know of it::

    <hash>.<parent>.<checksum>.<tenant>.<size>.<sequence>

in hexadecimal, but for the size and the sequence. So a listing restores an index without a body being read, of two
objects of one block the newer is known, and no name is ever written twice with other bytes: a late delete cannot hit
a newer copy.
"""

import re
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from kvstore.index.tenants import TenantKey
from kvstore.tiers.base import TierBlock
from kvstore.tiers.records import Record
from tracehaul.wire.hashing import HASH_BYTES
from tracehaul.wire.ids import BlockHash, Checksum

DELETE_MAX = 1000
"""Names in one request to delete: what the protocol allows."""
_HEX = 2 * HASH_BYTES
_NAME = re.compile(
    rf"([0-9a-f]{{{_HEX}}})\.([0-9a-f]{{{_HEX}}})\.([0-9a-f]{{16}})\.([0-9a-f]{{16}})\.([1-9][0-9]{{0,9}})\.([0-9]{{1,18}})"
)

_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")


class ObjectMissing(Exception):
    """There is no object of this name."""


class ObjectsUnreachable(Exception):
    """The service gave no answer in time, or said that it cannot answer now: a later call may succeed."""


class ObjectsRefused(ObjectsUnreachable):
    """The service answered and will not do it: credentials, rights, or no such bucket. For an operator to mend."""


class ListedObject(NamedTuple):
    """What a listing says of one object."""

    name: str
    size_bytes: int


class Objects(Protocol):
    """Named bytes under one prefix. Every call ends in bounded time, retries included.

    Every call raises ObjectsUnreachable, or ObjectsRefused, where the service does not do it.
    """

    async def put(self, name: str, view: memoryview) -> None:
        """Make the object, as a whole or not at all. ``view`` is let go of when the call ends, however it ends."""
        ...

    async def get(self, name: str, size_bytes: int) -> memoryview | None:
        """The object's bytes; None if they are not so many.

        Raises:
            ObjectMissing: there is no such object.
        """
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Unmake at most :data:`DELETE_MAX` objects; those that are not there are no error."""
        ...

    def pages(self) -> AsyncIterator[Sequence[ListedObject]]:
        """All objects, in parts; each part may raise."""
        ...

    async def probe(self) -> None:
        """Return if the service answers for this place, at the least cost."""
        ...


def parse_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://bucket/prefix``.

    Raises:
        ValueError: it is no such address.
    """
    found = _URL.fullmatch(url)
    if found is None or "//" in url.removeprefix("s3://"):
        raise ValueError(f"not an address of a bucket: {url!r}; write s3://bucket or s3://bucket/prefix")
    return found[1], (found[2] or "").strip("/")


def pack_name(block: TierBlock, sequence: int) -> str:
    """The object's name."""
    sums = f"{block.checksum:016x}.{block.tenant:016x}"
    return f"{block.hash.hex()}.{block.parent.hex()}.{sums}.{block.size_bytes}.{sequence}"


def unpack_name(name: str) -> tuple[TierBlock, int] | None:
    """The block and its sequence; None if the name is not one of ours."""
    found = _NAME.fullmatch(name)
    if found is None or found[1] == found[2]:
        return None
    block_hash, parent, summed, tenant, size, sequence = found.groups()
    block = TierBlock(
        BlockHash(bytes.fromhex(block_hash)),
        BlockHash(bytes.fromhex(parent)),
        int(size),
        Checksum(int(summed, 16)),
        TenantKey(int(tenant, 16)),
    )
    return block, int(sequence)


class Listing:
    """Sorts a listing: what an index takes over, and what is to be deleted."""

    def __init__(self) -> None:
        self._newest: dict[BlockHash, tuple[int, TierBlock, str]] = {}
        self.useless: list[str] = []
        """Ours, and of no use: cut short, too large, older than another of the same block, or beyond the limit."""
        self.foreign = 0
        """Objects with other names: never touched."""

    def add(self, page: Sequence[ListedObject], slot_bytes: int) -> None:
        """Take one part of the listing."""
        for listed in page:
            unpacked = unpack_name(listed.name)
            if unpacked is None:
                self.foreign += 1
                continue
            block, sequence = unpacked
            if block.size_bytes != listed.size_bytes or block.size_bytes > slot_bytes:
                self.useless.append(listed.name)
                continue
            known = self._newest.get(block.hash)
            if known is not None and known[0] >= sequence:
                self.useless.append(listed.name)
                continue
            if known is not None:
                self.useless.append(known[2])
            self._newest[block.hash] = (sequence, block, listed.name)

    def restore(self, slots_max: int) -> tuple[list[Record], list[str]]:
        """Records for the newest ``slots_max`` blocks, each with a slot of its own, and their names by slot."""
        ordered = sorted(self._newest.values(), reverse=True)
        self.useless += [name for _, _, name in ordered[slots_max:]]
        kept = ordered[:slots_max]
        records = [Record(slot, sequence, block) for slot, (sequence, block, _) in enumerate(kept)]
        return records, [name for _, _, name in kept]

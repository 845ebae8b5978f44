"""Interfaces of a tier: ``tests/contract/test_tiers.py`` holds every implementation to them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from kvstore.index.tenants import TenantKey
from tracehaul.wire.blocks import Change, Moved, Stored
from tracehaul.wire.ids import BlockHash, Checksum

StoreOutcome = Literal["stored", "present", "full", "failed"]
"""``full``: nothing in the tier may make room for it. ``failed``: its device did not take the bytes."""
LoadOutcome = Literal["loaded", "absent", "corrupt", "failed", "unavailable"]
"""``corrupt``: the bytes did not match, the block is dropped. ``failed``: its device did not give them; dropped too.
``unavailable``: its device cannot be asked now; the block is kept."""


class TierBlock(NamedTuple):
    """A block as a tier knows it."""

    hash: BlockHash
    parent: BlockHash
    size_bytes: int
    checksum: Checksum
    tenant: TenantKey = TenantKey(0)
    """Whose quota it counts against."""


class TierStats(msgspec.Struct):
    """Counts since the node's start."""

    stored: int = 0
    stored_bytes: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    full: int = 0
    """Blocks refused because nothing could make room for them."""
    evicted: int = 0
    corrupt: int = 0
    """Blocks dropped because their bytes did not match their checksum."""
    failed: int = 0
    """Reads and writes that the device refused; a block that cannot be read is dropped."""
    recovered: int = 0
    """Blocks found at the start."""
    unreadable: int = 0
    """Records found at the start that were torn or contradicted a newer one: their slots are free."""
    scrubbed: int = 0
    """Blocks verified in the background."""


class Tier(Protocol):
    """Blocks somewhere slower than memory; all of one event loop.

    What it holds changes only inside calls of its methods, and every change is told at once, in order, to the
    listener. Bytes that do not match their checksum are never returned: the block is dropped and counted.
    """

    name: str
    stores_max: int
    """Calls of :meth:`store` that are worth having under way at once."""
    metered: bool
    """Whether somebody is paid for each read: then nothing is read unless somebody wants it."""

    @property
    def stats(self) -> TierStats:
        """Its counts."""
        ...

    def __len__(self) -> int:
        """Blocks held."""
        ...

    @property
    def bytes_used(self) -> int:
        """Bytes of the blocks held."""
        ...

    @property
    def bytes_max(self) -> int:
        """The limit: what is full refuses or evicts, never grows."""
        ...

    @property
    def available(self) -> bool:
        """Whether its device answers, as far as is known; while it does not, every call fails at once."""
        ...

    @property
    def parts(self) -> "Sequence[Tier]":
        """The tiers that it is made of, fastest first: itself, if it is one."""
        ...

    def listen(self, listener: Callable[[Sequence[Change]], None]) -> None:
        """Tell ``listener`` of every change from now on. Tiers are counted from this one's first part."""
        ...

    def protect(self, rank: Callable[[BlockHash], float | None], shares: Mapping[str, float]) -> None:
        """From now on ask ``rank`` what pins say of a block (:mod:`kvstore.index.pins`) before it is given up, and
        leave each of these tenants its share of the tier. Called at most once, right after :meth:`listen`."""
        ...

    def reshare(self, shares: Mapping[str, float]) -> None:
        """Leave each of these tenants its share of the tier from now on, and the others none of their own."""
        ...

    def repinned(self, hashes: Iterable[BlockHash]) -> None:
        """What pins say of these blocks has changed; harmless for those that are not held."""
        ...

    def find(self, block_hash: BlockHash) -> TierBlock | None:
        """The block, if it is held: complete and readable as far as is known."""
        ...

    def held(self) -> tuple[BlockHash, ...]:
        """All blocks."""
        ...

    def touch(self, block_hash: BlockHash) -> None:
        """Make a held block the last to be evicted; harmless if it is not held."""
        ...

    async def store(self, blocks: Sequence[TierBlock], views: Sequence[memoryview]) -> list[StoreOutcome]:
        """Take copies of blocks; evicts as needed. A block is held from when its outcome is ``stored``.

        ``views`` are the slots that hold the bytes, whole pages and page aligned; they must not change meanwhile.
        """
        ...

    async def load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[LoadOutcome]:
        """Read and verify blocks into ``views`` (whole pages, page aligned), which hold anything if it fails."""
        ...

    async def drop(self, block_hash: BlockHash) -> None:
        """Forget a block; harmless if it is not held."""
        ...

    async def scrub(self, after: int | None, view: memoryview) -> int | None:
        """Verify the block that follows position ``after``, through ``view``; returns its position, None at the end.

        A bad block is dropped and counted.
        """
        ...

    async def flush(self) -> None:
        """On return what was stored before survives the loss of power, if the device can do that at all."""
        ...

    async def run(self) -> None:
        """What it needs done in the background, for as long as its node serves; it may end at once."""
        ...

    def check(self) -> None:
        """Assert the invariants of its index: for tests."""
        ...

    def close(self) -> None:
        """End it. Calls must have ended."""
        ...


def readable(tier: Tier, block_hash: BlockHash) -> bool:
    """Whether a load may succeed now: some part that is available holds the block."""
    return any(part.available and part.find(block_hash) is not None for part in tier.parts)


def part_of(tier: Tier, block_hash: BlockHash) -> int | None:
    """Which of its parts is the fastest that holds the block."""
    return next((place for place, part in enumerate(tier.parts) if part.find(block_hash) is not None), None)


def told_above(change: Change, lower: Tier, tiers_above: int) -> Change:
    """What a listener to both hears of a change in what lies above ``lower``."""
    if isinstance(change, Moved) or (below := part_of(lower, change.hash)) is None:
        return change
    return Moved(change.hash, change.tier if isinstance(change, Stored) else tiers_above + below)


def told_below(change: Change, tiers_above: int) -> Change:
    """What a listener to both hears of a lower tier's change in a block that nothing above holds."""
    match change:
        case Stored(block_hash, tier):
            return Stored(block_hash, tiers_above + tier)
        case Moved(block_hash, tier):
            return Moved(block_hash, tiers_above + tier)
        case _:
            return change


class SlotDevice(Protocol):
    """Fixed slots and one record for each, on something that survives the process. Blocking; calls may run at once.

    Everything raises OSError where the device does.
    """

    slot_bytes: int
    slots_max: int

    def records(self) -> bytes:
        """All records as they were when the device was opened, one after the other."""
        ...

    def read(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        """Fill each view from the start of its slot. Views are whole pages and page aligned."""
        ...

    def write(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        """Write each view to the start of its slot. On return a killed process does not undo it."""
        ...

    def write_records(self, records: Mapping[int, bytes]) -> None:
        """Replace records by slot, each as a whole or not at all. On return a killed process does not undo it."""
        ...

    def flush(self) -> None:
        """On return what was written survives the loss of power."""
        ...

    def close(self) -> None:
        """Give it up, to others too."""
        ...

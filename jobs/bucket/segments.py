"""What a batch's lines were answered, as objects: each some lines that ended together. Pure.

A segment's name says all that must be known to go on with it::

    <epoch>.<number>.<ok|failed>.<bytes>.<digest>

The epoch is that of the batch's owner: of two lines for one call that of the later epoch counts, and in it that of the
higher number. So what a router still writes that lost the batch changes nothing once it was gone on with.
"""

import re
from typing import NamedTuple

import xxhash

_NAME = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.(ok|failed)\.([1-9][0-9]{0,10})\.([0-9a-f]{16})")


class Segment(NamedTuple):
    """One of them, in the order in which they count."""

    epoch: int
    number: int
    ok: bool
    nbytes: int
    digest: str

    @classmethod
    def of(cls, epoch: int, number: int, data: bytes, *, ok: bool) -> "Segment":
        """With these lines."""
        return cls(epoch, number, ok, len(data), xxhash.xxh3_64_hexdigest(data))

    @classmethod
    def named(cls, name: str) -> "Segment | None":
        """None: it is none's name."""
        if (found := _NAME.fullmatch(name)) is None:
            return None
        return cls(int(found[1]), int(found[2]), found[3] == "ok", int(found[4]), found[5])

    @property
    def name(self) -> str:
        """Of its object."""
        return f"{self.epoch}.{self.number}.{'ok' if self.ok else 'failed'}.{self.nbytes}.{self.digest}"

    def has(self, data: bytes) -> bool:
        """Whether these are its lines."""
        return len(data) == self.nbytes and xxhash.xxh3_64_hexdigest(data) == self.digest

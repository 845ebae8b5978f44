"""Who may ask a line, and whose answer counts. Pure.

Each claim of a line has a number above all before it, its fence: what comes under an older one is refused.
"""

from collections.abc import Iterable

import msgspec


class Held(msgspec.Struct, frozen=True):
    """A line is claimed."""

    fence: int
    lost: int = 0
    """How many who claimed it before were never heard of again."""


class Taken(msgspec.Struct, frozen=True):
    """It is another's."""

    until_s: float | None
    """For so long at least; None: it has ended."""


class _Lease(msgspec.Struct):
    fence: int = 0
    until_s: float | None = None
    """None: nobody has it."""
    lost: int = 0


class Leases:
    """Of the lines of one batch. Times are Unix seconds, as several who ask must agree on them."""

    def __init__(self, ended: Iterable[int] = ()) -> None:
        self.ended = set(ended)
        self._leases: dict[int, _Lease] = {}

    def claim(self, line: int, now_s: float, until_s: float) -> Held | Taken:
        """Have it until then. Who had it before loses it, if that one's time is over."""
        if line in self.ended:
            return Taken(None)
        lease = self._leases.setdefault(line, _Lease())
        if lease.until_s is not None:
            if now_s < lease.until_s:
                return Taken(lease.until_s)
            lease.lost += 1
        lease.fence += 1
        lease.until_s = until_s
        return Held(lease.fence, lease.lost)

    def renew(self, line: int, fence: int, until_s: float) -> bool:
        """Have it for longer. False: it is another's."""
        if not self.holds(line, fence):
            return False
        self._leases[line].until_s = until_s
        return True

    def put_back(self, line: int, fence: int) -> bool:
        """Let others have it. False: they do already."""
        if not self.holds(line, fence):
            return False
        self._leases[line].until_s = None
        return True

    def holds(self, line: int, fence: int) -> bool:
        """That claim counts."""
        lease = self._leases.get(line)
        return line not in self.ended and lease is not None and lease.fence == fence and lease.until_s is not None

    def end(self, line: int, fence: int) -> bool:
        """It is over. False: that is not this one's to say."""
        if not self.holds(line, fence):
            return False
        self.ended.add(line)
        del self._leases[line]
        return True

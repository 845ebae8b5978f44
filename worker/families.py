"""Whose turn it is among traces that belong together. Pure.

A trace that starts others goes on when the last of them has ended, so what counts for it is when they are all done.
They are served as one, from when the first of them came: other work comes before all of them or after all of them, and
delays only what it must.
"""

from tracehaul.wire.ids import TraceId

AHEAD_MAX_S = 60.0
"""By how much a latecomer is ahead of its time at most: a family that never ends must not hold up others for ever."""

Family = tuple[str, TraceId]
"""A salt and the trace that started them; a trace that nobody started is its own."""


class Families:
    """Families with steps on this worker."""

    def __init__(self) -> None:
        self._members: dict[Family, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def join(self, family: Family, now_s: float) -> float:
        """A step came; returns when it counts as having come."""
        first_s, count = self._members.get(family, (now_s, 0))
        self._members[family] = (first_s, count + 1)
        return max(first_s, now_s - AHEAD_MAX_S)

    def leave(self, family: Family) -> None:
        """One of its steps ended."""
        first_s, count = self._members[family]
        if count > 1:
            self._members[family] = (first_s, count - 1)
        else:
            del self._members[family]

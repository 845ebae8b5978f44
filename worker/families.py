"""Whose turn it is among traces that belong together. Pure.

A trace that starts others goes on when the last of them has ended, so what counts for it is when they are all done.
They are served as one, from when the first of them came: other work comes before all of them or after all of them, and
delays only what it must.
"""

from tracehaul.wire.ids import TraceId

AHEAD_MAX = 64
"""Arrivals that a latecomer passes at most: a family that never ends must not hold up others for ever."""

Family = tuple[str, TraceId]
"""A salt and the trace that started them; a trace that nobody started is its own."""


class Families:
    """Families with steps on this worker."""

    def __init__(self) -> None:
        self._members: dict[Family, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def join(self, family: Family, arrival: int) -> int:
        """A step came as the ``arrival``-th; returns the place in the order of arrival that it is served at."""
        first, count = self._members.get(family, (arrival, 0))
        self._members[family] = (first, count + 1)
        return max(first, arrival - AHEAD_MAX)

    def leave(self, family: Family) -> None:
        """One of its steps ended."""
        first, count = self._members[family]
        if count > 1:
            self._members[family] = (first, count - 1)
        else:
            del self._members[family]

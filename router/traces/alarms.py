"""What is to happen to traces at a certain time. Pure."""

from bisect import bisect_right, insort
from typing import Literal, NamedTuple

from router.traces.trace import TraceKey

AlarmKind = Literal["recall", "recall_told", "deadline"]
"""A context is to come back, by experience or at the client's word; or nobody comes back any more."""


class Alarm(NamedTuple):
    """One of them."""

    at_s: float
    key: TraceKey
    kind: AlarmKind


class Alarms:
    """Sorted by time, so that nothing of a trace that is forgotten stays; a trace has two at most."""

    def __init__(self) -> None:
        self._sorted: list[Alarm] = []
        self._of: dict[TraceKey, list[Alarm]] = {}

    @property
    def next_s(self) -> float | None:
        """When the next one is due."""
        return self._sorted[0].at_s if self._sorted else None

    def traces(self) -> set[TraceKey]:
        """Whose there are."""
        return set(self._of)

    def of(self, key: TraceKey) -> tuple[Alarm, ...]:
        """A trace's."""
        return tuple(self._of.get(key, ()))

    def add(self, alarm: Alarm) -> None:
        """Plan one."""
        insort(self._sorted, alarm)
        self._of.setdefault(alarm.key, []).append(alarm)

    def clear(self, key: TraceKey) -> None:
        """Those of a trace are off."""
        for alarm in self._of.pop(key, ()):
            del self._sorted[bisect_right(self._sorted, alarm) - 1]

    def due(self, now_s: float) -> list[Alarm]:
        """Take out what is due, in order."""
        count = bisect_right(self._sorted, now_s, key=lambda alarm: alarm.at_s)
        found, self._sorted = self._sorted[:count], self._sorted[count:]
        for alarm in found:
            own = self._of[alarm.key]
            own.remove(alarm)
            if not own:
                del self._of[alarm.key]
        return found

    def check(self) -> None:
        """Assert that both views agree."""
        assert self._sorted == sorted(self._sorted)
        assert sorted(alarm for own in self._of.values() for alarm in own) == self._sorted
        assert all(self._of.values())

"""The order of those who were told to come back: groups by rank, within one who came first. Pure.

Nobody keeps them here: each is a place and a time, so that a thousand of them cost a few comparisons.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass

LATE_S = 15.0
"""A place is lost that long after its time, where its client has not come back."""
EARLY_S = 1.0
"""Who comes back that much before its time is in time."""
AWAITED_S = 2.0
"""So long after its time nobody waits for it any more, though it still has its place."""
PLACES_MAX = 4096
"""Who comes when there are more gets none, and is told to come when the last of them has begun."""

Group = tuple[str, float]
"""A tenant, and the weight of its calls' class."""

Rank = Callable[[str, float], float]
"""Of a group, as of now; lower comes first."""


@dataclass
class _Place:
    group: Group
    number: int
    due_s: float


class Line:
    """Places, each with the time that its client was told."""

    def __init__(self) -> None:
        self._places: dict[Hashable, _Place] = {}
        self._groups: dict[Group, list[int]] = {}
        """Numbers of places, in order."""
        self._due: list[tuple[float, int, Hashable]] = []
        """All of them, by their times."""
        self._count = 0

    def __len__(self) -> int:
        return len(self._places)

    def told(self, key: Hashable, group: Group, due_s: float) -> None:
        """That one should come back then: in its place, or in a new one of that group, if there is any."""
        place = self._places.get(key)
        if place is not None:
            del self._due[self._at(place)]
            place.due_s = due_s
        elif len(self._places) < PLACES_MAX:
            self._count += 1
            place = self._places[key] = _Place(group, self._count, due_s)
            self._groups.setdefault(group, []).append(place.number)
        else:
            return
        insort(self._due, (due_s, place.number, key), key=lambda one: one[:2])

    def leave(self, key: Hashable) -> None:
        """It waits no more."""
        place = self._places.pop(key, None)
        if place is None:
            return
        del self._due[self._at(place)]
        numbers = self._groups[place.group]
        del numbers[bisect_left(numbers, place.number)]
        if not numbers:
            del self._groups[place.group]

    def before(self, key: Hashable, now_s: float, group: Group, rank: Rank) -> int:
        """How many come before it; before somebody new of that group, if it has no place."""
        self._lapse(now_s)
        place = self._places.get(key)
        own, number = (group, self._count + 1) if place is None else (place.group, place.number)
        mine, count = rank(*own), 0
        for other, numbers in self._groups.items():
            theirs = rank(*other)
            if theirs < mine:
                count += len(numbers)
            elif theirs == mine:
                count += bisect_left(numbers, number)
        return count

    def awaits(self, key: Hashable, now_s: float, new: float, rank: Rank) -> bool:
        """Whether somebody that comes before it is about to come back. ``new``: its rank, if it has no place."""
        self._lapse(now_s)
        place = self._places.get(key)
        mine = (new, self._count + 1) if place is None else (rank(*place.group), place.number)
        first = bisect_left(self._due, now_s - AWAITED_S, key=lambda one: one[0])
        for due_s, number, other in self._due[first:]:
            if due_s > now_s + EARLY_S:
                return False
            if other != key and (rank(*self._places[other].group), number) < mine:
                return True
        return False

    def _at(self, place: _Place) -> int:
        return bisect_left(self._due, (place.due_s, place.number), key=lambda one: one[:2])

    def _lapse(self, now_s: float) -> None:
        while self._due and self._due[0][0] + LATE_S < now_s:
            self.leave(self._due[0][2])

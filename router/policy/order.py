"""Who is next of those who wait. Pure.

Tenants take turns, each by what it was given for the weight of its classes. Within a tenant the order is one of times:
each counts as having come the later, the more its trace was given already and the more it takes now. So short work goes
before long work, a trace that had little before one that had much, and whoever has waited for long enough before all
that came after it. One that is about to miss its deadline goes before these; of those whose deadline is lost anyway
nothing more is made.
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, NamedTuple, TypeVar

Name = TypeVar("Name", bound=Hashable)

NEAR_SHARE = 1.0
"""A deadline is near when what is left beside what it takes is less than that share of it."""
NEAR_S = 1.0

CLASS_WEIGHTS = {"interactive": 4.0, "standard": 1.0}
"""Of steps' classes; the background's wait for slack instead."""
PAST_MAX = 1024
"""Groups without anybody that are remembered before those are forgotten whom the others have caught up with."""

Group = tuple[str, float]
"""A tenant, and the weight of a class."""


class Stretch(NamedTuple):
    """By how many seconds later one counts as having come."""

    takes: float = 20.0
    """For each second that it will take."""
    given: float = 1.0
    """For each second that workers have worked for its trace."""
    begins: float = 600.0
    """For being a trace's first step: those that go on do not wait for it."""


STRETCH = Stretch()


class Waiter(NamedTuple):
    """One that waits. Times in seconds."""

    came_s: float
    group: Group = ("", 1.0)
    given_s: float = 0.0
    """Of workers' time, to its trace so far."""
    takes_s: float = 0.0
    """Of workers' time, by estimate."""
    decodes_s: float = 0.0
    """Generating, which is its group's to account for, too."""
    begins: bool = False
    """It is the first step of a trace that nobody started."""
    priority: int = 0
    """Within its group, the highest goes first."""
    deadline_s: float = inf

    def rank(self, stretch: Stretch) -> tuple[int, float]:
        """The lowest goes first."""
        later_s = stretch.takes * self.takes_s + stretch.given * self.given_s + stretch.begins * self.begins
        return -self.priority, self.came_s + later_s

    @property
    def near_s(self) -> float:
        """From when on its deadline is near."""
        return self.deadline_s - self.takes_s - max(NEAR_S, NEAR_SHARE * self.takes_s)


@dataclass
class _Group(Generic[Name]):
    used: float
    """What those of it took that went, for its weight."""
    count: int = 0
    by_rank: "list[tuple[tuple[int, float], int, Name]]" = field(default_factory=list)
    by_deadline: "list[tuple[float, int, Name]]" = field(default_factory=list)
    """Both may name some that wait no more."""


class Order(Generic[Name]):
    """Those who wait, by name."""

    def __init__(self, stretch: Stretch) -> None:
        self._stretch = stretch
        self._waiters: dict[Name, tuple[Waiter, int]] = {}
        self._groups: dict[Group, _Group[Name]] = {}
        """Those with somebody that waits."""
        self._past: dict[Group, float] = {}
        """What groups had used that have nobody now."""
        self._used = 0.0
        """Of the group that went last, before it went: who comes has saved nothing up."""
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, name: Name) -> bool:
        return name in self._waiters

    def join(self, name: Name, waiter: Waiter) -> None:
        """It waits from now on."""
        assert name not in self._waiters
        self._count += 1
        self._waiters[name] = waiter, self._count
        group = self._groups.get(waiter.group)
        if group is None:
            used = max(self._used, self._past.pop(waiter.group, 0.0))
            group = self._groups[waiter.group] = _Group(used)
        group.count += 1
        heapq.heappush(group.by_rank, (waiter.rank(self._stretch), self._count, name))
        if waiter.deadline_s < inf:
            heapq.heappush(group.by_deadline, (waiter.near_s, self._count, name))

    def leave(self, name: Name) -> None:
        """It waits no more, and has not gone. Leaving twice is harmless."""
        waiting = self._waiters.pop(name, None)
        if waiting is not None:
            group = self._groups[waiting[0].group]
            group.count -= 1
            if not group.count:
                del self._groups[waiting[0].group]
                self._past[waiting[0].group] = group.used
                if len(self._past) > PAST_MAX:
                    self._past = {key: used for key, used in self._past.items() if used > self._used}

    def goes(self, name: Name) -> None:
        """It does: what it takes is its group's to account for."""
        waiter, _ = self._waiters[name]
        group = self._groups[waiter.group]
        self._used = max(self._used, group.used)
        group.used += (waiter.takes_s + waiter.decodes_s) / waiter.group[1]
        self.leave(name)

    def first(self, now_s: float) -> Name | None:
        """Whose turn it is; None if nobody waits."""
        if not self._groups:
            return None
        group = min(self._groups.values(), key=lambda one: one.used)
        near = self._near(group, now_s)
        return self._top(group.by_rank) if near is None else near

    def _near(self, group: _Group[Name], now_s: float) -> Name | None:
        """The one whose deadline is near, and can be kept."""
        while (name := self._top(group.by_deadline)) is not None and group.by_deadline[0][0] <= now_s:
            waiter, _ = self._waiters[name]
            if waiter.deadline_s - waiter.takes_s >= now_s:
                return name
            heapq.heappop(group.by_deadline)  # lost: it waits as if it had none
        return None

    def _top(self, heap: "list[tuple[Any, int, Name]]") -> Name | None:
        while heap:
            _, number, name = heap[0]
            waiting = self._waiters.get(name)
            if waiting is not None and waiting[1] == number:
                return name
            heapq.heappop(heap)
        return None

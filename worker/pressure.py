"""Who gives way when KV memory is full and every sequence in it is being computed on, and in which order steps wait
for memory. Pure.

Steps are numbered in order of arrival, and keep their number when they are suspended. The first to come always gets
on, so steps end and memory comes back; the last to come gives way. Background steps come after all others, whenever
they came: they leave for one that waits, too.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

LEAVING_MAX_S = 5.0
"""How long a step that was told to leave may take before another one is told, too: long enough to write its tail."""


class Arrival(NamedTuple):
    """A step's place among those of its worker: less goes first."""

    background: bool
    number: int
    """Which no other step has."""


class Pressure:
    """Running steps that cannot grow, steps that wait for memory, and those that were told to leave for them."""

    def __init__(self) -> None:
        self._lacking: set[Arrival] = set()
        self._waiting: set[Arrival] = set()
        self._leaving: dict[Arrival, float] = {}

    @property
    def high(self) -> bool:
        """Some running step lacks memory."""
        return bool(self._lacking)

    def holds_up(self, step: Arrival) -> bool:
        """Some running step lacks memory, that this one may not take first."""
        return any(step.background or not lacking.background for lacking in self._lacking)

    def waits(self, step: Arrival) -> None:
        """It waits for memory, and does not run yet."""
        self._waiting.add(step)

    def waits_no_more(self, step: Arrival) -> None:
        """It has some, or is gone."""
        self._waiting.discard(step)

    def lacks(self, step: Arrival) -> None:
        """A running step could not grow."""
        self._lacking.add(step)

    def has(self, step: Arrival) -> None:
        """It could, or runs no more."""
        self._lacking.discard(step)

    def left(self, step: Arrival) -> None:
        """A step's memory is anybody's now."""
        self._leaving.pop(step, None)

    def suspend(self, running: Iterable[Arrival], now_s: float) -> Arrival | None:
        """Which of the running steps is to leave now, if any; it is taken to be leaving from then on."""
        last = max(running, default=None)
        wanted = bool(self._lacking) or (last is not None and self._gives_way(last))
        if not wanted or any(now_s - since_s < LEAVING_MAX_S for since_s in self._leaving.values()):
            return None
        if last is not None:
            self._leaving[last] = now_s
            self._lacking.discard(last)
        return last

    def _gives_way(self, step: Arrival) -> bool:
        """To one that waits."""
        return step.background and any(not waiting.background for waiting in self._waiting)


class Line:
    """Steps that wait for memory, the first to come first."""

    def __init__(self) -> None:
        self._waiting: list[Arrival] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, step: Arrival) -> None:
        """It waits."""
        assert step not in self._waiting
        insort(self._waiting, step)

    def leave(self, step: Arrival) -> None:
        """It has its memory, or is gone."""
        self._waiting.remove(step)

    def before(self, step: Arrival) -> int:
        """How many of those who wait go before it."""
        return bisect_left(self._waiting, step)

    def is_first(self, step: Arrival) -> bool:
        """Whether nobody who waits came before it; it need not wait itself."""
        return not self._waiting or step <= self._waiting[0]

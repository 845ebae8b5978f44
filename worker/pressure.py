"""Who gives way when KV memory is full and every sequence in it is being computed on, and in which order steps wait
for memory. Pure.

Steps are numbered in order of arrival, and keep their number when they are suspended. The first to come always gets
on, so steps end and memory comes back; the last to come gives way.
"""

from bisect import insort
from collections.abc import Iterable

LEAVING_MAX_S = 5.0
"""How long a step that was told to leave may take before another one is told, too: long enough to write its tail."""


class Pressure:
    """Running steps that cannot grow, and those that were told to leave for them."""

    def __init__(self) -> None:
        self._lacking: set[int] = set()
        self._leaving: dict[int, float] = {}

    @property
    def high(self) -> bool:
        """Some running step lacks memory: nobody else may take any."""
        return bool(self._lacking)

    def lacks(self, step: int) -> None:
        """A running step could not grow."""
        self._lacking.add(step)

    def has(self, step: int) -> None:
        """It could, or runs no more."""
        self._lacking.discard(step)

    def left(self, step: int) -> None:
        """A step's memory is anybody's now."""
        self._leaving.pop(step, None)

    def suspend(self, running: Iterable[int], now_s: float) -> int | None:
        """Which of the running steps is to leave now, if any; it is taken to be leaving from then on."""
        if not self._lacking or any(now_s - since_s < LEAVING_MAX_S for since_s in self._leaving.values()):
            return None
        last = max(running, default=None)
        if last is not None:
            self._leaving[last] = now_s
            self._lacking.discard(last)
        return last


class Line:
    """Steps that wait for memory, the first to come first."""

    def __init__(self) -> None:
        self._waiting: list[int] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, step: int) -> None:
        """It waits."""
        assert step not in self._waiting
        insort(self._waiting, step)

    def leave(self, step: int) -> None:
        """It has its memory, or is gone."""
        self._waiting.remove(step)

    def is_first(self, step: int) -> bool:
        """Whether nobody who waits came before it; it need not wait itself."""
        return not self._waiting or step <= self._waiting[0]

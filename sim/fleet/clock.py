"""Virtual time: what is to happen, in order. Pure."""

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """Events in order of time; of one time, in the order in which they were planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self.events = 0

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        """Do it then; now if that is past."""
        heapq.heappush(self._heap, (max(when_s, self.now_s), next(self._numbers), what))

    def after(self, wait_s: float, what: Callable[[], None]) -> None:
        """Do it then."""
        heapq.heappush(self._heap, (self.now_s + wait_s, next(self._numbers), what))

    def run(self, until_s: float) -> bool:
        """Let time pass; False if nothing is left to happen."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(heap)
            self.events += 1
            what()
        if heap:
            self.now_s = until_s
        return bool(heap)

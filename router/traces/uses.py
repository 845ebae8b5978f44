"""In which order traces were used, and which of them may be forgotten. Pure.

A trace whose first step has not begun is a call that waits. It counts as the call does, by the API's own limits, and
takes no other trace's place.
"""

import heapq
from collections import OrderedDict

from router.traces.trace import Trace, TraceKey

STALE_MAX = 1024
"""So many entries of the heap may say nothing any more, or as many as there are others; then it is made anew."""


class Uses:
    """Of all traces. Everything here costs a few comparisons, however many there are. ``traces``: they are kept there,
    the last used last."""

    def __init__(self, traces: OrderedDict[TraceKey, Trace]) -> None:
        self.count = self.nbytes = 0
        """Of those that count."""
        self.waiting_nbytes = 0
        """Of the others."""
        self._traces = traces
        self._at: dict[TraceKey, int] = {}
        """The number of each one's last use."""
        self._idle: dict[int, TraceKey] = {}
        """Those in which nothing is under way, by that number."""
        self._heap: list[int] = []
        """Those numbers, and some of traces that are idle no more: nothing else of these stays."""
        self._uses = 0

    def used(self, key: TraceKey) -> None:
        """It is the one used last."""
        self._traces.move_to_end(key)
        idle = self._idle.pop(self._at.get(key, 0), None) is not None
        self._uses += 1
        self._at[key] = self._uses
        if idle:
            self._rest(key)

    def put(self, trace: Trace) -> None:
        """Its value from now on; a new one is the one used last."""
        key = trace.key
        before = self._traces.get(key)
        self._traces[key] = trace
        self._count(trace, 1)
        if before is None:
            self.used(key)
        else:
            self._count(before, -1)
        if not trace.forgettable:
            self._idle.pop(self._at[key], None)
        elif self._at[key] not in self._idle:
            self._rest(key)

    def drop(self, key: TraceKey) -> None:
        """It is no more."""
        self._count(self._traces.pop(key), -1)
        self._idle.pop(self._at.pop(key), None)

    def first(self) -> TraceKey | None:
        """Of those in which nothing is under way the one that was used least recently."""
        while self._heap and self._heap[0] not in self._idle:
            heapq.heappop(self._heap)
        return self._idle[self._heap[0]] if self._heap else None

    def _rest(self, key: TraceKey) -> None:
        self._idle[self._at[key]] = key
        heapq.heappush(self._heap, self._at[key])
        if len(self._heap) > 2 * len(self._idle) + STALE_MAX:
            self._heap = sorted(self._idle)

    def check(self) -> None:
        """Assert that it is as the traces are."""
        traces = self._traces.values()
        counted = [trace.nbytes for trace in traces if trace.steps_count]
        assert (self.count, self.nbytes) == (len(counted), sum(counted))
        assert self.nbytes + self.waiting_nbytes == sum(trace.nbytes for trace in traces)
        assert self.first() == next((trace.key for trace in traces if trace.forgettable), None)
        assert self._at.keys() == self._traces.keys()
        assert all(self._at[key] == at for at, key in self._idle.items())
        assert len(self._heap) <= 2 * len(self._idle) + STALE_MAX + 1

    def _count(self, trace: Trace, sign: int) -> None:
        if trace.steps_count:
            self.count += sign
            self.nbytes += sign * trace.nbytes
        else:
            self.waiting_nbytes += sign * trace.nbytes

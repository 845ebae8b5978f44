"""When each step is sent. Pure: time is an argument, and the shell tells it what ended.

Lanes run one trace each, with all the traces that it starts. Where the recording says when traces started, a trace
waits for its time and for a lane, whichever comes later; what it waits for a lane is lag, since nobody did so when it
was recorded.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from bench.replay.recording import Step, Trace


class Pacing(msgspec.Struct, frozen=True):
    """How a recording's times become the replay's."""

    concurrency: int = 8
    """Traces at once, those that they start not counted."""
    time_scale: float = 1.0
    """Gaps and start times are divided by it."""
    gap_max_s: float = 60.0
    """After scaling."""
    stagger_s: float = 0.5
    """Between the starts of the first traces, where the recording does not say when they started."""

    def gap_s(self, recorded_s: float) -> float:
        """A gap as it is replayed."""
        return min(recorded_s / self.time_scale, self.gap_max_s)


class Sending(msgspec.Struct, frozen=True):
    """A step to be sent now."""

    trace: Trace
    index: int
    due_s: float
    """When it should have been."""
    root: str
    """The trace that nobody started, which this one belongs to."""

    @property
    def step(self) -> Step:
        """What to send."""
        return self.trace.steps[self.index]


class Completed(msgspec.Struct, frozen=True):
    """A trace that has ended, with all that it started."""

    trace: str
    parent: str | None
    steps: int
    began_s: float
    ended_s: float


@dataclass
class _Going:
    trace: Trace
    began_s: float
    parent: "_Going | None"
    root: str
    index: int = 0
    running: bool = False
    children: int = 0
    """Those that have not ended."""
    earliest_s: float = 0.0
    """The next step's time, as far as the gap is concerned."""


class Scheduler:
    """All traces of one replay. Times are seconds since its start."""

    def __init__(self, traces: Sequence[Trace], pacing: Pacing) -> None:
        names = [trace.trace for root in traces for trace, _ in root.walk()]
        assert all(trace.steps for trace in traces)
        self._pacing = pacing
        self._going: dict[str, _Going] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._count = 0
        timed = any(trace.start_s is not None for trace in traces)
        self._todo = sorted(traces, key=lambda trace: trace.start_s or 0.0)[::-1]
        stagger_s = 0.0 if timed else pacing.stagger_s
        self.completed: list[Completed] = []
        self.steps = len(names)
        """In all."""
        for lane in range(min(pacing.concurrency, len(traces))):
            self._next_root(lane * stagger_s)

    @property
    def done(self) -> bool:
        """Nothing is left to be sent, and nothing runs."""
        return not self._going

    @property
    def next_s(self) -> float | None:
        """When :meth:`due` will have something; None if only an end can change that."""
        return self._heap[0][0] if self._heap else None

    def due(self, now_s: float) -> list[Sending]:
        """The steps to be sent now, the longest due first."""
        sendings: list[Sending] = []
        while self._heap and self._heap[0][0] <= now_s:
            due_s, _, trace = heapq.heappop(self._heap)
            going = self._going[trace]
            assert not going.running
            going.running = True
            if going.trace.start_s is not None and going.index == 0:
                due_s = going.trace.start_s / self._pacing.time_scale
            sendings.append(Sending(going.trace, going.index, due_s, going.root))
        return sendings

    def ended(self, trace: str, now_s: float) -> None:
        """The running step of ``trace`` has ended, whatever way."""
        going = self._going[trace]
        assert going.running
        going.running = False
        children = going.trace.steps[going.index].children
        going.index += 1
        going.children = len(children)
        if going.index < len(going.trace.steps):
            going.earliest_s = now_s + self._pacing.gap_s(going.trace.steps[going.index].gap_s)
        for child in children:
            self._begin(child, now_s, going)
        self._advance(going, now_s)

    def _advance(self, going: _Going, now_s: float) -> None:
        """What the end of a step, or of a trace that it started, makes possible."""
        if going.running or going.children:
            return
        if going.index < len(going.trace.steps):
            self._push(going, max(now_s, going.earliest_s))
            return
        name = going.trace.trace
        del self._going[name]
        self.completed.append(Completed(name, going.trace.parent, going.index, going.began_s, now_s))
        if going.parent is None:
            self._next_root(now_s)
            return
        going.parent.children -= 1
        self._advance(going.parent, now_s)

    def _next_root(self, now_s: float) -> None:
        if self._todo:
            self._begin(self._todo.pop(), now_s, None)

    def _begin(self, trace: Trace, now_s: float, parent: _Going | None) -> None:
        assert trace.trace not in self._going, f"two traces are named {trace.trace}"
        start_s = max(now_s, (trace.start_s or 0.0) / self._pacing.time_scale)
        going = _Going(trace, start_s, parent, parent.root if parent is not None else trace.trace)
        self._going[trace.trace] = going
        self._push(going, start_s)

    def _push(self, going: _Going, due_s: float) -> None:
        self._count += 1
        heapq.heappush(self._heap, (due_s, self._count, going.trace.trace))

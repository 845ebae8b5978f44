"""The traces' side of the fleet: agents that each run one trace after the other. Pure."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from struct import pack
from typing import Protocol

from router.fleet.load import Warm
from sim.fleet.clock import Clock
from sim.fleet.work import Call, Task
from tracehaul.wire.ids import BlockHash, NodeId, TraceId


@dataclass(eq=False)
class Trace:
    """One that goes on."""

    name: TraceId
    task: Task
    number: int
    """Tells its blocks from those of other runs of the task."""
    began_s: float
    parent: "Trace | None" = None
    index: int = 0
    children: int = 0
    earliest_s: float = 0.0
    warm: Warm | None = None
    home: NodeId | None = None
    hashes: list[BlockHash] = field(default_factory=list[BlockHash])
    """Of the blocks of its last prompt."""
    asked_s: float = inf
    """When its next step was asked for first."""
    cached: float = 0.0
    """Of its last prompt, in tokens."""
    used_s: float = 0.0
    """Seconds of workers that it took."""
    held: dict[int, float] = field(default_factory=dict[int, float])
    """By worker: what of the next prompt its idle context there is good for."""

    @property
    def call(self) -> Call:
        """The step that runs, or comes next."""
        return self.task.calls[self.index]

    @property
    def root(self) -> "Trace":
        """The trace that nobody started."""
        return self if self.parent is None else self.parent.root

    def cut(self) -> list[BlockHash]:
        """Hashes of the blocks of the step's prompt, the last perhaps cut short."""
        chain, scope = self.call.chain, self.number if self.task.scoped else 0
        self.hashes = [BlockHash(pack("<QQ", scope, name)) for name in chain]
        return self.hashes


class Serving(Protocol):
    """What agents ask."""

    def step(self, trace: Trace) -> None:
        """Run the trace's next step; it ends in :meth:`Life.ended`."""
        ...

    def over(self, trace: Trace) -> None:
        """The trace has ended."""
        ...


class Life:
    """Agents, and what is counted of them."""

    def __init__(self, tasks: Sequence[Task], clock: Clock, serving: Serving, seed: int) -> None:
        self.tasks = tasks
        """What is begun next is one of these."""
        self._clock = clock
        self._serving = serving
        self._random = random.Random(seed)  # noqa: S311 - a workload, no secret
        self._count = 0
        self._lengths_s: list[float] = []
        self.again: Callable[[], None] = self.start
        """What an agent does when its trace is over."""
        self.completed: list[tuple[float, float]] = []
        """When each trace began and ended."""

    def make(self, task: Task | None = None, index: int = 0) -> Trace:
        """A trace that has come to its step ``index``; of any task if none is given."""
        self._count += 1
        chosen = task if task is not None else self._random.choice(self.tasks)
        name = TraceId(f"t{self._count}")
        return Trace(name, chosen, self._count, self._clock.now_s, index=index)

    def midway(self, step_s: float) -> tuple[Trace, float, float]:
        """A trace as one is found at any moment, if each step takes so long: it, how long ago its last step ended, and
        how soon its next one begins. Before its first step: a wait of 0 without anything that ended."""
        if not self._lengths_s:
            self._lengths_s = list(accumulate(task.gaps_s + step_s * len(task.calls) for task in self.tasks))
        task = self._random.choices(self.tasks, cum_weights=self._lengths_s)[0]
        at_s = self._random.random() * (task.gaps_s + step_s * len(task.calls))
        for index, call in enumerate(task.calls):
            if at_s < call.gap_s:
                return self.make(task, index), at_s, call.gap_s - at_s
            at_s -= call.gap_s
            if at_s < step_s:
                return self.make(task, index), call.gap_s, self._random.random() * step_s
            at_s -= step_s
        return self.make(task), 0.0, 0.0

    def start(self) -> None:
        """An agent begins a trace."""
        self.begin(self.make())

    def begin(self, trace: Trace) -> None:
        """It runs its next step."""
        self._serving.step(trace)

    def ended(self, trace: Trace) -> None:
        """Its step has ended."""
        call, now_s = trace.call, self._clock.now_s
        trace.index += 1
        trace.children = len(call.children)
        if trace.index < len(trace.task.calls):
            trace.earliest_s = now_s + trace.call.gap_s
        for child in call.children:
            self._count += 1
            name = TraceId(f"{trace.name}.{self._count}")
            started = Trace(name, child, trace.number, now_s, trace, home=trace.home)
            self._clock.after(child.calls[0].gap_s, lambda started=started: self._serving.step(started))
        self._advance(trace)

    def _advance(self, trace: Trace) -> None:
        if trace.children:
            return
        if trace.index < len(trace.task.calls):
            self._clock.at(trace.earliest_s, lambda: self._serving.step(trace))
            return
        self._serving.over(trace)
        if trace.parent is not None:
            trace.parent.children -= 1
            self._advance(trace.parent)
            return
        self.completed.append((trace.began_s, self._clock.now_s))
        self._clock.after(0.0, self.again)

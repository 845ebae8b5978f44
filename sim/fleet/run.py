"""One experiment: agents on a fleet under one routing, from the middle of their traces on. Pure."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from router.policy.admission import AdmissionConfig
from router.policy.order import Stretch
from sim.fleet.clock import Clock
from sim.fleet.gate import Gate
from sim.fleet.life import Life, Trace
from sim.fleet.model import Fleet, Routing, Tally
from sim.fleet.shape import Shape, WorkerKind
from sim.fleet.work import Call, Task
from tracehaul.wire.ids import BlockHash


class Capacity(msgspec.Struct, frozen=True):
    """What a fleet could do if nothing were computed twice and nobody waited."""

    agents: float
    """At once; that many keep it just busy."""
    traces_h: float
    step_s: float
    """Of a step, on the mean."""


class Figures(msgspec.Struct, frozen=True):
    """What came of an experiment."""

    routing: str
    agents: int
    seconds: float
    steps: int
    traces_per_worker_h: float
    """Each step counts for its share of its trace."""
    steps_per_s: float
    in_time_per_s: float
    """Of these, those that met their deadlines."""
    hits: float
    busy: float
    """Share of the workers' time."""
    ttft_p50_s: float
    ttft_p99_s: float
    step_mean_s: float
    suspensions: int
    admitted: int
    """Traces at the end."""
    late_share: float
    """Of the promised waits, the median of by how much they were wrong."""


class _Works:
    """What calls take of a worker where nothing is computed twice and batches fill its memory."""

    def __init__(self, kind: WorkerKind, calls: Sequence[Call]) -> None:
        prompts = np.array([call.prompt for call in calls], float)
        keeps = np.array([call.keeps for call in calls], float)
        outputs = np.array([call.output for call in calls], float)
        lengths = prompts + outputs
        batch = float(np.clip(kind.kv_tokens / np.average(lengths, weights=outputs), 1, kind.sequences_max))
        compute_s = (prompts - keeps) * kind.token_s + (prompts**2 - keeps**2) / 2 * kind.pair_s
        decode_s = kind.iteration_s / batch + kind.sequence_s + kind.context_token_s * lengths
        self.each_s = compute_s + outputs * decode_s
        self.step_s = float(np.mean(compute_s + outputs * decode_s * batch))
        """Of a step, in such a batch."""


def _decode_kinds(shape: Shape) -> list[WorkerKind]:
    return [kind for kind in shape.workers if kind.role == "decode"]


def capacity(shape: Shape, tasks: Sequence[Task]) -> Capacity:
    """By the formulas of the shape's decode workers, in batches that fill their memory."""
    kinds = _decode_kinds(shape)
    calls = [call for task in tasks for call in task.walk()]
    works = [(kind.count, _Works(kind, calls)) for kind in kinds]
    rate = sum(count * len(tasks) / float(work.each_s.sum()) for count, work in works)
    step_s = sum(count * work.step_s for count, work in works) / sum(count for count, _ in works)
    life_s = float(np.mean([task.gaps_s + step_s * len(task.calls) for task in tasks]))
    return Capacity(rate * life_s, rate * 3600, step_s)


def shares(shape: Shape, tasks: Sequence[Task]) -> dict[int, float]:
    """What each call, by its id in memory, is of a trace's work on the mean."""
    calls = [call for task in tasks for call in task.walk()]
    each_s = _Works(_decode_kinds(shape)[0], calls).each_s
    parts = each_s * (len(tasks) / each_s.sum())
    return {id(call): float(part) for call, part in zip(calls, parts, strict=True)}


class Experiment:
    """A fleet with its agents, from now on."""

    def __init__(
        self,
        shape: Shape,
        tasks: Sequence[Task],
        agents: int,
        routing: Routing,
        seed: int,
        admission: AdmissionConfig | None = None,
        *,
        turns: Stretch | None = None,
    ) -> None:
        self.clock = Clock()
        self.agents = agents
        self.fleet = Fleet(shape, routing, self.clock)
        self.fleet.shares = shares(shape, tasks)
        self.gate = Gate(admission, shape, self.fleet, self.clock, turns=turns)
        self.life = Life(tasks, self.clock, self.gate, seed)
        self.fleet.ended = self.gate.ended
        self.gate.life = self.life

    def populate(self, step_s: float) -> None:
        """Agents in the middle of their traces, as many as are let in; their contexts are in the stores, the last used
        on top. The others wait for their turn with a first step."""
        found = [self.life.midway(step_s) for _ in range(self.agents)]
        let_in = [one for one in found if self.gate.lets_in(*one)]
        for _ in range(len(found) - len(let_in)):
            self.life.start()
        for number, (trace, _, wait_s) in enumerate(sorted(let_in, key=lambda one: -one[1])):
            self._settle(trace, number)
            self.clock.after(wait_s, lambda trace=trace: self.life.begin(trace))

    def _settle(self, trace: Trace, number: int) -> None:
        if not trace.index or not self.fleet.stores:
            return
        trace.index -= 1
        hashes: list[BlockHash] = trace.cut()
        trace.index += 1
        if not self.fleet.routing.private:
            home = self.fleet.home(trace)
            assert home is not None
            self.fleet.stores[home].put(hashes)
            return
        keys = self.fleet.decodes.keys
        row = number % len(keys)
        self.fleet.place_context(trace, keys[row], hashes)

    def measure(self, warm_up_s: float, seconds: float, tick: Callable[[float], None] = lambda now_s: None) -> Figures:
        """Let time pass, and count from ``warm_up_s`` on."""
        end_s = self.clock.now_s + warm_up_s + seconds
        busy_s = 0.0
        counted = False
        while self.clock.now_s < end_s:
            left_s = end_s - self.clock.now_s
            self.clock.run(self.clock.now_s + min(10.0, left_s if counted else left_s - seconds))
            tick(self.clock.now_s)
            if not counted and end_s - self.clock.now_s <= seconds + 1e-9:
                counted = True
                self.fleet.tally = Tally(self.clock.now_s)
                busy_s = self._busy_s()
        tally = self.fleet.tally
        workers = self.fleet.shape.computing
        ttft = np.array(tally.ttft_s or [0.0])
        return Figures(
            routing=self.fleet.routing.name,
            agents=self.agents,
            seconds=seconds,
            steps=tally.steps,
            traces_per_worker_h=tally.traces / seconds * 3600 / workers,
            steps_per_s=tally.steps / seconds,
            in_time_per_s=tally.in_time / seconds,
            hits=tally.cached / max(1.0, tally.prompt),
            busy=(self._busy_s() - busy_s) / seconds / workers,
            ttft_p50_s=float(np.quantile(ttft, 0.5)),
            ttft_p99_s=float(np.quantile(ttft, 0.99)),
            step_mean_s=float(np.mean(tally.step_s or [0.0])),
            suspensions=sum(worker.suspensions for worker in self.fleet.workers.values()),
            admitted=len(self.gate),
            late_share=self.gate.late_share(),
        )

    def _busy_s(self) -> float:
        for worker in self.fleet.workers.values():
            worker.sync()
        return sum(worker.busy_s for worker in self.fleet.workers.values())

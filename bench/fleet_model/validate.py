"""The model against a live cluster: the same recorded agents on both, and how far it is off."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from bench.common.fleet import fleet
from bench.common.report import Result
from bench.fleet_model.calibrate import calibrate
from bench.fleet_model.tasks import tasks_of
from bench.replay.choose import Forks, Limits, choose, forks
from bench.replay.recording import Trace
from bench.replay.run import Target, replay
from bench.replay.schedule import Pacing
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from cluster.rundir import ClusterFault
from sim.fleet.clock import Clock
from sim.fleet.life import Life
from sim.fleet.model import Fleet
from sim.fleet.routing import Ours
from sim.fleet.shape import Shape
from sim.fleet.work import Task


class Load(msgspec.Struct, frozen=True):
    """What both are given."""

    concurrency: int
    traces: int
    steps: int
    context: int
    output: int
    children: int = 0
    """Made-up forks with so many; 0: recorded agents."""


LOADS = {
    "two": Load(2, 6, 8, 4000, 96),
    "six": Load(6, 12, 6, 4000, 96),
    "long": Load(4, 8, 5, 7000, 48),
    "forks": Load(1, 2, 3, 2048, 24, children=6),
}
TIME_SCALE, GAP_MAX_S, STAGGER_S = 8.0, 4.0, 0.5
ROUNDS = 3
"""Of all loads, each with other agents: the very same ones differ live by a tenth from run to run."""


class Outcome(msgspec.Struct, frozen=True):
    """Of one load, live or on paper."""

    steps: int
    wall_s: float
    jobs_s: tuple[float, ...]
    """Of traces that nobody started."""

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.wall_s

    @property
    def job_s(self) -> float:
        """On the mean."""
        return float(np.mean(self.jobs_s))

    def __str__(self) -> str:
        return f"{self.steps_per_s:.3f} steps/s, {self.job_s:.1f} s a trace"


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """One after the other."""
    jobs_s = tuple(job_s for one in outcomes for job_s in one.jobs_s)
    return Outcome(sum(one.steps for one in outcomes), sum(one.wall_s for one in outcomes), jobs_s)


def traces_of(load: Load, recorded: Sequence[Trace], seed: int) -> list[Trace]:
    """What is replayed."""
    if load.children:
        return forks(Forks(load.children, load.traces, load.context, load.steps), seed)
    limits = Limits(
        traces_max=load.traces,
        steps_min=load.steps,
        steps_max=load.steps,
        context_max=load.context,
        output_max=load.output,
    )
    return choose(recorded, limits, seed)


def on_paper(shape: Shape, traces: Sequence[Trace], concurrency: int) -> Outcome:
    """The same schedule on the model."""
    tasks = tasks_of(traces, shape.block_tokens, GAP_MAX_S, TIME_SCALE)
    clock = Clock()
    model = Fleet(shape, Ours(), clock)
    life = Life(tasks, clock, model, 0)
    model.ended = life.ended
    waiting: list[Task] = list(reversed(tasks))

    def following() -> None:
        if waiting:
            life.begin(life.make(waiting.pop()))

    life.again = following
    for lane in range(min(concurrency, len(tasks))):
        clock.at(lane * STAGGER_S, following)
    while len(life.completed) < len(tasks):
        clock.run(clock.now_s + 1.0)
    wall_s = max(ended_s for _, ended_s in life.completed)
    jobs_s = tuple(ended_s - began_s for began_s, ended_s in life.completed)
    return Outcome(sum(task.steps for task in tasks), wall_s, jobs_s)


async def live(url: str, traces: list[Trace], concurrency: int, salt: str) -> Outcome:
    """On a cluster."""
    pacing = Pacing(concurrency=concurrency, time_scale=TIME_SCALE, gap_max_s=GAP_MAX_S, stagger_s=STAGGER_S)
    outcome = await replay(traces, pacing, Target(url, salt=salt))
    errors = [f"{record.error} {record.detail}" for record in outcome.records if record.error is not None]
    if errors:
        raise ClusterFault(f"{len(errors)} steps failed, for example: {errors[0]}")
    jobs_s = tuple(one.ended_s - one.began_s for one in outcome.completed if one.parent is None)
    return Outcome(len(outcome.records), max(one.ended_s for one in outcome.completed), jobs_s)


def validate(
    recorded: Sequence[Trace], decodes: int, prefills: int, seed: int, console: Console, keep: Path | None = None
) -> tuple[list[Result], Shape]:
    """Calibrate on a fresh cluster, run all loads on both, and tell by how much the model is off."""
    config = ClusterConfig(port=free_port(), nodes=NodeCounts(prefill=prefills, decode=decodes, store=1))
    real: dict[str, list[Outcome]] = {name: [] for name in LOADS}
    paper: dict[str, list[Outcome]] = {name: [] for name in LOADS}
    with fleet(config, console) as running:
        shape = asyncio.run(calibrate(running.url))
        if keep is not None:
            keep.write_bytes(msgspec.json.format(msgspec.json.encode(shape)))
        for turn in range(ROUNDS):
            for name, load in LOADS.items():
                traces = traces_of(load, recorded, seed + turn)
                told = live(running.url, traces, load.concurrency, f"validate-{name}-{turn}")
                real[name].append(asyncio.run(told))
                paper[name].append(on_paper(shape, traces, load.concurrency))
                console.print(f"{name}: live {real[name][-1]}; on paper {paper[name][-1]}", highlight=False)
    results: list[Result] = []
    errors: list[float] = []
    for name in LOADS:
        lived, foretold = together(real[name]), together(paper[name])
        for what, here, there, unit in (
            ("throughput", foretold.steps_per_s, lived.steps_per_s, "1/s"),
            ("job", foretold.job_s, lived.job_s, "s"),
        ):
            versus = f"fleet.live.{name}.{what}"
            results.append(Result(versus, there, unit))
            results.append(Result(f"fleet.model.{name}.{what}", here, unit, versus, here / there))
            errors.append(abs(here / there - 1))
    results.append(Result("fleet.error", max(errors), "1"))
    results.append(Result("fleet.error.mean", float(np.mean(errors)), "1"))
    return results, shape

"""Sessions that end while one looks: how they share a fleet, and what an overload does to those that were let in."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec
import numpy as np

from bench.common.report import Result
from bench.fleet_model.fleets import ACCELERATOR, fleet_of
from router.policy.admission import AdmissionConfig
from router.policy.order import STRETCH, Stretch
from sim.fleet.model import Tally
from sim.fleet.routing import Ours
from sim.fleet.run import Experiment, capacity
from sim.fleet.work import Task

CALLS_MAX, GAP_MAX_S = 12, 30.0
SESSIONS = 250
SHARING_WORKERS = 8
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SPREAD_S = 60.0
"""Within which they all come."""
OVERLOAD, OVERLOAD_S = 4.0, 120.0
OVERLOAD_WORKERS = 8
CALM_S, AFTER_S = 600.0, 1800.0


def sessions_of(tasks: Sequence[Task]) -> list[Task]:
    """The first steps of each, without long pauses."""
    return [
        replace(
            task,
            calls=tuple(
                replace(call, gap_s=min(call.gap_s, GAP_MAX_S), children=()) for call in task.calls[:CALLS_MAX]
            ),
        )
        for task in tasks
    ]


class Way(NamedTuple):
    """How sessions are let in, and steps' turns come."""

    turns: Stretch | None = STRETCH
    """None: a step goes to a worker at once, and waits there."""
    admission: AdmissionConfig | None = None
    worker_stretch: float = ACCELERATOR.stretch


FIFO = Way(None, worker_stretch=0.0)
WAYS = {
    "ours": Way(),
    "at_once": Way(None),
    "came": Way(Stretch(0.0, 0.0, 0.0)),
    "not_given": Way(STRETCH._replace(given=0.0)),
    "not_takes": Way(STRETCH._replace(takes=0.0)),
    "not_begins": Way(STRETCH._replace(begins=0.0)),
    "gated": Way(None, AdmissionConfig()),
}
"""Each leaves a part of ours out, or adds one: steps wait at workers; who came first goes first; nothing counts of what
was given, of what it takes, or of beginning; traces are refused while memory is short."""


class _Shared(NamedTuple):
    session_s: float
    """From when it was asked for first."""
    ttft_s: dict[str, float]
    """From when a step was asked for first, by quantile."""
    sent_p99_s: float
    """From when it was sent to a worker."""


def _share(tasks: Sequence[Task], block_tokens: int, seed: int, way: Way) -> _Shared:
    kind = msgspec.structs.replace(ACCELERATOR, stretch=way.worker_stretch)
    shape = fleet_of(SHARING_WORKERS, private=False, disk=True, block_tokens=block_tokens, kind=kind)
    experiment = Experiment(shape, tasks, SESSIONS, Ours(), seed, way.admission, turns=way.turns)
    life, clock = experiment.life, experiment.clock
    life.again = lambda: None
    for number in range(SESSIONS):
        clock.at(number * SPREAD_S / SESSIONS, life.start)
    while len(life.completed) < SESSIONS:
        clock.run(clock.now_s + 10.0)
    # What a session waited to be let in is part of it.
    lengths = [ended_s - began_s for began_s, ended_s in life.completed]
    session_s = (sum(lengths) + sum(waited_s for _, waited_s in experiment.gate.waits)) / SESSIONS
    tally = experiment.fleet.tally
    asked = {name: float(np.quantile(tally.asked_s, share)) for name, share in QUANTILES.items()}
    return _Shared(session_s, asked, float(np.quantile(tally.ttft_s, 0.99)))


def sharing(tasks: Sequence[Task], block_tokens: int, seed: int) -> list[Result]:
    """250 sessions that come within a minute: against first come, first served, each mechanism left out in turn."""
    sessions = sessions_of(tasks)
    fifo = _share(sessions, block_tokens, seed, FIFO)
    results: list[Result] = []
    for name, way in WAYS.items():
        prefix = "fleet.share" if name == "ours" else f"fleet.share.{name}"
        ours = _share(sessions, block_tokens, seed, way)
        figures = [("session", ours.session_s, fifo.session_s), ("sent.p99", ours.sent_p99_s, fifo.sent_p99_s)]
        figures += [(f"ttft.{share}", ours.ttft_s[share], fifo.ttft_s[share]) for share in QUANTILES]
        for what, here, there in figures:
            if name == "ours":
                results.append(Result(f"fleet.share.{what}.fifo", there, "s"))
            results.append(Result(f"{prefix}.{what}", here, "s", f"fleet.share.{what}.fifo", here / there))
    return results


def overload(tasks: Sequence[Task], block_tokens: int, seed: int) -> list[Result]:
    """As many agents as a fleet can serve, then four times as many for two minutes; those that are let in go on."""
    sessions = sessions_of(tasks)
    shape = fleet_of(OVERLOAD_WORKERS, private=False, disk=True, block_tokens=block_tokens)
    could = capacity(shape, sessions)
    agents = round(could.agents)
    experiment = Experiment(shape, sessions, agents, Ours(), seed, AdmissionConfig())
    experiment.populate(could.step_s)
    fleet, clock, life, gate = experiment.fleet, experiment.clock, experiment.life, experiment.gate
    clock.run(CALM_S)
    calm = _window(experiment, CALM_S)
    more = round((OVERLOAD - 1) * agents)
    for number in range(more):
        clock.after(number * 1.0 / more, life.start)
    gate.waits.clear()
    burst = _window(experiment, OVERLOAD_S)
    life.again = lambda: None  # who ends now leaves
    after = _window(experiment, AFTER_S)
    results = [
        Result("fleet.overload.pace", calm.mean_s / burst.mean_s, "1"),
        Result("fleet.overload.pace.after", calm.mean_s / after.mean_s, "1"),
        Result("fleet.overload.refused", len(gate.waits) + gate.admission.waiting, "traces"),
        Result("fleet.overload.started", len(gate.waits), "traces"),
        Result("fleet.overload.start.error", gate.late_share(), "1"),
        Result("fleet.overload.throughput", burst.traces_s / calm.traces_s, "1"),
    ]
    assert fleet.tally.steps >= 0
    return results


class _Window(msgspec.Struct, frozen=True):
    mean_s: float
    traces_s: float


def _window(experiment: Experiment, seconds: float) -> _Window:
    fleet, clock = experiment.fleet, experiment.clock
    fleet.tally = Tally(clock.now_s)
    clock.run(clock.now_s + seconds)
    tally = fleet.tally
    return _Window(float(np.mean(tally.step_s or [0.0])), tally.traces / seconds)

"""What each knob is worth: every fixed setting of it on a simulated fleet, mix by mix."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from bench.adapt.mixes import MIXES, tasks_of
from bench.fleet_model.fleets import ACCELERATOR, MEMORY_TOKENS
from router.policy.knobs import Knobs
from sim.fleet.routing import Ours
from sim.fleet.run import Experiment, capacity
from sim.fleet.shape import Shape, StoreKind, WorkerKind

WORKERS = 8
BLOCK_TOKENS = 512
WARM_UP_S, SECONDS = 60.0, 120.0
LOADS = (0.7, 1.5)
"""Agents, as multiples of what keeps the fleet just busy."""


class Setting(NamedTuple):
    """A fleet that nobody turns."""

    prefills: int = 2
    local_tokens: int = 256
    chunk_tokens: int = 2048
    knobs: Knobs = Knobs()
    store_tokens: int = MEMORY_TOKENS
    disk_token_s: float = 0.0
    """0: there are no disks."""


RANGES: Mapping[str, Sequence[Any]] = {
    "prefills": (0, 1, 2, 4, 6),
    "local_tokens": (64, 256, 1024, 4096, 16384),
    "chunk_tokens": (256, 512, 2048, 8192),
    "sticky_margin": (0.0, 0.05, 0.15, 0.4, 0.8),
    "local_margin": (0.3, 0.5, 0.7, 0.9, 1.0),
    "pull_margin": (0.5, 0.85, 1.0),
}


def turned(base: Setting, knob: str, value: Any) -> Setting:
    """The same with one knob elsewhere."""
    if knob in Knobs.__struct_fields__:
        return base._replace(knobs=msgspec.structs.replace(base.knobs, **{knob: value}))
    return base._replace(**{knob: value})


def shape_of(setting: Setting, kind: WorkerKind = ACCELERATOR, workers: int = WORKERS) -> Shape:
    """That fleet."""
    alike = msgspec.structs.replace(kind, chunk_tokens=setting.chunk_tokens, local_prefill_tokens=setting.local_tokens)
    kinds = [msgspec.structs.replace(alike, count=workers - setting.prefills)]
    if setting.prefills:
        kinds.append(msgspec.structs.replace(alike, count=setting.prefills, role="prefill"))
    disk = setting.disk_token_s > 0
    store = StoreKind(
        1,
        setting.store_tokens * workers,
        kind.pull_token_s / workers,
        setting.store_tokens * workers * 20 if disk else 0,
        setting.disk_token_s / workers,
    )
    return Shape(tuple(kinds), (store,), BLOCK_TOKENS)


def measured(setting: Setting, mix: str, load: float, seed: int, kind: WorkerKind = ACCELERATOR) -> float:
    """Steps per second that met their deadlines."""
    tasks = tasks_of(mix, BLOCK_TOKENS, seed)
    whole = capacity(shape_of(setting._replace(prefills=0), kind), tasks)
    routing = Ours(knobs=setting.knobs)
    experiment = Experiment(shape_of(setting, kind), tasks, max(2, round(whole.agents * load)), routing, seed)
    experiment.populate(whole.step_s)
    return experiment.measure(WARM_UP_S, SECONDS).in_time_per_s


class Point(NamedTuple):
    """One measurement."""

    knob: str
    value: Any
    mix: str
    load: float
    steps_s: float


def sweep(base: Setting, knobs: Sequence[str], loads: Sequence[float], seed: int) -> Iterator[Point]:
    """Each knob's settings alone."""
    for knob in knobs:
        for mix in MIXES:
            for load in loads:
                for value in RANGES[knob]:
                    yield Point(knob, value, mix, load, measured(turned(base, knob, value), mix, load, seed))


def worth(points: Sequence[Point]) -> dict[str, float]:
    """By how much a fleet that always had the best setting of a knob would be ahead of the best that is left alone:
    the means over mixes and loads of steps relative to the best."""
    gains: dict[str, float] = {}
    for knob in dict.fromkeys(point.knob for point in points):
        best: dict[tuple[str, float], float] = {}
        for point in points:
            if point.knob == knob:
                best[point.mix, point.load] = max(best.get((point.mix, point.load), 0.0), point.steps_s)
        means: dict[Any, list[float]] = {}
        for point in points:
            if point.knob == knob:
                means.setdefault(point.value, []).append(point.steps_s / best[point.mix, point.load])
        gains[knob] = 1 / max(sum(each) / len(each) for each in means.values()) - 1
    return gains

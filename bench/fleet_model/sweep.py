"""The same agents on the same fleet under one policy after the other, at several loads."""

from collections.abc import Callable, Sequence

import msgspec

from bench.common.report import Result
from bench.fleet_model.fleets import ACCELERATOR, fleet_of
from router.policy.admission import AdmissionConfig
from router.policy.order import STRETCH, Stretch
from sim.fleet.model import Routing
from sim.fleet.routing import CacheAware, Ours, Sticky
from sim.fleet.run import Capacity, Experiment, Figures, capacity
from sim.fleet.shape import WorkerKind
from sim.fleet.work import Task


class Contender(msgspec.Struct, frozen=True):
    """A way to run a fleet, all else being equal."""

    what: str
    routing: Callable[[], Routing]
    private: bool = True
    disk: bool = False
    """Whether it uses its hosts' disks."""
    admission: AdmissionConfig | None = None
    """None: every trace begins at once."""
    turns: Stretch | None = None
    """None: steps wait at workers."""


GATE = AdmissionConfig()


def _ours(
    what: str,
    routing: Callable[[], Routing] = Ours,
    *,
    disk: bool = True,
    admission: AdmissionConfig | None = GATE,
    turns: Stretch | None = None,
) -> Contender:
    return Contender(what, routing, private=False, disk=disk, admission=admission, turns=turns)


CONTENDERS: dict[str, Contender] = {
    "ours": _ours("traces admitted, by cost, one store of memory and disk for all"),
    "sticky": Contender("sessions stay, each worker's context goes to its host's memory", Sticky),
    "offload": Contender("fewest tokens to compute and decoded, the same memory", CacheAware),
    "sticky_disk": Contender("sessions stay, memory and disk of its own", Sticky, disk=True),
    "offload_disk": Contender("fewest tokens, memory and disk of its own", CacheAware, disk=True),
    "ours_line": _ours("ours, steps in line", turns=STRETCH),
    "ours_open": _ours("ours, every trace begins at once", admission=None),
    "ours_open_line": _ours("ours, every trace begins at once, steps in line", admission=None, turns=STRETCH),
    "ours_memory": _ours("ours without the disks", disk=False),
    "ours_memory_open": _ours("ours without the disks and without admission", disk=False, admission=None),
    "ours_sticky": _ours("ours, a trace never leaves its worker", lambda: Ours("sticky")),
    "ours_turns": _ours("ours, workers in turn", lambda: Ours("round-robin")),
}
PEERS = ("sticky", "offload", "sticky_disk", "offload_disk")
ABLATIONS = tuple(name for name in CONTENDERS if name.startswith("ours_"))
LOADS = {0.5: "half", 1.0: "1x", 2.0: "2x", 3.0: "3x"}


class Setting(msgspec.Struct, frozen=True):
    """What all contenders have in common."""

    workers: int = 64
    block_tokens: int = 2048
    warm_up_s: float = 600.0
    seconds: float = 1200.0
    seed: int = 1


def load_name(load: float) -> str:
    """As figures are called."""
    return LOADS.get(load, f"{load:g}x")


def run(
    name: str, load: float, tasks: Sequence[Task], setting: Setting, kind: WorkerKind = ACCELERATOR
) -> tuple[Figures, Capacity]:
    """One contender at one load."""
    contender = CONTENDERS[name]
    shape = fleet_of(
        setting.workers,
        private=contender.private,
        disk=contender.disk,
        block_tokens=setting.block_tokens,
        kind=kind,
    )
    could = capacity(shape, tasks)
    experiment = Experiment(
        shape,
        tasks,
        round(could.agents * load),
        contender.routing(),
        setting.seed,
        contender.admission,
        turns=contender.turns,
    )
    experiment.populate(could.step_s)
    return experiment.measure(setting.warm_up_s, setting.seconds), could


def results(figures: dict[tuple[str, float], Figures]) -> list[Result]:
    """Traces per worker-hour of each, and ours divided by each other's, by contender and load."""
    found: list[Result] = []
    for (name, load), one in figures.items():
        prefix = f"fleet.{load_name(load)}.{name}"
        found.append(Result(f"{prefix}.traces", one.traces_per_worker_h, "1/h"))
        found.append(Result(f"{prefix}.hits", one.hits, "1"))
        found.append(Result(f"{prefix}.ttft.p50", one.ttft_p50_s, "s"))
        found.append(Result(f"{prefix}.ttft.p99", one.ttft_p99_s, "s"))
        found.append(Result(f"{prefix}.step", one.step_mean_s, "s"))
        ours = figures.get(("ours", load))
        if name != "ours" and ours is not None and one.traces_per_worker_h:
            ratio = ours.traces_per_worker_h / one.traces_per_worker_h
            found.append(Result(f"fleet.traces.{load_name(load)}.{name}", ratio, "1", f"{prefix}.traces", ratio))
    return found

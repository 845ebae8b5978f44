"""Three shifts of the mix on a simulated fleet: the loop, against each split of the workers that is left alone."""

from typing import NamedTuple

from bench.adapt.knobs import BLOCK_TOKENS, Setting, shape_of
from bench.adapt.mixes import MIXES, tasks_of
from router.adapt.loop import AdaptConfig, Change, Verdict
from sim.fleet.adapting import Adapting
from sim.fleet.model import Tally
from sim.fleet.routing import Ours
from sim.fleet.run import Experiment, capacity

PHASE_S = 240.0
SHIFT_S = 30.0
"""After a shift a phase's figure counts from here on."""
WARM_UP_S = 60.0
SPLITS = (1, 2, 4, 6)
"""Prefill workers of eight: those that can be come to by turning one at a time, with one of each left."""


class Outcome(NamedTuple):
    """Steps in time, per second."""

    phases: dict[str, float]
    """After the first seconds of each."""
    whole: float
    told: list[tuple[float, Change | Verdict]]


def run(prefills: int, load: float, seed: int, config: AdaptConfig | None = None) -> Outcome:
    """All mixes, one after the other, on one fleet. ``config``: of the loop; None: nobody turns anything."""
    tasks = {mix: tasks_of(mix, BLOCK_TOKENS, seed) for mix in MIXES}
    agents = {mix: max(2, round(load * capacity(shape_of(Setting(prefills=0)), tasks[mix]).agents)) for mix in MIXES}
    first = next(iter(MIXES))
    experiment = Experiment(shape_of(Setting(prefills=prefills)), tasks[first], agents[first], Ours(), seed)
    fleet, life, clock = experiment.fleet, experiment.life, experiment.clock
    adapting = Adapting(fleet, config) if config is not None else None
    going, wanted = 0, 0

    def again() -> None:
        nonlocal going
        going -= 1
        refill()

    def refill() -> None:
        nonlocal going
        while going < wanted:
            going += 1
            life.start()

    life.again = again
    phases: dict[str, float] = {}
    whole = 0
    for mix in MIXES:
        life.tasks = tasks[mix]
        wanted = agents[mix]
        refill()
        if mix == first:
            clock.run(clock.now_s + WARM_UP_S)
        fleet.tally = Tally(clock.now_s)
        clock.run(clock.now_s + SHIFT_S)
        whole += fleet.tally.in_time
        fleet.tally = Tally(clock.now_s)
        clock.run(clock.now_s + PHASE_S - SHIFT_S)
        whole += fleet.tally.in_time
        phases[mix] = fleet.tally.in_time / (PHASE_S - SHIFT_S)
    return Outcome(phases, whole / (PHASE_S * len(MIXES)), adapting.told if adapting is not None else [])

"""Store nodes with tiers, killed over and over in the simulator: five hundred lives over seeds; and lives that come
back from the dead."""

import logging

import msgspec
import pytest

from sim.faults import Crash, FaultPlan, PowerLoss, Zombie
from sim.run import simulate
from sim.shape import FAULTS_END_S, FLEET, MIX
from sim.storage import make_below

CALM = FaultPlan(faults=(), end_s=FAULTS_END_S, frame_delay_s=0.0005, copy_delay_s=0.0005)
SMALL = msgspec.structs.replace(MIX, traces=10)
TIERED = next(make_below(seed, 100) for seed in range(100) if make_below(seed, 100) is not None)


@pytest.fixture(autouse=True)
def quiet():
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    yield
    root.setLevel(level)


def with_tiers(world):
    if world.shape.below is None:
        world.shape = msgspec.structs.replace(world.shape, below=TIERED)


def kills(kind, start_s, every_s):
    """One store after the other, at moments that have nothing to do with each other."""
    at_s = [start_s + every_s * i for i in range(int((FAULTS_END_S - 2.0 - start_s) / every_s))]
    faults = [kind(at, FLEET.stores[i % len(FLEET.stores)], 0.3) for i, at in enumerate(at_s)]
    return msgspec.structs.replace(CALM, faults=tuple(faults))


@pytest.mark.parametrize("chunk", range(4))
def test_five_hundred_kills(chunk):
    deaths = recovered = 0
    for seed in range(1000 + 5 * chunk, 1005 + 5 * chunk):
        result = simulate(seed, mix=SMALL, plan=kills(Crash, 1.0 + seed % 7 / 10, 0.83), prepare=with_tiers)
        assert not result.findings, "\n".join([str(seed), *result.findings])
        deaths += result.counts["world.deaths"]
        recovered += result.counts["tier.recovered"]
    assert deaths >= 125
    assert recovered > deaths


def test_power_that_fails_again_and_again_costs_blocks_and_nothing_else():
    bad = 0
    for seed in range(1100, 1110):
        result = simulate(seed, mix=SMALL, plan=kills(PowerLoss, 1.0, 1.1), prepare=with_tiers)
        assert not result.findings, "\n".join([str(seed), *result.findings])
        bad += result.counts["tier.corrupt"] + result.counts["tier.unreadable"]
    assert bad > 0


def test_who_was_declared_dead_is_fenced_when_it_returns():
    zombies = 0
    for seed in range(1201, 1221, 2):  # two lives at once need two addresses
        faults = tuple(Zombie(float(at), FLEET.stores[at % 3], 4.5) for at in range(2, 17, 5))
        plan = msgspec.structs.replace(CALM, faults=faults)
        result = simulate(seed, mix=SMALL, plan=plan, prepare=with_tiers)
        assert not result.findings, "\n".join([str(seed), *result.findings])
        zombies += result.counts["world.zombies"]
    assert zombies >= 20

"""Copies, drains and joins of store nodes in the whole simulated cluster, over seeds: pinned blocks survive a host,
a drain loses nothing, who joins causes no storm."""

import logging

import msgspec
import pytest

from kvstore.copies.config import ReplicationConfig
from kvstore.copies.drain import Drainer
from kvstore.tiers.tiering import TieringConfig
from sim.faults import FaultPlan, HostLoss, Retire
from sim.run import simulate
from sim.shape import FAULTS_END_S, FLEET, MIX
from sim.storage import Below

CALM = FaultPlan(faults=(), end_s=FAULTS_END_S, frame_delay_s=0.0005, copy_delay_s=0.0005)
SMALL = msgspec.structs.replace(MIX, traces=10)
BELOW = Below(
    2000,
    0.0005,
    TieringConfig(scrub_bytes_s=0),
    pin_share=1.0,
    prefetch_share=0.0,
    quotas=False,
    replicas=2,
    copies=ReplicationConfig(grace_s=1.0),
)
SLOTS = 1000
LOSSES = tuple(HostLoss(at, FLEET.stores[i % 3], 0.5) for i, at in enumerate((6.0, 12.0, 18.0)))
DRAINS = tuple(Retire(at, FLEET.stores[i % 3], 5.0) for i, at in enumerate((5.0, 11.0, 17.0)))


@pytest.fixture(autouse=True)
def quiet():
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    yield
    root.setLevel(level)


def run(seed, *faults):
    """A roomy cluster in which store nodes end one at a time, with time between them to copy."""

    def prepare(world):
        store = msgspec.structs.replace(
            world.shape.store,
            arena_bytes=SLOTS * 4096,
            quota_bytes={},
            hard_share_max=1.0,
            hard_tenant_share_max=1.0,
        )
        world.shape = msgspec.structs.replace(world.shape, store=store, below=BELOW)
        world.one_at_a_time = True

    return simulate(seed, mix=SMALL, plan=msgspec.structs.replace(CALM, faults=faults), prepare=prepare)


@pytest.mark.parametrize("chunk", range(3))
def test_pinned_blocks_survive_their_host(chunk):
    for seed in range(2000 + 5 * chunk, 2005 + 5 * chunk):
        result = run(seed, *LOSSES)
        assert not result.findings, "\n".join([str(seed), *result.findings])
        assert result.counts["world.replicated"] > 100
        assert result.counts["world.deaths"] == len(LOSSES)


@pytest.mark.parametrize("chunk", range(3))
def test_a_drain_loses_nothing(chunk):
    for seed in range(2100 + 5 * chunk, 2105 + 5 * chunk):
        result = run(seed, *DRAINS)
        assert not result.findings, "\n".join([str(seed), *result.findings])
        assert result.counts["world.drained"] == len(DRAINS)
        assert result.counts["world.drained_blocks"] > 0


def test_joins_cause_no_storm():
    """What is copied is at most each pinned block once, and once more for each host that was lost."""
    for seed in range(2200, 2210):
        result = run(seed, *LOSSES)
        assert not result.findings, "\n".join([str(seed), *result.findings])
        wanted = result.counts["world.wanted"]
        assert 0 < result.counts["copies.blocks"] <= wanted * (1 + len(LOSSES))


# --- the checkers can fail ----------------------------------------------------------------------------------------


def test_two_hosts_lost_at_once_are_noticed():
    """What no copy survives: here it is the world that breaks its word, so that the checker has something to find."""
    # All of them between two looks of the checker, which are a tenth of a second apart.
    quick = tuple(HostLoss(9.95 + 0.005 * i, store, 0.5) for i, store in enumerate(FLEET.stores))
    for seed in (2000, 2004, 2007):
        assert any("replicas" in line for line in run(seed, *quick).findings)


def test_a_drain_that_is_done_too_early(monkeypatch):
    real = Drainer.call

    def hasty(self, request):
        state = real(self, request)
        return msgspec.structs.replace(state, state="drained") if state.state == "draining" else state

    monkeypatch.setattr(Drainer, "call", hasty)
    assert any("drain" in line for line in run(2101, *DRAINS).findings)

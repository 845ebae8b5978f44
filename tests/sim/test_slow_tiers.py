"""Blocks that come up more slowly than they are computed are computed, and no token differs."""

import msgspec

from kvstore.tiers.tiering import TieringConfig
from router.traces.decisions import Placed
from sim.run import simulate
from sim.shape import ROUTER
from sim.storage import Below
from sim.traces import Mix
from sim.world import World
from worker.config import WorkerConfig

CALM = 0
"""A seed without faults."""
MIX = Mix(traces=24, steps_min=4, steps_max=6, think_mean_s=2.0, fork_share=0.0, hang_up_share=0.0)


def placements(latency_s: float) -> tuple[list[Placed], int]:
    """With a device that takes so long for each call below little memory; and how many blocks came up from it."""
    worlds: list[World] = []

    def prepare(world: World) -> None:
        tiering = TieringConfig(scrub_bytes_s=0)
        below = Below(4000, latency_s, tiering, pin_share=0.0, prefetch_share=0.0, quotas=False)
        store = msgspec.structs.replace(world.shape.store, arena_bytes=24 * 4096, quota_bytes={})
        worker = WorkerConfig(chunk_tokens=64, local_prefill_tokens=16, group_blocks=8, staging_blocks=64)
        world.shape = msgspec.structs.replace(world.shape, below=below, store=store, worker=worker)
        worlds.append(world)

    result = simulate(CALM, mix=MIX, prepare=prepare)
    assert not result.findings, "\n".join(result.findings)
    assert result.failed == 0
    (world,) = worlds
    dispatch = world.lives[ROUTER].dispatch
    assert dispatch is not None
    decisions = [entry.decision for trace in dispatch.traces.all() for entry in trace.decisions]
    return [decision for decision in decisions if isinstance(decision, Placed)], result.counts["tiering.promoted"]


def test_a_slow_tier_is_left_alone_where_computing_is_faster() -> None:
    fast, raised = placements(0.0001)
    assert raised
    slow, _ = placements(0.2)
    kept_back = [placed for placed in slow if placed.pull_tokens is not None]
    assert len(kept_back) > 4 * sum(placed.pull_tokens is not None for placed in fast)
    for placed in kept_back:
        assert placed.pull_tokens is not None
        assert placed.expected_tokens <= max(placed.pull_tokens, placed.warm_tokens)

"""More steps than the workers' KV memory holds: some are suspended, none fails, and no token differs."""

import msgspec

from sim.run import simulate
from sim.text import VOCAB
from sim.traces import Mix, context_max
from sim.world import World
from tracehaul.engine.fake import fake_info

MIX = Mix(
    traces=24,
    steps_min=2,
    steps_max=3,
    system_tokens_max=20,
    new_tokens_max=16,
    output_tokens_max=80,
    think_mean_s=0.05,
    spread_s=0.2,
    fork_share=0.0,
    hang_up_share=0.0,
    long_gap_share=0.0,
)
CALM = 0
"""A seed without faults."""


def tight(world: World) -> None:
    """Memory for one of the longest sequences on each worker, taken a block at a time; a roomy store."""
    longest = context_max(MIX) // 2  # nobody forks
    store = world.shape.store
    world.shape = msgspec.structs.replace(
        world.shape,
        engine=fake_info(context_max=longest, kv_tokens_max=longest // 8 * 8, vocab_size=VOCAB),
        worker=msgspec.structs.replace(world.shape.worker, headroom_tokens=1, sequences_max=16, staging_blocks=64),
        store=msgspec.structs.replace(store, arena_bytes=4096 * store.slot_bytes, quota_bytes={}),
        below=None,
    )


def test_what_outgrows_the_memory_is_suspended_and_goes_on_where_it_was() -> None:
    worlds: list[World] = []

    def prepare(world: World) -> None:
        tight(world)
        worlds.append(world)

    result = simulate(CALM, mix=MIX, prepare=prepare)
    assert not result.findings, "\n".join(result.findings)
    assert result.failed == 0
    assert result.counts["worker.suspended_steps"] > 0
    # What a suspended step had computed comes back from the store, to the last token.
    engines = [life.engine for life in worlds[0].lives.values() if life.engine is not None]
    needed = result.prompt_tokens - result.cached_tokens + result.counts["worker.output_tokens"]
    assert sum(engine.computed_tokens for engine in engines) <= needed


def test_the_background_gives_way_and_loses_no_token() -> None:
    worlds: list[World] = []

    def prepare(world: World) -> None:
        tight(world)
        worlds.append(world)

    result = simulate(CALM, mix=msgspec.structs.replace(MIX, background_share=0.5), prepare=prepare)
    assert not result.findings, "\n".join(result.findings)
    assert result.failed == 0
    assert result.counts["worker.background_suspended"] > result.counts["worker.suspended_steps"] / 2
    engines = [life.engine for life in worlds[0].lives.values() if life.engine is not None]
    needed = result.prompt_tokens - result.cached_tokens + result.counts["worker.output_tokens"]
    assert sum(engine.computed_tokens for engine in engines) <= needed


def test_nor_does_any_fault_change_a_token() -> None:
    suspended = 0
    for seed in (2, 3, 4, 5):
        result = simulate(seed, mix=MIX, prepare=tight)
        assert not result.findings, "\n".join([f"seed {seed}", *result.findings])
        suspended += result.counts["worker.suspended_steps"]
    assert suspended > 0

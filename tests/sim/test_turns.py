"""More steps than workers have room for wait in the router for their turn: all end, with the right tokens."""

import msgspec

from sim.run import simulate
from sim.shape import MIX
from sim.text import VOCAB
from sim.traces import context_max
from sim.world import World
from tracehaul.engine.fake import fake_info

CALM, STORMY = 0, 31
TOGETHER = msgspec.structs.replace(MIX, spread_s=0.1, traces=32, think_mean_s=0.05)


def crowded(world: World) -> None:
    """Memory for one of the longest sequences on each worker."""
    longest = context_max(MIX)
    engine = fake_info(context_max=longest, kv_tokens_max=longest // 8 * 8, vocab_size=VOCAB)
    dispatch = msgspec.structs.replace(world.shape.dispatch, turns=True)
    world.shape = msgspec.structs.replace(world.shape, engine=engine, dispatch=dispatch)


def test_steps_that_waited_end_like_others() -> None:
    result = simulate(CALM, mix=TOGETHER, prepare=crowded)
    assert not result.findings, "\n".join(result.findings)
    assert result.failed == 0
    assert result.counts["router.steps_waited"] > 0


def test_they_do_where_workers_and_routers_die_meanwhile() -> None:
    result = simulate(STORMY, mix=TOGETHER, prepare=crowded)
    assert not result.findings, "\n".join(result.findings)
    assert result.counts["router.steps_waited"] > 0

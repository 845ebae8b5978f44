"""What workers announce decides where their steps are placed: real shells, a fake engine, virtual time."""

from typing import Any

import pytest

from router.dispatch import pricing
from router.policy.placement import Placement, place
from sim.world import World
from tests.sim.test_forks import PROMPT, ask, in_world, request
from tracehaul.wire.cluster import ASSUMED
from tracehaul.wire.steps import Sampling


@pytest.mark.parametrize(("local_prefill_tokens", "hops"), [(len(PROMPT) - 1, True), (len(PROMPT), False)])
def test_one_setting_decides_for_the_router_and_the_worker(
    monkeypatch: pytest.MonkeyPatch, local_prefill_tokens: int, hops: bool
) -> None:
    placements: list[Placement] = []

    def noting(*args: Any) -> Placement | None:
        placed = place(*args)
        assert placed is not None
        placements.append(placed)
        return placed

    monkeypatch.setattr(pricing, "place", noting)

    async def test(world: World) -> None:
        await ask(world, request("one", Sampling(max_tokens=2, temperature=0.0)))
        (placed,) = placements
        assert (placed.queued is not None) == hops
        assert (placed.decode_work_s > 0) == (not hops)
        steps = sum(life.host.stats.steps for life in world.lives.values() if life.host and "prefill" in life.node)
        assert steps == hops

    in_world(local_prefill_tokens, test)


def test_a_worker_announces_how_it_is_set_up_and_the_router_sees_it() -> None:
    async def test(world: World) -> None:
        router = next(life.dispatch for life in world.lives.values() if life.dispatch is not None)
        config, engine = world.shape.worker, world.shape.engine
        for role in ("prefill", "decode"):
            for info in router.members.live(role):
                limits = info.limits
                assert (limits.chunk_tokens, limits.sequences_max) == (config.chunk_tokens, config.sequences_max)
                assert (limits.kv_tokens_max, limits.waiting_max) == (engine.kv_tokens_max, config.waiting_max)
                assert limits.local_prefill_tokens == (config.local_prefill_tokens if role == "decode" else 0)
                assert limits.stretch > 0
                assert info.rates == ASSUMED, "nothing was measured yet"
                assert info.engine == "native"
                assert ("recall" in info.features) == (role == "decode")
        assert router.members.live("decode")
        assert all(info.limits.chunk_tokens == 0 for info in router.members.live("store"))

    in_world(33, test)

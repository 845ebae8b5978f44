"""A full fleet lets traces begin one after the other: who is refused comes back when it was told to, and none fails."""

import msgspec

from router.policy.admission import AdmissionConfig
from sim.run import simulate
from sim.shape import MIX
from sim.world import World

CALM = 0
"""A seed without faults."""
ADMISSION = AdmissionConfig(close_share=0.05, open_share=0.04, half_life_s=0.5, stored_half_life_s=0.5)
TOGETHER = msgspec.structs.replace(MIX, spread_s=0.2, traces=12)


def gated(world: World) -> None:
    dispatch = msgspec.structs.replace(world.shape.dispatch, admission=ADMISSION)
    world.shape = msgspec.structs.replace(world.shape, dispatch=dispatch)


def test_refused_traces_begin_later_and_all_end() -> None:
    result = simulate(CALM, mix=TOGETHER, prepare=gated)
    assert not result.findings, "\n".join(result.findings)
    assert result.counts["router.traces_refused"] > 0
    assert result.failed == 0
    assert result.finished + result.hung_up >= 12 * TOGETHER.steps_min

"""Fault plans: the same for the same seed, over before the end, and every kind occurs."""

import pytest

from sim.faults import Cut, Slow, Storm, Targets, Weather, make_faults
from tracehaul.wire.ids import NodeId

A, B, C = NodeId("store-0"), NodeId("store-1"), NodeId("decode-0")
ROUTER = NodeId("router")
FLEET = Targets(routers=(ROUTER,), stores=(A, B), workers=(C,))


@pytest.mark.parametrize("seed", range(50))
def test_plans_are_reproducible_and_end_in_time(seed):
    plan = make_faults(seed, FLEET, 40.0)
    assert plan == make_faults(seed, FLEET, 40.0)
    assert list(plan.faults) == sorted(plan.faults, key=lambda fault: fault.at_s)
    for fault in plan.faults:
        assert fault.at_s + getattr(fault, "for_s", 0.0) <= 40.0 + 1e-9
        if isinstance(fault, Cut):
            assert fault.node != fault.other
    assert (plan.faults == ()) == (seed % 10 == 0)


def test_every_kind_occurs():
    kinds = {type(fault).__name__ for seed in range(50) for fault in make_faults(seed, FLEET, 40.0).faults}
    assert kinds == {"Crash", "Freeze", "Cut", "Break", "Slow", "Storm", "Rot"}


def test_weather_follows_what_is_in_force():
    weather = Weather(1, make_faults(0, FLEET, 40.0))
    calm = [weather.frame_delay_s(A, B) for _ in range(100)]
    assert max(calm) <= 0.0005
    assert weather.flipped_byte(100) is None
    assert not weather.copy_lost()
    slow, cut = Slow(0.0, A, 2.0, 1.0), Cut(0.0, A, C, 1.0)
    storm = Storm(0.0, 1.0, corrupt_share=1.0, lost_share=1.0, late_share=1.0, late_s=8.0)
    for fault in (slow, cut, storm):
        weather.begin(fault)
    assert max(weather.frame_delay_s(B, A) for _ in range(100)) > 0.5
    assert max(weather.frame_delay_s(B, C) for _ in range(100)) <= 0.0005
    assert weather.cut_s(A, C, 0.25) == 0.75
    assert weather.cut_s(C, A, 0.25) == 0.75
    assert weather.cut_s(A, B, 0.25) == 0.0
    assert weather.cut_s(A, C, 1.1) == 0.0
    assert weather.copy_lost()
    assert weather.flipped_byte(10) in range(10)
    assert max(weather.copy_delay_s(B, C) for _ in range(100)) > 1.0
    weather.end(cut)
    assert weather.cut_s(A, C, 0.25) == 0.0
    weather.heal()
    assert max(weather.copy_delay_s(A, C) for _ in range(100)) <= 0.0005
    assert not weather.copy_lost()

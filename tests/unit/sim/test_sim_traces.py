"""Simulated traces: the same for the same seed, within their limits, and unruly enough to be worth it."""

import pytest

from sim.traces import Mix, context_max, make_traces

MIX = Mix()


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_gives_the_same_traces(seed):
    assert make_traces(seed, MIX, 256) == make_traces(seed, MIX, 256)
    assert make_traces(seed, MIX, 256) != make_traces(seed + 1, MIX, 256)


@pytest.mark.parametrize("seed", range(20))
def test_traces_keep_within_the_mix(seed):
    plans = make_traces(seed, MIX, 256)
    assert len(plans) == MIX.traces
    by_name = {plan.trace: plan for plan in plans}
    assert len(by_name) == len(plans)
    for plan in plans:
        assert MIX.steps_min <= len(plan.steps) <= MIX.steps_max
        longest = sum(len(step.new_tokens) + step.sampling.max_tokens for step in plan.steps)
        if plan.fork_of is not None:
            parent = by_name[plan.fork_of]
            assert parent.fork_of is None
            assert plan.fork_step < len(parent.steps)
            assert plan.salt == parent.salt
            longest += sum(len(step.new_tokens) + step.sampling.max_tokens for step in parent.steps)
        assert longest <= context_max(MIX)
        for step in plan.steps:
            assert step.new_tokens
            assert step.hang_up_after is None or step.hang_up_after < step.sampling.max_tokens


def test_every_kind_of_behaviour_occurs():
    plans = [plan for seed in range(10) for plan in make_traces(seed, MIX, 256)]
    steps = [step for plan in plans for step in plan.steps]
    assert any(plan.fork_of is not None for plan in plans)
    assert len({plan.salt for plan in plans}) == MIX.tenants
    assert any(step.hang_up_after == 0 for step in steps)
    assert any(step.hang_up_after for step in steps)
    assert any(step.think_s == 30.0 for step in steps)
    assert {step.sampling.temperature for step in steps} == {0.0, 1.0}

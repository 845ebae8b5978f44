"""What other numbers of workers would do: what must hold whatever the figures, and cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.adapt.model import Demand, Pace, Roles, expected, in_time

CALM = Demand(
    rate=1.0, step_s=1.0, gap_s=0.0, prompt_s=0.0, output=100, iteration_s=0.01, sequence_share=0.0, places=1e6
)

demands = st.builds(
    Demand,
    rate=st.floats(0.1, 50),
    step_s=st.floats(0.05, 30),
    gap_s=st.floats(0, 20),
    prompt_s=st.floats(0, 5),
    output=st.floats(1, 2000),
    iteration_s=st.floats(1e-3, 0.1),
    sequence_share=st.floats(0, 0.4),
    places=st.floats(1, 256),
)


def test_what_waits_for_nothing_takes_what_it_takes() -> None:
    found = expected(CALM, Roles(1, 1))
    assert found.step_s == pytest.approx(1.0, rel=1e-3)
    assert found.rate == pytest.approx(1.0, rel=1e-3)
    slower = expected(CALM._replace(gap_s=3.0), Roles(1, 1))
    assert slower.rate == pytest.approx(1.0, rel=1e-3), "pauses are no work"


def test_where_decoding_is_what_takes_long_decode_workers_help_and_prefill_workers_do_not() -> None:
    answers = CALM._replace(rate=4.0, step_s=10.0, output=500, sequence_share=0.2)
    few, more = expected(answers, Roles(6, 2)), expected(answers, Roles(2, 6))
    assert more.rate > 1.5 * few.rate
    assert more.step_s < few.step_s


def test_where_prompts_are_what_takes_long_prefill_workers_make_steps_quicker() -> None:
    prompts = CALM._replace(rate=2.0, step_s=4.0, prompt_s=2.0, output=60)
    few, more = expected(prompts, Roles(1, 7)), expected(prompts, Roles(5, 3))
    assert more.step_s < few.step_s


@given(demands, st.integers(0, 8), st.integers(1, 8))
def test_no_more_ends_than_the_workers_have_time_for(demand: Demand, prefills: int, decodes: int) -> None:
    found = expected(demand, Roles(prefills, decodes))
    assert found.rate >= 0
    assert found.rate * demand.prompt_s <= prefills + decodes + 1e-6
    assert found.rate * (found.step_s + demand.gap_s) <= demand.rate * (demand.step_s + demand.gap_s) * (1 + 1e-6)


@given(demands, st.integers(1, 8), st.integers(1, 8))
def test_a_worker_more_is_never_worse(demand: Demand, prefills: int, decodes: int) -> None:
    now = expected(demand, Roles(prefills, decodes)).rate
    assert expected(demand, Roles(prefills, decodes + 1)).rate >= now * (1 - 1e-6)


def test_deadlines_are_missed_by_those_that_come_close_first() -> None:
    ratios = (0.2, 0.5, 0.9, 1.2)
    assert in_time(ratios, 1.0) == 0.75
    assert in_time(ratios, 1.5) == 0.5
    assert in_time(ratios, 0.5) == 1.0
    assert in_time((), 9.0) == 1.0


@given(st.floats(1e-3, 0.1), st.floats(0, 0.4), st.lists(st.integers(1, 64), min_size=30, max_size=60))
def test_the_pace_of_iterations_is_learned_where_batches_differ(one_s: float, share: float, batches: list[int]) -> None:
    pace = Pace()
    for batch in batches:
        pace.saw(batch, one_s * (1 + share * (batch - 1)))
    learned_s, learned = pace.line()
    assert 0 <= learned <= 0.5
    last = batches[-10:]
    if max(last) - min(last) > 30:
        assert learned_s * (1 + learned * 31) == pytest.approx(one_s * (1 + share * 31), rel=0.25)

"""Whose a worker's time is."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracehaul.engine.base import SequenceId
from tracehaul.wire.cluster import Rates
from tracehaul.wire.ids import BlockHash, StepId, TraceId
from tracehaul.wire.spent import Allowance, Charge, Reading, Spent
from tracehaul.wire.steps import DecodeStep, PrefillStep, Sampling
from worker.meter import KEPT_S, RESTED_S, TOLD_S, TRACES_MAX, UNTOLD_S, Account, Meter

FLAT = Rates(token_s=1.0, pair_s=0.0, decode_s=1.0, pull_token_s=0.0)
"""Every token costs the same."""
STEEP = Rates(token_s=1.0, pair_s=1.0, decode_s=1.0, pull_token_s=0.0)


def account(known: int = 0, prompt: int = 100) -> Account:
    made = Account(1, "", TraceId("t"), StepId("s"))
    made.known_tokens, made.prompt_tokens = known, prompt
    return made


def asked(step: str, known: int, prompt: int, emitted: int = 0) -> DecodeStep:
    """A step whose first tokens are known."""
    request = DecodeStep(
        StepId(step), TraceId("a"), BlockHash(b""), bytes(4 * prompt), bytes(4 * emitted), "x", None, None,
        Sampling(max_tokens=9), TraceId("a"), known_tokens=known,
    )  # fmt: skip
    return request


def seconds(one: Account) -> tuple[float, float, float]:
    return one.prefill_s, one.recompute_s, one.decode_s


@pytest.mark.parametrize(
    ("known", "start", "end", "expected"),
    [
        (0, 0, 10, (10.0, 0.0, 0.0)),
        (4, 0, 10, (6.0, 4.0, 0.0)),
        (40, 0, 10, (0.0, 10.0, 0.0)),
        (0, 100, 101, (0.0, 0.0, 1.0)),
        (0, 98, 101, (2.0, 0.0, 1.0)),  # a moved step: what it has said is output
        (103, 98, 105, (0.0, 5.0, 2.0)),  # whose output was computed before
    ],
)
def test_time_is_for_what_its_tokens_are(
    known: int, start: int, end: int, expected: tuple[float, float, float]
) -> None:
    one = account(known)
    one.computed(start, end, float(end - start), FLAT)
    assert seconds(one) == pytest.approx(expected)


def test_what_a_step_computes_twice_is_recompute() -> None:
    one = account()
    one.computed(0, 50, 50.0, FLAT)
    one.computed(20, 60, 40.0, FLAT)  # it was suspended, and 20 tokens came back
    assert seconds(one) == pytest.approx((60.0, 30.0, 0.0))


def test_later_tokens_of_a_prompt_cost_more_where_attention_does() -> None:
    one = account(known=10)
    one.computed(0, 20, 220.0, STEEP)  # 20 + 400 / 2
    assert seconds(one) == pytest.approx((160.0, 60.0, 0.0))


Work = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 600)), min_size=1, max_size=8)


@given(st.lists(st.tuples(Work, st.floats(1e-6, 10.0)), max_size=8))
def test_shares_add_up_to_the_time_of_all_iterations(iterations: list[tuple[list[tuple[int, int]], float]]) -> None:
    meter, accounts = Meter(), list[Account]()
    for at, (work, took_s) in enumerate(iterations):
        shared = list[tuple[Account | None, int, int]]()
        for before, tokens in work:
            with meter.step(asked("s", before // 2, before)) as one:
                accounts.append(one)
            shared.append((one, before, tokens))
        meter.iterated(shared, took_s, STEEP, float(at))
    total = sum(took_s for _, took_s in iterations)
    assert meter.busy_s == pytest.approx(total)
    assert sum(one.worker_s for one in accounts) == pytest.approx(total)
    assert all(min(seconds(one)) >= -1e-9 for one in accounts)


def test_an_iteration_is_shared_by_what_its_tokens_take() -> None:
    meter = Meter()
    with (
        meter.step(asked("a", 0, 8)) as prompt,
        meter.step(asked("b", 0, 4)) as said,
    ):
        meter.iterated([(prompt, 0, 8), (said, 4, 1), (None, 9, 1)], 5.0, FLAT, 1.0)
    assert seconds(prompt) == pytest.approx((4.0, 0.0, 0.0))
    assert seconds(said) == pytest.approx((0.0, 0.0, 0.5))
    assert meter.busy_s == 5.0


def test_a_limit_is_reached_by_the_iteration_that_goes_over_it() -> None:
    one = account()
    one.limit_s = 5.0
    one.computed(0, 4, 4.0, FLAT)
    assert not one.exhausted
    one.computed(4, 6, 2.0, FLAT)
    assert one.exhausted


def told(meter: Meter, now_s: float) -> dict[str, Spent]:
    return {charge.step or f"({charge.trace})": charge.reading.spent for charge in meter.charges(now_s)}


def test_what_has_changed_is_told_for_a_while_and_of_steps_that_broke_off_for_longer() -> None:
    meter = Meter()
    with meter.step(asked("done", 0, 8)) as done:
        meter.iterated([(done, 0, 8)], 5.0, FLAT, 10.0)
        done.told = True
    with meter.step(asked("broken", 0, 8)) as broken:
        meter.iterated([(broken, 0, 8)], 3.0, FLAT, 10.0)
    with meter.step(asked("runs", 0, 8)) as runs:
        meter.iterated([(runs, 0, 8)], 2.0, FLAT, 10.0)
        every = {"done": Spent(5.0), "broken": Spent(3.0), "runs": Spent(2.0)}
        assert told(meter, 11.0) == told(meter, 11.0) == every
        assert set(told(meter, 11.0 + TOLD_S + 1.0)) == {"broken"}
        meter.iterated([(runs, 8, 1)], 2.0, FLAT, 20.0)
        assert set(told(meter, 21.0)) == {"broken", "runs"}
    assert set(told(meter, 11.0 + UNTOLD_S + 1.0)) == {"runs"}


def test_each_attempt_has_an_account_of_its_own() -> None:
    meter = Meter()
    for _ in range(2):
        with meter.step(asked("s", 0, 8)) as one:
            meter.iterated([(one, 0, 8)], 5.0, FLAT, 1.0)
    readings = [charge.reading for charge in meter.charges(2.0)]
    assert readings == [Reading(2, Spent(5.0)), Reading(3, Spent(5.0))]


def test_what_rests_is_charged_when_it_is_taken_and_now_and_then() -> None:
    meter, trace = Meter(), TraceId("a")
    meter.charges(1000.0)
    meter.rests(SequenceId(1), "x", trace, 100, 1000.0)
    meter.rests(SequenceId(2), "x", trace, 10, 1000.0)
    assert told(meter, 1001.0) == {}
    meter.rested(SequenceId(1), 1004.0)
    assert told(meter, 1004.0) == {"(a)": Spent(resident_byte_s=400.0)}
    later_s = 1000.0 + RESTED_S
    assert told(meter, later_s) == {"(a)": Spent(resident_byte_s=400.0 + 10 * RESTED_S)}
    meter.rested(SequenceId(2), later_s + 1.0)
    assert told(meter, later_s + 1.0) == {"(a)": Spent(resident_byte_s=410.0 + 10 * RESTED_S)}
    meter.check(())


def test_a_worker_is_there_from_when_it_was_asked_first() -> None:
    meter = Meter()
    assert (meter.up_s(7.0), meter.up_s(9.5)) == (0.0, 2.5)


def test_of_a_step_that_goes_on_only_the_last_token_that_was_said_is_new() -> None:
    meter = Meter()
    with meter.step(asked("s", 3, 8, emitted=4)) as goes_on, meter.step(asked("s", 3, 8)) as begins:
        assert (goes_on.known_tokens, goes_on.prompt_tokens) == (11, 8)
        assert (begins.known_tokens, begins.prompt_tokens) == (3, 8)
    prefill = PrefillStep(
        StepId("s"), TraceId("a"), BlockHash(b""), bytes(4 * 12), "x", None, Sampling(max_tokens=9), 4, TraceId("a")
    )
    with meter.step(prefill) as one:
        assert (one.known_tokens, one.prompt_tokens) == (11, 8)


def test_what_a_prefill_worker_spends_is_not_left_for_the_decode_worker_nor_the_other_way_round() -> None:
    one, allowance = account(), Allowance(12.0, prefill_price_s=2.0, decode_price_s=3.0)
    one.allow(allowance, Reading())
    assert (one.limit_s, one.prefill_max_s(allowance, Reading())) == (4.0, 6.0)
    one.decode_s = 1.0
    read = Reading(1, Spent(prefill_s=1.5))
    one.allow(allowance, read)
    assert (one.limit_s, one.prefill_max_s(allowance, read)) == (3.0, 3.0)
    free = Allowance(12.0, 0.0, 0.0)
    other = account()
    other.allow(free, read)
    assert (other.limit_s, other.prefill_max_s(free, read), other.prefill_max_s(None, read)) == (None, None, None)


def works(meter: Meter, trace: str, seconds: float, now_s: float, tenant: str = "acme") -> None:
    """A step of it, from its beginning to its terminal message."""
    request = msgspec.structs.replace(asked(f"step of {trace}", 0, 8), trace=TraceId(trace), tenant=tenant)
    with meter.step(request) as one:
        meter.iterated([(one, 0, 8)], seconds, FLAT, now_s)
        one.told = True


def totals(charges: Sequence[Charge]) -> dict[int, tuple[str, str, float]]:
    return {one.sum.account: (one.trace, one.tenant, one.sum.spent.worker_s) for one in charges}


def test_the_totals_of_one_heartbeat_add_up_to_its_busy_time() -> None:
    meter = Meter()
    for at in range(3):
        works(meter, "a", 1.0, float(at))
    works(meter, "b", 0.5, 3.0)
    with meter.step(asked("runs", 0, 8)) as one:
        meter.iterated([(one, 0, 8)], 2.0, FLAT, 3.5)
        told = meter.charges(4.0)
        one.told = True
    meter.charges(4.5)
    found = totals(told)
    assert sorted(found.values()) == [("a", "", 2.0), ("a", "acme", 3.0), ("b", "acme", 0.5)]
    assert sum(seconds for _, _, seconds in found.values()) == meter.busy_s
    works(meter, "b", 0.25, 5.0)
    assert sorted(totals(meter.charges(20.0)).values()) == [("b", "acme", 0.75)], "in the same account, told or not"


def test_a_router_that_is_joined_is_told_what_others_may_have_taken_with_them() -> None:
    meter = Meter()
    meter.charges(0.0)
    works(meter, "a", 1.0, 1.0)
    meter.charges(2.0)
    later_s = 2.0 + TOLD_S + 1.0
    assert meter.charges(later_s) == ()
    (kept,) = meter.history(later_s)
    assert (kept.step, kept.reading) == ("step of a", Reading())
    assert (kept.sum.spent, kept.began_s) == (Spent(1.0), 0.0)
    meter.charges(later_s)
    works(meter, "b", 1.0, later_s + 1.0)
    assert totals(meter.history(KEPT_S)).keys() == {3, 1}
    meter.history(later_s + KEPT_S + 5.0)
    works(meter, "a", 1.0, later_s + KEPT_S + 6.0)
    again = next(one for one in meter.history(later_s + KEPT_S + 7.0) if one.trace == "a")
    assert (again.sum, again.began_s) == (Reading(5, Spent(1.0)), later_s + KEPT_S + 5.0)


def test_no_more_traces_are_remembered_than_there_may_be() -> None:
    meter = Meter()
    for at in range(TRACES_MAX + 10):
        works(meter, f"t-{at}", 0.125, 1.0)
    meter.charges(2.0)
    assert len(meter.history(3.0 + TOLD_S)) == TRACES_MAX

"""Whose the time of a stock server is."""

import pytest

from engines.adapter.sharing import Sharing
from tracehaul.wire.ids import StepId, TraceId
from worker.meter import Account, Meter


def account(known: int = 0) -> Account:
    made = Account(1, "", TraceId("t"), StepId("s"))
    made.known_tokens, made.prompt_tokens = known, 100
    return made


def seconds(one: Account) -> tuple[float, float, float]:
    return one.prefill_s, one.recompute_s, one.decode_s


def test_requests_share_the_time_in_which_there_are_any() -> None:
    meter = Meter()
    sharing, one, other = Sharing(meter), account(), account()
    sharing.settle(10.0)
    sharing.begins(one, 12.0)
    sharing.begins(other, 14.0)
    sharing.said(one, 0, 16.0)
    sharing.ends(one, 20.0)
    sharing.said(other, 0, 21.0)
    sharing.said(other, 0, 22.0)
    sharing.ends(other, 23.0)
    sharing.settle(30.0)
    assert seconds(one) == (3.0, 0.0, 2.0)
    assert seconds(other) == (4.0, 0.0, 2.0)
    assert meter.busy_s == one.worker_s + other.worker_s == 11.0


@pytest.mark.parametrize(
    ("known", "cached", "again_s"),
    [(0, 0, 0.0), (50, 0, 4.0), (50, 20, 3.0), (50, 60, 0.0), (500, 20, 8.0), (0, 100, 0.0)],
)
def test_what_was_known_and_not_cached_is_recompute(known: int, cached: int, again_s: float) -> None:
    sharing, one = Sharing(Meter()), account(known)
    sharing.begins(one, 0.0)
    sharing.said(one, cached, 8.0)
    assert seconds(one) == pytest.approx((8.0 - again_s, again_s, 0.0))

"""What each key may use: events and times in, decisions out."""

import pytest

from router.http.limiter import Limiter, Quota, Refused, Standing, Standings

KEY = "key"


def test_requests_come_back_steadily() -> None:
    limiter, quota = Limiter(), Quota(requests_per_minute=60)
    assert [limiter.begin(KEY, quota, 0.0) for _ in range(60)] == [None] * 60
    assert limiter.begin(KEY, quota, 0.0) == Refused("60 requests per minute", 1.0)
    assert limiter.begin(KEY, quota, 0.75) == Refused("60 requests per minute", 0.25)
    assert limiter.begin(KEY, quota, 1.0) is None
    assert limiter.begin(KEY, quota, 1.0) == Refused("60 requests per minute", 1.0)
    # What was refused was not counted, and no more comes back than there was.
    assert [limiter.begin(KEY, quota, 1000.0) for _ in range(61)] == [None] * 60 + [
        Refused("60 requests per minute", 1.0)
    ]


def test_tokens_may_be_overdrawn_and_are_paid_back() -> None:
    limiter, quota = Limiter(), Quota(tokens_per_minute=600)
    assert limiter.begin(KEY, quota, 0.0) is None
    limiter.spend(KEY, quota, 500, 0.0)
    assert limiter.begin(KEY, quota, 0.0) is None
    limiter.spend(KEY, quota, 400, 0.0)
    refused = limiter.begin(KEY, quota, 0.0)
    assert isinstance(refused, Refused)
    assert refused.what == "600 tokens per minute"
    assert refused.retry_after_s == pytest.approx(30.1)
    assert limiter.begin(KEY, quota, 30.0) is not None
    assert limiter.begin(KEY, quota, 30.11) is None


def test_calls_at_once() -> None:
    limiter, quota = Limiter(), Quota(concurrency=2)
    assert [limiter.begin(KEY, quota, 0.0) for _ in range(3)] == [None, None, Refused("2 requests at once", 1.0)]
    limiter.end(KEY)
    assert limiter.begin(KEY, quota, 0.0) is None
    assert limiter.begin("another", quota, 0.0) is None


def test_what_is_left() -> None:
    limiter, quota = Limiter(), Quota(10, 600, 1)
    assert limiter.begin(KEY, quota, 0.0) is None
    limiter.spend(KEY, quota, 300, 0.0)
    assert limiter.standings(KEY, quota, 0.0) == Standings(Standing(10, 9, 6.0), Standing(600, 300, 30.0))
    limiter.spend(KEY, quota, 400, 15.0)
    assert limiter.standings(KEY, quota, 15.0) == Standings(Standing(10, 10, 0.0), Standing(600, 50, 55.0))
    assert limiter.standings("another", Quota(), 0.0) == Standings(None, None)


def test_a_refused_call_takes_nothing() -> None:
    limiter, quota = Limiter(), Quota(requests_per_minute=10, concurrency=1)
    assert limiter.begin(KEY, quota, 0.0) is None
    assert limiter.begin(KEY, quota, 0.0) is not None
    assert limiter.standings(KEY, quota, 0.0).requests == Standing(10, 9, 6.0)


def test_keys_that_are_gone_are_forgotten_once_they_do_nothing() -> None:
    limiter, quota = Limiter(), Quota(requests_per_minute=1)
    assert limiter.begin(KEY, quota, 0.0) is None
    limiter.keep(frozenset())
    limiter.end(KEY)
    assert limiter.begin(KEY, quota, 0.0) is not None
    limiter.keep(frozenset())
    assert limiter.begin(KEY, quota, 0.0) is None

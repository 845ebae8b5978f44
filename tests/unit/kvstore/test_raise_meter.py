"""How long blocks take to come up."""

import pytest

from kvstore.tiers.meter import ASSUMED_BLOCK_S, KEEP_BLOCKS, RaiseMeter


def test_nothing_seen_is_what_is_assumed() -> None:
    assert RaiseMeter(2).block_s == [ASSUMED_BLOCK_S] * 2


def test_calls_that_overlap_share_the_time() -> None:
    meter = RaiseMeter(2)
    meter.began(0, 10.0)
    meter.began(0, 11.0)
    meter.ended(0, 4000, 13.0)
    meter.ended(0, 4000, 14.0)
    fast, slow = meter.block_s
    assert fast == pytest.approx(4 / 8000, rel=0.02)
    assert slow == ASSUMED_BLOCK_S
    meter.began(0, 100.0)
    meter.ended(0, 0, 100.0)
    assert meter.block_s[0] == fast, "idle time is not its"


def test_what_failed_costs_time_and_old_figures_fade() -> None:
    meter = RaiseMeter(1)
    meter.began(0, 0.0)
    meter.ended(0, 0, 1.0)
    assert meter.block_s[0] > 0.05
    for n in range(100):
        meter.began(0, n)
        meter.ended(0, KEEP_BLOCKS // 8, n + 0.1)
    assert meter.block_s[0] == pytest.approx(0.1 / (KEEP_BLOCKS // 8), rel=0.02)

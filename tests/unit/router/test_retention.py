"""How long gaps last, and what is done with contexts in them."""

import math

import pytest

from router.policy.gaps import ENOUGH, KINDS_MAX, Gap, Gaps, certain
from router.policy.retention import OCTAVES_HINTED_MAX, OCTAVES_MAX, RetentionConfig, Situation, decide

NOW = Situation(tokens=10_000, reload_s=0.5)
ALL = RetentionConfig()


def test_a_cluster_that_has_seen_nothing_guesses() -> None:
    gaps = Gaps()
    tool, person = gaps.expect("a", ("bash",)), gaps.expect("a", ())
    assert tool.seen == 0
    assert [round(tool.quantile(q), 1) for q in (0.5, 0.89)] == [1.1, 2.0]
    assert 15 < tool.quantile(0.98) < 25
    assert 50 < person.quantile(0.5) < 70
    assert gaps.expect("a", None).quantile(0.5) == tool.quantile(0.5)


def test_own_samples_count_more_and_more_and_then_alone() -> None:
    gaps = Gaps()
    for _ in range(ENOUGH // 2):
        gaps.saw("a", ("bash",), 30.0)
    half = gaps.expect("a", ("bash",))
    assert half.seen == ENOUGH // 2
    assert half.quantile(0.0) < half.quantile(0.5) == 30.0
    for _ in range(ENOUGH // 2):
        gaps.saw("a", ("bash",), 30.0)
    assert gaps.expect("a", ("bash",)).quantile(0.0) == 30.0
    assert gaps.expect("b", ("bash",)).quantile(0.0) == 30.0, "another agent's use of the tool"
    assert gaps.expect("a", ("grep",)).quantile(0.5) == 30.0, "another tool of that agent"
    assert gaps.expect("a", None).quantile(0.5) == 30.0, "what it called is not known"


def test_the_window_slides() -> None:
    gaps = Gaps()
    for seconds in (1.0, 9.0):
        for _ in range(300):
            gaps.saw("a", ("bash",), seconds)
    assert gaps.expect("a", ("bash",)).quantile(0.0) == 9.0


def test_kinds_are_bounded() -> None:
    gaps = Gaps()
    for at in range(KINDS_MAX):
        gaps.saw(str(at), (str(at),), 1.0)
    assert (gaps._used > 0).sum() == KINDS_MAX  # pyright: ignore[reportPrivateUsage]


def test_stores_keep_it_for_the_longest_likely_gap() -> None:
    short = decide(Gap([1.0] * 100, 100), NOW, ALL)
    assert (short.pin_s, short.priority) == (6.0, 2.0)
    long = decide(Gap([1000.0] * 100, 100), NOW, ALL)
    assert long.pin_s == OCTAVES_MAX * 60.0
    assert long.priority == 2.0**OCTAVES_MAX
    assert decide(Gap([1.0], 1), NOW, RetentionConfig(pins=False)).pin_s == 0.0
    assert decide(Gap([99.0], 1), NOW, RetentionConfig(pin_max_s=7.0)).pin_s == 7.0


def test_what_the_client_says_is_believed() -> None:
    told = decide(certain(600.0), NOW, ALL, told_s=900.0)
    assert told.pin_s == 905.0
    assert math.log2(told.priority) * 60 >= told.pin_s
    assert told.recall_s == pytest.approx(600 - 0.5 - 0.2)


def test_what_a_client_marked_is_kept_for_longer_but_not_as_long_as_it_likes() -> None:
    short, long = Gap([1.0] * 100, 100), Gap([1000.0] * 100, 100)
    marked = decide(short, NOW, ALL, keep_s=300.0)
    assert marked.pin_s == 305.0
    assert math.log2(marked.priority) * 60 >= marked.pin_s
    assert decide(short, NOW, ALL, keep_s=3600.0).pin_s == OCTAVES_HINTED_MAX * 60.0
    assert decide(long, NOW, ALL, keep_s=300.0) == decide(long, NOW, ALL)
    assert decide(certain(600.0), NOW, ALL, told_s=900.0, keep_s=3600.0).pin_s == 905.0, "it said when it comes back"
    assert marked.recall_s == decide(short, NOW, ALL).recall_s


def test_it_starts_to_come_back_before_it_is_needed() -> None:
    gap = Gap([float(i) for i in range(1, 101)], 100)
    assert decide(gap, NOW, ALL).recall_s == pytest.approx(41 - 0.5 - 0.1)
    assert decide(certain(0.9), NOW, ALL).recall_s is None, "it would come back as soon as it had left"
    assert decide(gap, NOW, RetentionConfig(recall=False)).recall_s is None

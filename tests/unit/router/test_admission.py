"""Which traces may begin: by memory, in order, and at the time that was told."""

import pytest

from router.policy.admission import RETRY_MAX_S, RETRY_SHARE, Admission, AdmissionConfig, Memory
from router.policy.pace import KNOWN

CONFIG = AdmissionConfig(close_share=0.9, open_share=0.5, half_life_s=10.0, stored_half_life_s=10.0)


def gate(workers: float = 1000.0, stores: float = 0.0, config: AdmissionConfig = CONFIG) -> Admission:
    admission = Admission(config)
    admission.resize(Memory(workers, stores))
    return admission


def begin(admission: Admission, name: str, tokens: float, now_s: float, tenant: str = "") -> float | None:
    refusal = admission.ask(name, now_s, tenant)
    if refusal is None:
        admission.begins(name, tokens, now_s, tenant)
        return None
    return refusal.start_s


def test_traces_begin_until_memory_is_wanted_and_again_when_there_is_room() -> None:
    admission = gate()
    assert [begin(admission, name, 300, 0.0) for name in "abc"] == [None] * 3
    assert admission.wanted(0.0) == pytest.approx(0.9)
    assert begin(admission, "d", 300, 0.0) is None, "no more than the limit was wanted"
    assert begin(admission, "e", 300, 1.0) is not None
    admission.ends("a", 300, 2.0)
    admission.over("a", 2.0)
    admission.over("b", 2.0)
    assert admission.wanted(2.0) == pytest.approx(0.6)
    assert begin(admission, "f", 300, 2.0) is not None, "it opens later than it closes"
    admission.over("c", 3.0)
    assert begin(admission, "f", 300, 5.0) is not None, "one that came before it is due"
    assert begin(admission, "f", 300, 7.0) is None, "but nobody waits for it for long"


def test_a_context_that_nothing_is_done_with_counts_for_less_and_less() -> None:
    admission = gate()
    begin(admission, "a", 800, 0.0)
    admission.ends("a", 900, 5.0)
    assert admission.wanted(5.0) == pytest.approx(0.9)
    assert admission.wanted(15.0) == pytest.approx(0.45)
    admission.begins("a", 950, 25.0)
    assert admission.wanted(25.0) == pytest.approx(0.95), "it reasons: all of it, and once"
    admission.ends("a", 950, 30.0)
    admission.over("a", 2000.0)
    assert admission.wanted(2000.0) == pytest.approx(0.0, abs=1e-9)


def test_an_admitted_traces_later_steps_and_what_it_starts_never_wait() -> None:
    admission = gate()
    begin(admission, "a", 2000, 0.0)
    assert admission.ask("a", 1.0) is None
    admission.begins("a.child", 500, 1.0)
    assert admission.wanted(1.0) == pytest.approx(2.5)
    assert admission.ask("b", 1.0) is not None


def test_memory_of_stores_holds_what_acts() -> None:
    admission = gate(1000.0, 9000.0)
    for number in range(8):
        assert begin(admission, f"{number}", 1000, number * 20.0) is None
        admission.ends(f"{number}", 1000, number * 20.0 + 1)
        assert admission.wanted(number * 20.0 + 2) < 1.3
    assert admission.wanted(1000.0) < 0.01


def test_who_is_refused_has_a_place_and_tenants_take_turns() -> None:
    admission = gate()
    begin(admission, "a", 1000, 0.0, "big")
    for number in range(3):
        assert begin(admission, f"big-{number}", 100, 1.0 + number, "big") is not None
    assert begin(admission, "small", 100, 5.0, "small") is not None
    assert admission.waiting == 4
    first_s = admission.ask("small", 5.0, "small")
    assert first_s is not None
    last_s = admission.ask("big-2", 5.0, "big")
    assert last_s is not None
    assert last_s.start_s > first_s.start_s, "the tenant that has less going is before"


def test_the_time_told_is_that_of_those_before_at_the_pace_of_late() -> None:
    admission = gate()
    begin(admission, "full", 1000, 0.0)
    names = [f"t{number}" for number in range(20)]
    for name in names:
        assert admission.ask(name, 0.0) is not None
    now_s, going = 0.0, "full"
    for name in names[:10]:  # one is let in every four seconds
        now_s += 4.0
        admission.over(going, now_s)
        while begin(admission, name, 1000, now_s) is not None:  # those that are due go first: none of them comes
            now_s += 0.5
        going = name
    told = admission.ask("late", now_s)
    assert told is not None
    assert told.start_s == pytest.approx(admission.waiting * 4.0, rel=0.5)
    assert told.retry_s == min(RETRY_SHARE * told.start_s, RETRY_MAX_S), "before it: memory must not wait"


def busy(admission: Admission, seconds: int) -> None:
    """Four traces of 100 tokens at once for 20 seconds each: where there is memory for 1000 tokens, eight could go."""
    for second in range(seconds):
        if second % 5 == 0:
            begin(admission, f"calm-{second}", 100, float(second))
            admission.over(f"calm-{second - 20}", float(second))


def test_the_first_that_is_refused_is_told_by_how_long_traces_go_and_how_many_can() -> None:
    admission = gate(config=AdmissionConfig())
    busy(admission, 50)
    begun = [admission.ask(f"more-{number}", 50.0) for number in range(16)]
    assert begun == [None] * 16, "nothing is there of them yet"
    for number in range(16):
        admission.begins(f"more-{number}", 100, 50.0)
    told_s = begin(admission, "late", 100, 50.0)
    assert told_s is not None
    most, going = 8, 4 + 16
    assert told_s == pytest.approx((going - most + 1) * 20 / most, rel=0.25)


def test_of_many_that_come_at_once_as_many_begin_as_will_fit_when_they_have_grown() -> None:
    admission = gate(config=AdmissionConfig())
    busy(admission, 100)
    begun = [number for number in range(40) if begin(admission, f"more-{number}", 10, 100.0) is None]
    assert len(begun) == 7, "and four go: they would want 1.1, grown, 0.8 of which counts"
    assert admission.wanted(100.0) == pytest.approx(0.47)


def test_few_traces_say_nothing_of_how_far_others_grow() -> None:
    admission = gate(config=AdmissionConfig())
    for second in range(KNOWN - 1):
        begin(admission, f"large-{second}", 900, float(second))
        admission.over(f"large-{second}", second + 0.9)
    assert [begin(admission, f"small-{number}", 10, 30.0) for number in range(40)] == [None] * 40


def test_without_an_end_that_is_told_what_begins_says_how_fast_that_goes() -> None:
    admission = gate()
    begin(admission, "full", 1000, 0.0)
    admission.ends("full", 1000, 0.0)
    begun, now_s, told_s = 0, 0.0, list[float]()
    while begun < 20:  # a context that nothing is done with wants less: there is room now and then
        now_s += 1.0
        if begin(admission, f"t{begun}", 300, now_s) is None:
            admission.ends(f"t{begun}", 300, now_s)
            begun += 1
        else:
            told = admission.ask("last", now_s)
            told_s += [told.start_s / (admission.waiting or 1)] if told is not None else []
    assert told_s[-1] == pytest.approx(now_s / begun, rel=0.5)


def test_who_never_came_back_does_not_make_the_next_ones_wait() -> None:
    admission = gate()
    begin(admission, "full", 1000, 0.0)
    first_s = begin(admission, "gone", 100, 0.0)
    admission.begins("full", 1000, 3600.0)
    assert begin(admission, "late", 100, 3600.0) == first_s


def test_traces_that_went_long_before_it_began_are_taken_as_they_are() -> None:
    admission = gate()
    for number in range(3):
        since_s = 10.0 - 20_000.0 * number
        assert admission.ask(f"t{number}", 10.0) is None
        admission.begins(f"t{number}", 300, since_s)
        admission.ends(f"t{number}", 300, since_s)
    assert admission.wanted(10.0) == pytest.approx(0.3)


def test_places_are_bounded_and_lapse() -> None:
    admission = gate()
    begin(admission, "full", 10_000, 0.0)
    for number in range(5000):
        assert admission.ask(f"t{number}", 0.0) is not None
    assert admission.waiting <= 4096
    admission.over("full", 1.0)
    assert admission.ask("new", 1e6) is None
    assert admission.waiting == 0


def test_it_can_be_switched_off_and_limits_that_make_no_sense_are_refused() -> None:
    admission = gate(config=AdmissionConfig(enabled=False))
    assert [begin(admission, name, 10_000, 0.0) for name in "abc"] == [None] * 3
    with pytest.raises(ValueError, match="open_share"):
        AdmissionConfig(open_share=0.99, close_share=0.9)

from hypothesis import given
from hypothesis import strategies as st

from tracehaul.engine.base import SequenceId
from tracehaul.wire.hashing import common_prefix, pack_tokens
from tracehaul.wire.ids import TraceId
from worker.residency import Residency, Resident

TRACE, OTHER, THIRD = TraceId("a"), TraceId("b"), TraceId("c")


def resident(sequence: int, tokens: list[int], trace: TraceId = TRACE, salt: str = "") -> Resident:
    return Resident(SequenceId(sequence), trace, salt, pack_tokens(tokens))


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_prefix_equals_the_plain_definition(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(pack_tokens(a), pack_tokens(b)) == expected


def test_a_trace_takes_its_own_sequence_even_where_it_diverged() -> None:
    residency = Residency()
    residency.keep(resident(1, [1, 2, 3, 4]))
    assert residency.take(TRACE, "", pack_tokens([1, 2, 9, 9])) == (resident(1, [1, 2, 3, 4]), 2)
    assert len(residency) == 0


def test_another_trace_takes_a_sequence_only_to_continue_all_of_it() -> None:
    residency = Residency()
    residency.keep(resident(1, [1, 2, 3]))
    assert residency.take(OTHER, "", pack_tokens([1, 2, 9])) is None
    assert residency.take(OTHER, "", pack_tokens([1, 2, 3, 4])) == (resident(1, [1, 2, 3]), 3)


def test_the_longest_shared_prefix_wins_then_the_own_trace_then_recency() -> None:
    residency = Residency()
    residency.keep(resident(1, [1, 2]))
    residency.keep(resident(2, [1, 2, 3], OTHER))
    residency.keep(resident(3, [1, 2, 3]))
    residency.keep(resident(4, [1, 2, 3], OTHER))
    taken = residency.take(TRACE, "", pack_tokens([1, 2, 3, 4]))
    assert taken is not None
    assert taken[0].sequence == 3


def test_salts_never_mix() -> None:
    residency = Residency()
    residency.keep(resident(1, [1, 2], salt="red"))
    assert residency.take(TRACE, "blue", pack_tokens([1, 2, 3])) is None


def test_eviction_takes_the_least_recently_used() -> None:
    residency = Residency()
    residency.keep(resident(1, [1]))
    residency.keep(resident(2, [2]))
    taken = residency.take(TRACE, "", pack_tokens([1, 5]))
    assert taken is not None
    residency.keep(taken[0])
    assert residency.tokens == 2
    assert [residency.evict(0.0) for _ in range(3)] == [resident(2, [2]), resident(1, [1]), None]


def test_what_is_past_its_time_gives_way_first() -> None:
    residency = Residency()
    for one, until_s in ((resident(1, [1]), 10.0), (resident(2, [2], OTHER), 5.0), (resident(3, [3], THIRD), 7.0)):
        residency.keep(one)
        residency.value(one.trace, "", until_s)
    assert residency.evict(4.0, worthless=True) is None
    assert residency.value(OTHER, "", 9.0) == 1
    assert residency.value(OTHER, "red", 0.0) == 0
    assert [residency.evict(8.0), residency.evict(8.0), residency.evict(8.0)] == [
        resident(3, [3], THIRD),
        resident(1, [1]),
        resident(2, [2], OTHER),
    ]


def test_a_recall_takes_its_own_sequence_only_and_an_end_all_of_them() -> None:
    residency = Residency()
    residency.keep(resident(1, [1, 2]))
    residency.keep(resident(2, [1, 2, 3], OTHER))
    residency.keep(resident(3, [1, 9]))
    assert residency.take_own(TRACE, "", pack_tokens([1, 2, 3])) == (resident(1, [1, 2]), 2)
    assert residency.take_own(THIRD, "", pack_tokens([1])) is None
    assert residency.forget(TRACE, "") == [resident(3, [1, 9])]
    assert len(residency) == 1

from hypothesis import given
from hypothesis import strategies as st

from tracehaul.engine.base import SequenceId
from tracehaul.wire.hashing import common_prefix, pack_tokens
from tracehaul.wire.ids import TraceId
from worker.residency import Residency, Resident

TRACE, OTHER = TraceId("a"), TraceId("b")


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
    assert [residency.evict(), residency.evict(), residency.evict()] == [resident(2, [2]), resident(1, [1]), None]

"""What is kept of answers that may be asked for again, without a clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.calls.errors import CallFailed
from router.http.idempotency import (
    ENTRY_BYTES,
    SEGMENT_BYTES,
    Ledger,
    Name,
    Numbers,
    Rest,
    Told,
    fingerprint,
    key_of,
    last_event,
)

NAME: Name = ("", "/v1/x", "k")
GRACE_S, AGE_S = 30.0, 1000.0


class Kept:
    def __init__(self, data: bytes = b"") -> None:
        self.told = Told()
        if data:
            self.told.append(data)


def ledger(bytes_max: int = 1 << 20) -> Ledger[Kept]:
    return Ledger(bytes_max, AGE_S, GRACE_S)


def all_of(told: Told, at: int = 0) -> bytes:
    found = b""
    while data := told.read(at):
        found, at = found + data, at + len(data)
    return found


def test_a_key_is_visible_text_of_some_length() -> None:
    assert key_of(None) is None
    assert key_of("8e03978e-40d5-43dd-bc93-6894a57f9324") is not None
    for bad in ("", "a b", "ä", "x" * 256):
        with pytest.raises(CallFailed, match="Idempotency-Key"):
            key_of(bad)


def test_fingerprints_tell_apart_what_differs_anywhere() -> None:
    calls = [("t", "/a", "k", b"{}"), ("t", "/a", "k", b"{ }"), ("t", "/b", "k", b"{}"), ("t/a", "", "k", b"{}")]
    calls += [("t", "/a", "l", b"{}"), ("u", "/a", "k", b"{}")]
    names = {fingerprint(*call) for call in calls}
    assert len(names) == len(calls)
    assert fingerprint(*calls[0]) in names


def test_another_body_under_the_same_key_is_refused_and_another_tenants_is_another() -> None:
    books = ledger()
    books.begin(NAME, "one", Kept(), 0.0)
    with pytest.raises(CallFailed) as refused:
        books.asked(NAME, "two", 1.0)
    assert (refused.value.cause, refused.value.code) == ("mismatched", "idempotency_key_reused")
    assert books.asked(("other", *NAME[1:]), "two", 1.0) is None
    assert books.asked(NAME, "one", 1.0) is not None


def test_what_runs_is_abandoned_a_grace_after_its_last_reader_left() -> None:
    books = ledger()
    entry = books.begin(NAME, "one", Kept(), 0.0)
    books.read(entry)
    books.read(entry)
    assert books.left(entry, 5.0) is None
    assert not books.abandoned(entry, 1e6)
    assert books.left(entry, 6.0) == 6.0 + GRACE_S
    assert not books.abandoned(entry, 6.0 + GRACE_S - 0.1)
    books.read(entry)
    assert not books.abandoned(entry, 1e6)
    assert books.left(entry, 100.0) == 100.0 + GRACE_S
    assert books.abandoned(entry, 100.0 + GRACE_S)
    books.end(entry)
    assert not books.abandoned(entry, 1e6)


def test_what_has_ended_is_kept_for_its_age_and_what_runs_for_longer() -> None:
    books = ledger()
    done, runs = books.begin(NAME, "one", Kept(), 0.0), books.begin(("", "", "2"), "two", Kept(), 0.0)
    books.end(done)
    assert books.asked(NAME, "one", AGE_S - 1) is done
    assert books.asked(NAME, "one", AGE_S) is None
    assert books.asked(runs.name, "two", AGE_S) is runs
    books.check()


def test_the_oldest_go_where_there_is_no_memory_and_those_that_are_dropped_are_free() -> None:
    books = ledger(3 * ENTRY_BYTES)
    entries = [books.begin(("", "", str(at)), "one", Kept(b"x"), 0.0) for at in range(6)]
    for entry in reversed(entries):
        books.end(entry)
        books.check()
    assert [books.asked(entry.name, "one", 1.0) is not None for entry in entries] == [True, True, *[False] * 4]
    for entry in entries:
        books.drop(entry)
    assert (len(books), books.nbytes) == (0, 0)


def test_a_trace_that_is_deleted_takes_its_answers_along() -> None:
    books = ledger()
    for at, trace in enumerate(("a", "b", "a")):
        entry = books.begin(("", "", str(at)), "one", Kept(b"x"), 0.0)
        entry.trace = ("", trace)
        books.end(entry)
    books.forget(("", "a"))
    assert [books.asked(("", "", str(at)), "one", 0.0) is None for at in range(3)] == [True, False, True]
    books.check()


@given(st.lists(st.binary(min_size=1, max_size=SEGMENT_BYTES), max_size=8), st.booleans())
def test_what_was_told_is_read_from_wherever_a_piece_ended(pieces: list[bytes], packed: bool) -> None:
    told = Told()
    ends = [0]
    for piece in pieces:
        told.append(piece)
        ends.append(told.size)
    if packed:
        told.pack()
    whole = b"".join(pieces)
    for at in ends:
        assert all_of(told, at) == whole[at:]


def test_packed_events_take_a_small_part_of_their_bytes() -> None:
    told = Told()
    for at in range(4000):
        told.append(b'id: %d\ndata: {"id":"chatcmpl-1","choices":[{"delta":{"content":"w%d"}}]}\n\n' % (at, at))
    told.pack()
    assert told.nbytes < told.size / 5


# --- streams ----------------------------------------------------------------------------------------------------


def test_ids_count_each_choices_events() -> None:
    numbers = Numbers(2)
    first = numbers.numbered(0, b"data: a\n\nevent: x\ndata: b\n\n")
    assert first == b"id: 1.0\ndata: a\n\nid: 2.0\nevent: x\ndata: b\n\n"
    assert numbers.numbered(1, b"data: c\n\n") == b"id: 2.1\ndata: c\n\n"
    assert numbers.numbered(1, b"") == b""


def test_ids_that_are_none_are_refused() -> None:
    assert last_event("12.0.3") == [12, 0, 3]
    for bad in ("", "a", "1.", "-1", "1 ", "1" * 10):
        with pytest.raises(CallFailed, match="Last-Event-ID"):
            last_event(bad)
    with pytest.raises(CallFailed, match="Last-Event-ID"):
        Rest([1, 2]).of(b"id: 3\ndata: x\n\n")
    rest = Rest([3])
    rest.of(b"id: 1\ndata: x\n\n")
    with pytest.raises(CallFailed, match="Last-Event-ID"):
        rest.over()


def orders(choices: int) -> st.SearchStrategy[list[int]]:
    """Whose event comes when: of each choice five."""
    return st.permutations([choice for choice in range(choices) for _ in range(5)])


def told_in(order: list[int]) -> list[tuple[bytes, bytes]]:
    """Each event's id and the whole of it, in that order."""
    numbers, counts, found = Numbers(max(order) + 1), [0] * (max(order) + 1), []
    for choice in order:
        counts[choice] += 1
        event = numbers.numbered(choice, b"data: %d-%d\n\n" % (choice, counts[choice]))
        found.append((event.partition(b"\n")[0][4:], event))
    return found


@given(st.integers(1, 3).flatmap(lambda n: st.lists(orders(n), min_size=2, max_size=4)), st.data())
def test_a_stream_that_breaks_however_often_is_whole_in_each_choice(
    tells: list[list[int]], data: st.DataObject
) -> None:
    """Each time it is told anew, in another order; nothing is told twice, and nothing left out."""
    has: list[int] | None = None
    got: list[bytes] = []
    for at, order in enumerate(tells):
        last = at == len(tells) - 1
        rest = None if has is None else Rest(has)
        cut = len(order) if last else data.draw(st.integers(0, len(order)))
        for _, event in told_in(order):
            shown = event if rest is None else rest.of(event)
            if not shown:
                continue
            if not cut and not last:
                break
            cut -= 1
            head, _, body = shown.partition(b"\n")
            has = last_event(head[4:].decode())
            got.append(body.strip().removeprefix(b"data: "))
    choices = sorted({got_one.split(b"-")[0] for got_one in got})
    for choice in choices:
        assert [one for one in got if one.startswith(choice)] == [b"%b-%d" % (choice, n) for n in range(1, 6)]
    assert len(got) == len(tells[0])

"""The pin journal's format, and what is left of a pin when the clocks are not to be trusted."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.index.pin_records import (
    MAGIC,
    EndEntry,
    KeptPin,
    Moment,
    PinEntry,
    elapsed_s,
    pack_frame,
    pack_hashes,
    pack_journal,
    replay,
    survivors,
)
from tracehaul.wire.blocks import PinKind
from tracehaul.wire.ids import BlockHash, TraceId

HALF_LIFE_S = 10.0
START = Moment("boot-1", 100.0, 5000.0)


def h(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16))


def pin(trace: str = "t", kind: PinKind = "hard", remaining_s: float = 60.0, octaves: float = 3.0) -> PinEntry:
    return PinEntry("acme", TraceId(trace), kind, octaves, remaining_s, START, pack_hashes([h(1), h(2)]))


def later(by_s: float) -> Moment:
    return Moment(START.boot, START.boot_s + by_s, START.wall_s + by_s)


def test_the_last_word_on_a_trace_is_true() -> None:
    again = pin("a", "soft", 30.0)
    frames = [pin("a"), pin("b"), again, EndEntry("acme", TraceId("b")), EndEntry("acme", TraceId("never"))]
    data = MAGIC + b"".join(map(pack_frame, frames))
    assert replay(data) == ([again], True)
    assert replay(b"") == ([], True)
    assert replay(pack_journal([])) == ([], True)


def test_cut_anywhere_a_journal_has_what_was_whole() -> None:
    entries = [pin(name) for name in "abc"]
    data = pack_journal(entries)
    frame = len(pack_frame(entries[0]))
    for end in range(1, len(data)):
        whole = max(0, (end - len(MAGIC)) // frame)
        found = replay(data[:end])
        assert found.pins == entries[:whole]
        assert found.is_whole == (end >= len(MAGIC) and (end - len(MAGIC)) % frame == 0)


@given(st.data())
def test_no_flipped_bit_makes_a_pin(data: st.DataObject) -> None:
    entries = [pin(name) for name in "abc"]
    packed = bytearray(pack_journal(entries))
    bit = data.draw(st.integers(0, 8 * len(packed) - 1))
    packed[bit // 8] ^= 1 << bit % 8
    found = replay(bytes(packed))
    assert found.pins == entries[: len(found.pins)]
    assert not found.is_whole


def test_an_entry_of_another_version_ends_the_reading() -> None:
    import msgspec

    from tracehaul.wire.hashing import checksum

    body = msgspec.msgpack.encode(["note", 1])
    foreign = len(body).to_bytes(4, "little") + checksum(body).to_bytes(8, "little") + body
    assert replay(pack_journal([pin()]) + foreign) == ([pin()], False)


@pytest.mark.parametrize(
    ("then", "now", "passed"),
    [
        (START, later(7.0), 7.0),
        (START, Moment("boot-1", 107.0, 9000.0), 7.0),  # the wall clock was set forward
        (START, Moment("boot-1", 107.0, 10.0), 7.0),  # or back
        (START, Moment("boot-1", 99.0, 5001.0), None),  # nonsense
        (START, Moment("boot-2", 20.0, 5300.0), 300.0),
        (START, Moment("boot-2", 400.0, 5300.0), 400.0),  # the machine alone is up for longer
        (START, Moment("boot-2", 20.0, 4999.0), None),  # set back while it was down
        (Moment("", 1.0, 50.0), Moment("", 90.0, 60.0), 10.0),
        (Moment("", 1.0, 50.0), Moment("", 90.0, 40.0), None),
        (START, Moment("boot-1", nan, 5000.0), None),
    ],
)
def test_the_age_of_an_entry(then: Moment, now: Moment, passed: float | None) -> None:
    assert elapsed_s(then, now) == passed


@given(st.floats(-100, 100), st.floats(-100, 100), st.booleans(), st.floats(0.1, 100))
def test_no_pin_outlives_what_was_granted(boot_s: float, wall_s: float, same: bool, remaining_s: float) -> None:
    now = Moment("boot-1" if same else "boot-2", START.boot_s + boot_s, START.wall_s + wall_s)
    for kept in survivors([pin(remaining_s=remaining_s), pin("s", "soft", remaining_s)], now, HALF_LIFE_S):
        assert 0 < kept.remaining_s <= remaining_s
        assert kept.octaves <= 3.0
        assert not same or abs(kept.remaining_s - (remaining_s - boot_s)) < 1e-6


def test_a_soft_pin_decays_while_its_node_is_down() -> None:
    (kept,) = survivors([pin("s", "soft")], later(20.0), HALF_LIFE_S)
    assert kept == KeptPin(("acme", TraceId("s")), "soft", 1.0, 40.0, (h(1), h(2)))
    assert survivors([pin("s", "soft")], later(30.0), HALF_LIFE_S) == []
    (hard,) = survivors([pin()], later(59.0), HALF_LIFE_S)
    assert (hard.kind, hard.remaining_s) == ("hard", 1.0)
    assert survivors([pin()], later(60.0), HALF_LIFE_S) == []
    assert survivors([pin(remaining_s=inf)], later(nan), HALF_LIFE_S) == []

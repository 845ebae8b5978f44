"""Walking through ranges in pieces of any size."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tracehaul.transfer.cursor import Cursor
from tracehaul.wire.hashing import checksum

DATA = random.Random(1).randbytes(4096)
ranges_of = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 96)), max_size=100)


@given(ranges_of, st.lists(st.integers(1, 300), min_size=1), st.booleans())
def test_every_byte_once_in_order_and_a_sum_per_range(
    ranges: list[tuple[int, int]], steps: list[int], summing: bool
) -> None:
    cursor = Cursor(memoryview(bytearray(DATA)), ranges, summing=summing)
    seen = b""
    turn = 0
    while cursor.left_bytes:
        views = cursor.views(steps[turn % len(steps)])
        moved = b"".join(views)
        assert 0 < len(moved) <= steps[turn % len(steps)]
        taken = max(1, len(moved) - turn % 3)  # a socket takes what it likes
        cursor.advance(taken)
        seen += moved[:taken]
        turn += 1
    assert seen == b"".join([DATA[offset : offset + nbytes] for offset, nbytes in ranges])
    assert cursor.sums == ([checksum(DATA[offset : offset + nbytes]) for offset, nbytes in ranges] if summing else [])

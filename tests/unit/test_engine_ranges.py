"""The range allocator against a set of units."""

from hypothesis import given
from hypothesis import strategies as st

from tracehaul.engine.ranges import RangeAllocator

SIZE = 40


@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "extend"]), st.integers(1, 12), st.integers(0, 50))))
def test_ranges_never_overlap_and_nothing_is_lost(steps: list[tuple[str, int, int]]) -> None:
    ranges, given_out = RangeAllocator(SIZE), list[tuple[int, int]]()
    for what, count, pick in steps:
        used = {unit for start, length in given_out for unit in range(start, start + length)}
        if what == "take":
            start = ranges.allocate(count)
            fits = any(not used & set(range(at, at + count)) for at in range(SIZE - count + 1))
            assert (start is not None) == fits
            if start is not None:
                assert not used & set(range(start, start + count))
                assert start + count <= SIZE
                given_out.append((start, count))
        elif given_out:
            at = pick % len(given_out)
            start, length = given_out[at]
            if what == "drop":
                ranges.release(*given_out.pop(at))
            else:
                wanted = set(range(start + length, start + length + count))
                done = ranges.extend(start, length, count)
                assert done == (not used & wanted and max(wanted) < SIZE)
                given_out[at] = (start, length + count) if done else (start, length)
        ranges.check()
        assert ranges.free == SIZE - sum(length for _, length in given_out)
    for start, length in given_out:
        ranges.release(start, length)
    assert ranges.allocate(SIZE) == 0


def test_the_tightest_piece_is_taken() -> None:
    ranges = RangeAllocator(10)
    starts = [ranges.allocate(count) for count in (3, 1, 2, 1, 3)]
    assert starts == [0, 3, 4, 6, 7]
    ranges.release(0, 3)
    ranges.release(4, 2)
    assert ranges.allocate(2) == 4
    assert ranges.allocate(2) == 0

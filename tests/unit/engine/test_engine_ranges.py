"""Both allocators against a set of blocks."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracehaul.engine.ranges import BlockAllocator, RangeAllocator

SIZE = 40
Steps = list[tuple[str, int, int]]
STEPS = st.lists(st.tuples(st.sampled_from(["take", "drop", "extend"]), st.integers(1, 12), st.integers(0, 50)))


@pytest.mark.parametrize("make", [RangeAllocator, BlockAllocator])
@given(steps=STEPS)
def test_tables_never_overlap_and_nothing_is_lost(
    make: Callable[[int], RangeAllocator | BlockAllocator], steps: Steps
) -> None:
    space, tables = make(SIZE), list[Sequence[int]]()
    contiguous = make is RangeAllocator
    for what, count, pick in steps:
        used = {block for table in tables for block in table}
        if what == "take":
            table = space.allocate(count)
            runs = [set(range(at, at + count)) for at in range(SIZE - count + 1)]
            fits = any(not used & run for run in runs) if contiguous else len(used) + count <= SIZE
            assert (table is not None) == fits
            if table is not None:
                assert not used & set(table)
                assert len(set(table)) == count
                assert set(table) <= set(range(SIZE))
                tables.append(table)
        elif tables:
            at = pick % len(tables)
            before = tables[at]
            if what == "drop":
                space.release(tables.pop(at))
            else:
                after = space.extend(before, count)
                following = set(range(before[-1] + 1, before[-1] + 1 + count))
                fits = (not used & following and max(following) < SIZE) if contiguous else len(used) + count <= SIZE
                assert (after is not None) == fits
                if after is not None:
                    assert list(after[: len(before)]) == list(before)
                    assert len(after) == len(before) + count
                    assert not used & set(after[len(before) :])
                    tables[at] = after
        space.check()
        assert space.free == SIZE - sum(map(len, tables))
    for table in tables:
        space.release(table)
    space.check()
    whole = space.allocate(SIZE)
    assert whole is not None
    assert sorted(whole) == list(range(SIZE))


def test_the_tightest_range_is_taken() -> None:
    ranges = RangeAllocator(10)
    tables = [ranges.allocate(count) for count in (3, 1, 2, 1, 3)]
    assert [table[0] for table in tables if table] == [0, 3, 4, 6, 7]
    ranges.release(range(0, 3))
    ranges.release(range(4, 6))
    assert ranges.allocate(2) == range(4, 6)
    assert ranges.allocate(2) == range(0, 2)

"""Blocks of the KV pool, given to sequences and taken back: pure bookkeeping, in two ways."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol


class Space(Protocol):
    """Gives out blocks ``0 .. size - 1``. What a sequence holds is its **table**: its blocks in order."""

    @property
    def free(self) -> int:
        """Blocks in no table."""
        ...

    def allocate(self, count: int) -> Sequence[int] | None:
        """A table of ``count`` blocks, None if there is no room for it."""
        ...

    def extend(self, table: Sequence[int], extra: int) -> Sequence[int] | None:
        """``table`` with ``extra`` more blocks at its end, in its place; None (and no change) if there are none."""
        ...

    def release(self, table: Sequence[int]) -> None:
        """Give a table's blocks back."""
        ...


class RangeAllocator:
    """Tables are contiguous ranges: best fit, the lowest start first among equals.

    Free ranges are kept sorted, disjoint and never adjacent, so what is free is always in its largest pieces.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        self._size = size
        self._free: list[tuple[int, int]] = [(0, size)]

    @property
    def free(self) -> int:
        return sum(count for _, count in self._free)

    def allocate(self, count: int) -> range | None:
        assert count > 0
        fitting = [(length, start) for start, length in self._free if length >= count]
        if not fitting:
            return None
        length, start = min(fitting)
        self._take(start, length, count)
        return range(start, start + count)

    def extend(self, table: Sequence[int], extra: int) -> range | None:
        assert extra > 0
        start, end = table[0], table[-1] + 1
        at = bisect_left(self._free, (end, 0))
        if at == len(self._free) or self._free[at][0] != end or self._free[at][1] < extra:
            return None
        self._take(*self._free[at], extra)
        return range(start, end + extra)

    def release(self, table: Sequence[int]) -> None:
        start, count = table[0], len(table)
        assert 0 <= start <= start + count <= self._size
        at = bisect_left(self._free, (start, 0))
        if at < len(self._free):
            after_start, after_count = self._free[at]
            assert start + count <= after_start, "released twice"
            if start + count == after_start:
                count += after_count
                del self._free[at]
        if at > 0:
            before_start, before_count = self._free[at - 1]
            assert before_start + before_count <= start, "released twice"
            if before_start + before_count == start:
                start, count = before_start, before_count + count
                del self._free[at - 1]
        insort(self._free, (start, count))

    def check(self) -> None:
        """Assert the invariants."""
        end = -1
        for start, count in self._free:
            assert start > end, "free ranges overlap or touch"
            assert count > 0
            end = start + count
        assert end <= self._size

    def _take(self, start: int, length: int, count: int) -> None:
        """Cut ``count`` off the front of a free piece."""
        at = bisect_left(self._free, (start, length))
        if length == count:
            del self._free[at]
        else:
            self._free[at] = (start + count, length - count)


class BlockAllocator:
    """Tables are any blocks: whatever is free can be given, and growing never moves a sequence.

    Blocks given back last are given out first: they may still be in a cache.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        self._size = size
        self._free = list(reversed(range(size)))

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        assert count > 0
        return self.extend((), count)

    def extend(self, table: Sequence[int], extra: int) -> list[int] | None:
        assert extra > 0
        if extra > len(self._free):
            return None
        return [*table, *(self._free.pop() for _ in range(extra))]

    def release(self, table: Sequence[int]) -> None:
        self._free.extend(reversed(table))
        assert len(self._free) <= self._size, "released twice"

    def check(self) -> None:
        """Assert the invariants."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert all(0 <= block < self._size for block in self._free)

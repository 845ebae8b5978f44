"""Contiguous ranges of a fixed space: pure bookkeeping behind the KV pool."""

from bisect import bisect_left, insort


class RangeAllocator:
    """Gives out ranges ``[start, start + count)`` of ``[0, size)``: best fit, the lowest start first among equals.

    Free ranges are kept sorted, disjoint and never adjacent, so what is free is always in its largest pieces.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        self._size = size
        self._free: list[tuple[int, int]] = [(0, size)]

    @property
    def free(self) -> int:
        """Units in no given range."""
        return sum(count for _, count in self._free)

    def allocate(self, count: int) -> int | None:
        """Start of a new range, None if no free piece is long enough."""
        assert count > 0
        fitting = [(length, start) for start, length in self._free if length >= count]
        if not fitting:
            return None
        length, start = min(fitting)
        self._take(start, length, count)
        return start

    def extend(self, start: int, count: int, extra: int) -> bool:
        """Lengthen the given range by ``extra`` in place; False (and no change) if what follows is not free."""
        assert extra > 0
        at = bisect_left(self._free, (start + count, 0))
        if at == len(self._free) or self._free[at][0] != start + count or self._free[at][1] < extra:
            return False
        self._take(*self._free[at], extra)
        return True

    def release(self, start: int, count: int) -> None:
        """Give a range back; it merges with free neighbours."""
        assert count > 0
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

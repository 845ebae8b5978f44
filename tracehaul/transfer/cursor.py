"""Where a stream of bytes is in a list of ranges of one buffer, with a checksum of each range as it passes."""

from collections.abc import Sequence

from xxhash import xxh3_64

from tracehaul.wire.ids import Checksum

VIEWS_MAX = 64
"""Ranges moved by one system call."""


class Cursor:
    """Goes through ``ranges`` (offset, bytes) of ``buffer`` once, in order."""

    def __init__(self, buffer: memoryview, ranges: Sequence[tuple[int, int]], *, summing: bool) -> None:
        self._buffer = buffer
        self._ranges = ranges
        self._index = 0
        self._at = 0  # in the range
        self._summing = summing
        self._sum = xxh3_64()
        self.left_bytes = sum(nbytes for _, nbytes in ranges)
        self.sums: list[Checksum] = []
        """Of the ranges that are done, if summing."""
        self._skip()

    def views(self, nbytes_max: int) -> list[memoryview]:
        """The next bytes to move, at most so many."""
        views: list[memoryview] = []
        index, at = self._index, self._at
        while nbytes_max > 0 and index < len(self._ranges) and len(views) < VIEWS_MAX:
            offset, nbytes = self._ranges[index]
            take = min(nbytes - at, nbytes_max)
            if take:
                views.append(self._buffer[offset + at : offset + at + take])
            nbytes_max -= take
            index, at = index + 1, 0
        return views

    def advance(self, nbytes: int) -> None:
        """So many of them were moved. What has just passed is still in the core's cache: now is the time to sum it."""
        self.left_bytes -= nbytes
        while nbytes:
            offset, size = self._ranges[self._index]
            take = min(size - self._at, nbytes)
            if self._summing:
                start = offset + self._at
                self._sum.update(self._buffer[start : start + take])
            self._at += take
            nbytes -= take
            self._skip()

    def _skip(self) -> None:
        """Leave the ranges that are done."""
        while self._index < len(self._ranges) and self._at == self._ranges[self._index][1]:
            if self._summing:
                self.sums.append(Checksum(self._sum.intdigest()))
                self._sum = xxh3_64()
            self._index += 1
            self._at = 0

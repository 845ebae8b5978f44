"""Standard output and standard error that never fail: a full disk costs lines of a log, and ends nobody."""

import io
import os
import sys

import msgspec


class OutputStats(msgspec.Struct):
    """Counts of this process's life."""

    lost: int = 0
    """Writes that were lost, whole or in part."""


class Output(io.RawIOBase):
    """Writes to a descriptor what it takes. What it does not is lost, counted, and told when it takes some again."""

    def __init__(self, fd: int, stats: OutputStats) -> None:
        self._fd = fd
        self._stats = stats
        self._untold = 0
        self._torn = False
        """The last line has no end."""

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: "bytes | bytearray | memoryview", /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] - any buffer, as there
        if self._untold or self._torn:
            note = f"{self._untold} writes to this log were lost: it could not be written\n" if self._untold else ""
            if not self._put(("\n" * self._torn + note).encode()):
                return self._lose(data)
            self._untold, self._torn = 0, False
        if not self._put(data):
            return self._lose(data)
        return len(data)

    def _lose(self, data: "bytes | bytearray | memoryview") -> int:
        self._stats.lost += 1
        self._untold += 1
        return len(data)

    def _put(self, data: "bytes | bytearray | memoryview") -> bool:
        """Whether all of it is written."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
                self._torn = bool(left)
        except OSError:
            return False
        return True


def forgiving() -> OutputStats:
    """From here on ``print``, logs and warnings of this process go to :class:`Output`; returns what it counts."""
    stats = OutputStats()
    for name, fd in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        raw = Output(fd, stats)
        encoding = getattr(before, "encoding", None) or "utf-8"
        stream = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)  # pyright: ignore[reportArgumentType] - it takes raw ones
        setattr(sys, name, stream)
    return stats

"""The router's decisions as JSON lines, beside its log: for what happened longer ago than the router remembers."""

import asyncio
from pathlib import Path

import msgspec

from router.traces.decisions import Decision, Entry
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.ids import TraceId

FILE_BYTES_MAX = 16 * 2**20
"""Of one file; the one before it is kept."""
LATE_S = 0.5
"""Lines are written together, at most so long after they were made."""
WAITING_BYTES_MAX = 1 << 16

seldom = Seldom(Log(__name__))


class Line(msgspec.Struct, frozen=True):
    """One decision."""

    at_s: float
    """Unix time."""
    trace: TraceId
    decision: Decision


class DecisionFile:
    """Appends to ``path``, bounded in size. Used within one event loop.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._waiting = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._encode = msgspec.json.Encoder().encode_into

    def write(self, trace: TraceId, entry: Entry) -> None:
        """Append one; a disk that refuses costs it."""
        before = len(self._waiting)
        self._encode(Line(wall_s(), trace, entry.decision), self._waiting, before)
        self._waiting += b"\n"
        if self._size + len(self._waiting) > FILE_BYTES_MAX and self._size + before:
            line = self._waiting[before:]
            del self._waiting[before:]
            self.flush()
            self._rotate()
            self._waiting += line
        if len(self._waiting) >= WAITING_BYTES_MAX:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LATE_S, self.flush)

    def flush(self) -> None:
        """What waits is in the file."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            self._size += self._file.write(self._waiting)
        except OSError as error:
            seldom.warning("decisions could not be written", why=error)
        self._waiting.clear()

    def close(self) -> None:
        """The file is complete."""
        self.flush()
        self._file.close()

    def _rotate(self) -> None:
        try:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            file = self._path.open("ab", buffering=0)
        except OSError as error:
            seldom.warning("decisions go on in a file that is full", why=error)
            return
        self._file.close()
        self._file, self._size = file, 0

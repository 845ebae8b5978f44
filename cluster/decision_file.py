"""The router's decisions as JSON lines, beside its log: for what happened longer ago than the router remembers."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import msgspec

from router.adapt.story import Noted
from router.policy.hindsight import Ended, Priced
from router.traces.decisions import Decision, Entry
from router.traces.decisions import Ended as StepEnded
from router.traces.trace import TraceKey
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.ids import TraceId

FILE_BYTES_MAX = 32 * 2**20
"""Of one file; the one before it is kept."""
LATE_S = 0.5
"""Lines are written together, at most so long after they were made."""
WAITING_BYTES_MAX = 1 << 16
OLD = ".1"
"""Ends the name of the file before."""

seldom = Seldom(Log(__name__))


class Line(msgspec.Struct, frozen=True):
    """One decision."""

    at_s: float
    """Unix time."""
    trace: TraceId
    decision: Decision
    salt: str = ""
    """The trace's tenant's."""


class PricedLine(msgspec.Struct, frozen=True):
    """What a decision was based on, just before it."""

    at_s: float
    trace: TraceId
    decision: Priced
    salt: str = ""


class DecisionFile:
    """Appends to ``path``, bounded in size. Used within one event loop. A disk that refuses costs lines, no more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        """None: it cannot be opened, which is tried again with the next lines."""
        self._size = 0
        self._torn = False
        """The last line has no end."""
        self._waiting = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._encode = msgspec.json.Encoder().encode_into
        self._opened()

    def write(self, key: TraceKey, entry: Entry) -> None:
        """Append one."""
        self._write(Line(wall_s(), key[1], entry.decision, key[0]))

    def write_priced(self, key: TraceKey, priced: Priced) -> None:
        """Append what one was based on."""
        self._write(PricedLine(wall_s(), key[1], priced, key[0]))

    def write_noted(self, noted: Noted) -> None:
        """Append what was changed at a node, or what came of it."""
        self._write(noted)

    def _write(self, said: Line | PricedLine | Noted) -> None:
        before = len(self._waiting)
        self._encode(said, self._waiting, before)
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
            file = self._opened()
            if file is not None:
                self._append(file)
        except OSError as error:
            seldom.warning("decisions could not be written", why=error)
        self._waiting.clear()

    def close(self) -> None:
        """The file is complete."""
        self.flush()
        self._leave()

    def _append(self, file: FileIO) -> None:
        left = memoryview(b"\n" * self._torn + self._waiting)
        while left:
            written = file.write(left)
            self._size += written
            self._torn = written < len(left)
            left = left[written:]

    def _opened(self) -> FileIO | None:
        if self._file is None:
            try:
                self._file = FileIO(self._path, "ab")
                self._size = os.fstat(self._file.fileno()).st_size
            except OSError as error:
                seldom.warning("decisions are not written down", why=error)
        return self._file

    def _leave(self) -> None:
        file, self._file, self._size = self._file, None, 0
        if file is not None:
            with suppress(OSError):
                file.close()

    def _rotate(self) -> None:
        try:
            self._path.replace(self._path.with_name(self._path.name + OLD))
        except OSError as error:
            seldom.warning("decisions go on in a file that is full", why=error)
            return
        self._leave()


def lines_of(path: Path, trace: str, salt: str) -> list[Line]:
    """What was written of a trace, the oldest first, in the file and in the one before it; torn lines are left out.

    Raises:
        OSError: there is no file that can be read.
    """
    found: list[Line] = []
    needle = msgspec.json.encode(trace)
    decode = msgspec.json.Decoder(Line).decode
    for file in _files(path):
        with file.open("rb") as lines:
            for line in lines:
                if needle not in line:
                    continue
                try:
                    read = decode(line)
                except msgspec.DecodeError:
                    continue
                if (read.trace, read.salt) == (trace, salt):
                    found.append(read)
    return found


def noted_of(path: Path, node: str) -> list[Noted]:
    """What was written of changes at a node, the oldest first; as :func:`lines_of`."""
    found: list[Noted] = []
    needle = msgspec.json.encode(node)
    decode = msgspec.json.Decoder(Noted).decode
    for file in _files(path):
        with file.open("rb") as lines:
            for line in lines:
                if needle not in line or b'"what":' not in line:
                    continue
                try:
                    read = decode(line)
                except msgspec.DecodeError:
                    continue
                if read.what.node == node:
                    found.append(read)
    return found


def log_of(path: Path) -> Iterator[tuple[str, Priced | Ended]]:
    """What each decision was based on, and when steps ended, the oldest first, each with its trace's salt; what is
    torn, or of another version, is left out.

    Raises:
        OSError: there is no file that can be read.
    """
    based, decided = msgspec.json.Decoder(PricedLine).decode, msgspec.json.Decoder(Line).decode
    for file in _files(path):
        with file.open("rb") as lines:
            for line in lines:
                try:
                    if b'"decision":{"type":"priced"' in line:
                        read = based(line)
                        yield read.salt, read.decision
                    elif b'"decision":{"type":"ended"' in line:
                        told = decided(line)
                        if isinstance(told.decision, StepEnded):
                            yield told.salt, Ended(told.decision.step, told.decision.output_tokens)
                except msgspec.DecodeError:
                    continue


def _files(path: Path) -> list[Path]:
    """The one before it first; ``path`` alone if there is none."""
    return [file for file in (path.with_name(path.name + OLD), path) if file.exists()] or [path]

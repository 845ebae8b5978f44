"""Pins that survive a node: a journal beside its disk tier.

Every pin and every end of one is appended before it is answered, so a process that is killed at any moment has
forgotten none that it promised. (An end by time needs no entry: a pin's time is in it.) Loss of power may take what
was appended in the last second. A journal that has grown to several times its pins is written anew, to another file
that takes its place as a whole.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from kvstore.index.pin_records import (
    EndEntry,
    KeptPin,
    Moment,
    PinEntry,
    pack_frame,
    pack_journal,
    replay,
    survivors,
)
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload, ThreadOffload
from tracehaul.wire.errors import Unavailable

log = Log(__name__)

REWRITE_BYTES_MIN = 1 << 20
"""A journal shorter than this is not worth writing anew."""
REWRITE_GROWTH = 3
"""Times its length when it was last written anew: what is read at a start is at most so much more than needed."""
FLUSH_S = 1.0
"""What was appended this long ago survives a loss of power."""
PENDING_MAX = 4096
"""Entries that wait to be appended while the device takes others; beyond it, pins are refused."""


class PinFile(Protocol):
    """Bytes that survive the process. Blocking; one call at a time. Everything raises OSError where the device does."""

    def load(self) -> bytes:
        """All of it."""
        ...

    def append(self, data: bytes) -> None:
        """Add to the end. On return a killed process does not undo it; after an error the end may hold a part."""
        ...

    def replace(self, data: bytes) -> None:
        """Hold ``data`` and nothing else: as a whole, or not at all. On return it survives the loss of power."""
        ...

    def flush(self) -> None:
        """On return what was appended survives the loss of power."""
        ...

    def close(self) -> None:
        """Give it up."""
        ...


class JournalStats(msgspec.Struct):
    """Counts since the node's start."""

    recovered: int = 0
    """Pins found at the start and still in force."""
    appended: int = 0
    rewritten: int = 0
    failed: int = 0
    """Entries that the device refused: their callers were told."""


class PinJournal:
    """One node's journal; all of one event loop. Blocks in its constructor for as long as reading takes.

    ``moment`` tells the time by clocks that other lives of the node can compare theirs with.
    """

    def __init__(self, file: PinFile, offload: Offload, moment: Callable[[], Moment]) -> None:
        self._file = file
        self._offload = offload
        self._moment = moment
        data = file.load()
        self._replayed = replay(data)
        if not self._replayed.is_whole:
            log.warning("the end of the pin journal is torn", pins=len(self._replayed.pins))
        self._size = len(data)
        self._rewritten_size = self._size
        self._must_rewrite = not data or not self._replayed.is_whole  # nothing can follow what is torn
        self._pending: list[bytes] = []
        self._written: asyncio.Future[OSError | None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._snapshot: Callable[[], Sequence[PinEntry]] = tuple
        self._unflushed = asyncio.Event()
        self.stats = JournalStats()

    def recover(self, half_life_s: float) -> list[KeptPin]:
        """What is left of the pins of the node's former life. Only before anything is written."""
        kept = survivors(self._replayed.pins, self._moment(), half_life_s)
        self.stats.recovered = len(kept)
        self._replayed = self._replayed._replace(pins=[])
        return kept

    def follow(self, snapshot: Callable[[], Sequence[PinEntry]]) -> None:
        """From now on ``snapshot`` tells all open pins, where the journal is written anew."""
        self._snapshot = snapshot

    def moment(self) -> Moment:
        """Now, as an entry says it."""
        return self._moment()

    async def write(self, entry: PinEntry | EndEntry) -> None:
        """Return when the entry is in the journal. Entries are kept in the order of these calls, whoever is cancelled.

        Raises:
            Unavailable: the device refused, or has too many entries to take: a restart will not know of it.
        """
        if len(self._pending) >= PENDING_MAX:
            self.stats.failed += 1
            self._must_rewrite = True
            raise Unavailable(f"{PENDING_MAX} pins wait to be written down")
        self._pending.append(pack_frame(entry))
        loop = asyncio.get_running_loop()
        if self._written is None:
            self._written = loop.create_future()
        written = self._written
        if self._writing is None:
            self._writing = loop.create_task(self._write(), name="pin journal")
        error = await asyncio.shield(written)
        if error is not None:
            raise Unavailable(f"the pin is in force, but a restart would forget it: {error.strerror}")

    async def run(self) -> None:
        """Let what is appended survive a loss of power too, for as long as the node serves."""
        while True:
            await self._unflushed.wait()
            await asyncio.sleep(FLUSH_S)
            self._unflushed.clear()
            try:
                await self._offload.run(self._file.flush)
            except OSError as error:
                log.warning("the pin journal's device refused a flush", error=error)

    async def aclose(self) -> None:
        """Write what waits, and give up the file."""
        while self._writing is not None:
            await asyncio.wait([self._writing])
        self._offload.close()
        self._file.close()

    async def _write(self) -> None:
        try:
            while self._pending:
                frames, self._pending = self._pending, []
                written, self._written = self._written, None
                assert written is not None
                error: OSError | None = None
                try:
                    await self._write_frames(frames)
                    self.stats.appended += len(frames)
                except OSError as refused:
                    error = refused
                    self._must_rewrite = True  # whatever is there now, nothing can follow it
                    self.stats.failed += len(frames)
                    log.warning("the pin journal's device refused a write", entries=len(frames), error=error)
                except BaseException:
                    written.cancel()  # a bug, or the loop's end: nobody must wait for ever
                    raise
                written.set_result(error)
        finally:
            self._writing = None

    async def _write_frames(self, frames: Sequence[bytes]) -> None:
        grown = self._size + sum(map(len, frames))
        if not self._must_rewrite and grown <= max(REWRITE_BYTES_MIN, REWRITE_GROWTH * self._rewritten_size):
            await self._offload.run(partial(self._file.append, b"".join(frames)))
            self._size = grown
            self._unflushed.set()
            return
        entries = self._snapshot()  # as of now: what the frames say is in it, what comes after them is not
        self._size = self._rewritten_size = await self._offload.run(partial(self._replace, entries))
        self._must_rewrite = False
        self.stats.rewritten += 1

    def _replace(self, entries: Sequence[PinEntry]) -> int:
        """In a thread."""
        data = pack_journal(entries)
        self._file.replace(data)
        return len(data)


class DiskPinFile:
    """The :class:`PinFile` on a file system. The disk tier's lock on the file beside it is also its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = self._open(path, os.O_CREAT)

    def load(self) -> bytes:
        return self._path.read_bytes()

    def append(self, data: bytes) -> None:
        _write(self._fd, data)

    def replace(self, data: bytes) -> None:
        fresh = self._path.with_name(self._path.name + ".new")
        fd = self._open(fresh, os.O_CREAT | os.O_TRUNC)
        try:
            _write(fd, data)
            os.fsync(fd)
            fresh.replace(self._path)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    @staticmethod
    def _open(path: Path, flags: int) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)


def _write(fd: int, data: bytes) -> None:
    put = os.write(fd, data) if data else 0
    if put != len(data):
        raise OSError(errno.ENOSPC, "no space left for all of it")


def moment() -> Moment:
    """Now, by this machine's clocks."""
    return Moment(clock.boot_id(), clock.boot_s(), clock.wall_s())


async def open_journal(path: Path) -> PinJournal:
    """The journal in a file, made if it is not there.

    Raises:
        OSError: it cannot be had.
    """
    offload = ThreadOffload("pins")
    return await offload.run(lambda: PinJournal(DiskPinFile(path), offload, moment))

"""A ledger of two files: lines that were answered, and lines that were not. One process has them at a time.

A line is appended and on the disk before it counts; lines that end while others are being written go together.
"""

import asyncio
import fcntl
import math
import os
from collections.abc import Container, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jobs.leases import Held, Leases, Taken
from jobs.results import BEGIN, Ended, Unasked, ended_by, result
from tracehaul.runtime.durable import sync_folder
from tracehaul.runtime.offload import Offload

READ_BYTES = 1 << 20
TOGETHER = 1000
"""Lines that are ended at once."""


class InUse(Exception):
    """Another process writes the file."""


class _File:
    """One of them: whole lines, up to ``size``."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, InUse."""
        self.path = path
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.size = 0
            self._torn = False
        except OSError as error:
            os.close(self.handle)
            if isinstance(error, BlockingIOError):
                raise InUse(f"another process writes {path}") from None
            raise

    def read(self, index: Mapping[str, int]) -> dict[int, Ended]:
        """Which lines it has, and how each ended. What a killed process wrote half is cut off.

        Raises:
            ForeignFile: it has something else.
        """
        ended: dict[int, Ended] = {}
        with open(os.dup(self.handle), "rb", buffering=READ_BYTES) as file:
            file.seek(0)
            for data in file:
                if not data.endswith(b"\n") and (data.startswith(BEGIN) or BEGIN.startswith(data)):
                    break
                if (found := ended_by(data)) is None or not data.endswith(b"\n"):
                    raise ForeignFile(f"{self.path} has other lines than those of results: choose another file")
                if found.custom_id not in index:
                    shown = found.custom_id[:128]
                    raise ForeignFile(f"{self.path} has a line of another batch, with the custom_id {shown!r}")
                ended[index[found.custom_id]] = found
                self.size += len(data)
        os.ftruncate(self.handle, self.size)
        return ended

    def append(self, data: bytes) -> None:
        """All of it, on the disk; or nothing, and OSError."""
        if self._torn:
            self._cut()
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self.handle, left) :]
            os.fsync(self.handle)
        except OSError:
            self._torn = True
            with suppress(OSError):
                self._cut()
            raise
        self.size += len(data)

    def _cut(self) -> None:
        """Nothing is behind what was told to be written."""
        os.ftruncate(self.handle, self.size)
        self._torn = False


class _Ending(NamedTuple):
    """A line that is to be written."""

    line: int
    fence: int
    ok: bool
    said: bytes
    written: asyncio.Future[OSError | None]


class ForeignFile(Exception):
    """It is no file of this batch's results; says so."""


class Outputs:
    """Implements :class:`jobs.ledger.Ledger`. One path for both: all goes there."""

    def __init__(self, answers: Path, errors: Path, index: Mapping[str, int], offload: Offload) -> None:
        """
        Args:
            answers: where lines go that were answered.
            errors: where the others go.
            index: the batch's lines by their ``custom_id``.
            offload: where it is written; the caller closes it after this.

        Raises:
            OSError, InUse: they cannot be had.
            ForeignFile: they have what is not of this batch.
        """
        self._offload = offload
        self._files: dict[Path, _File] = {}
        try:
            for path in (answers, errors):
                if path not in self._files:
                    self._files[path] = _File(path)
            self._ok, self._failed = self._files[answers], self._files[errors]
            ended: dict[int, Ended] = {}
            for file in self._files.values():
                ended |= file.read(index)
            for folder in {path.parent for path in self._files}:
                sync_folder(folder)
        except BaseException:
            self.close()
            raise
        self._leases = Leases(ended)
        self._waiting: list[_Ending] = []
        self._ending: set[int] = set()
        """Lines that are being written, and may be on the disk already: theirs is to end, whoever told it has gone."""
        self._writing: asyncio.Task[None] | None = None
        self.completed = sum(end.ok for end in ended.values())
        self.failed = len(ended) - self.completed
        self.unasked = sum(end.unasked for end in ended.values())
        """Those among the failed that were closed without having been asked."""

    @property
    def ended(self) -> Container[int]:
        return self._leases.ended

    @property
    def errors_size(self) -> int:
        """Bytes of what was not answered."""
        return self._failed.size

    @property
    def answers_size(self) -> int:
        """Bytes of what was."""
        return self._ok.size

    async def claim(self, line: int, now_s: float, until_s: float) -> Held | Taken:
        return Taken(math.inf) if line in self._ending else self._leases.claim(line, now_s, until_s)

    async def renew(self, line: int, fence: int, until_s: float) -> bool:
        return self._leases.renew(line, fence, until_s)

    async def put_back(self, line: int, fence: int) -> bool:
        return line not in self._ending and self._leases.put_back(line, fence)

    async def end(self, line: int, fence: int, said: bytes, *, ok: bool) -> bool:
        if line in self._ending or not self._leases.renew(line, fence, math.inf):
            return False
        self._ending.add(line)
        written: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Ending(line, fence, ok, said, written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="outputs")
        if (failure := await asyncio.shield(written)) is not None:
            raise failure
        return True

    async def shut(self, batch: str, custom_ids: Mapping[str, int], why: Unasked) -> None:
        """End every line that has not ended, whoever asks it, as one that was not asked. Raises OSError."""
        left = [(line, name) for name, line in custom_ids.items() if line not in self._leases.ended]
        for start in range(0, len(left), TOGETHER):
            await asyncio.gather(*(self._shut(batch, *each, why) for each in left[start : start + TOGETHER]))

    async def _shut(self, batch: str, line: int, custom_id: str, why: Unasked) -> None:
        held = await self.claim(line, math.inf, math.inf)
        if isinstance(held, Held) and await self.end(line, held.fence, result(batch, custom_id, why), ok=False):
            self.unasked += 1

    async def flushed(self) -> None:
        """All that is being ended has been written, or could not be."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,))

    async def _write(self) -> None:
        while self._waiting:
            endings, self._waiting = self._waiting, []
            for file in self._files.values():
                mine = [ending for ending in endings if (self._ok if ending.ok else self._failed) is file]
                if mine:
                    await self._append(file, mine)

    async def _append(self, file: _File, endings: list[_Ending]) -> None:
        failure: OSError | None = None
        try:
            await self._offload.run(partial(file.append, b"".join(ending.said for ending in endings)))
        except OSError as error:
            failure = error
        for ending in endings:
            self._ending.discard(ending.line)
            if failure is None:
                ended = self._leases.end(ending.line, ending.fence)
                assert ended, "nobody else could claim it"
                self.completed += ending.ok
                self.failed += not ending.ok
            ending.written.set_result(failure)

    def close(self) -> None:
        """Let others have the files. After :meth:`flushed`."""
        for file in self._files.values():
            os.close(file.handle)
        self._files.clear()

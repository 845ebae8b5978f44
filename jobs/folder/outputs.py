"""A ledger of two files: lines that were answered, and lines that were not. One process has them at a time."""

import fcntl
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from jobs.outputs import Outputs
from jobs.results import BEGIN, Ended, ended_by
from tracehaul.runtime.durable import sync_folder
from tracehaul.runtime.offload import Offload

READ_BYTES = 1 << 20


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


class ForeignFile(Exception):
    """It is no file of this batch's results; says so."""


class _Files:
    """Implements :class:`jobs.outputs.Sink`."""

    def __init__(self, answers: Path, errors: Path, offload: Offload) -> None:
        """Raises OSError, InUse."""
        self._offload = offload
        self._files: dict[Path, _File] = {}
        try:
            for path in (answers, errors):
                if path not in self._files:
                    self._files[path] = _File(path)
        except BaseException:
            self.close()
            raise
        self._ok, self._failed = self._files[answers], self._files[errors]

    def read(self, index: Mapping[str, int]) -> dict[int, Ended]:
        """As :meth:`_File.read`."""
        ended: dict[int, Ended] = {}
        for file in self._files.values():
            ended |= file.read(index)
        for folder in {path.parent for path in self._files}:
            sync_folder(folder)
        return ended

    async def append(self, lines: Sequence[int], data: bytes, *, ok: bool) -> None:
        await self._offload.run(partial((self._ok if ok else self._failed).append, data))

    def size(self, *, ok: bool) -> int:
        return (self._ok if ok else self._failed).size

    def close(self) -> None:
        for file in self._files.values():
            os.close(file.handle)
        self._files.clear()


def file_outputs(answers: Path, errors: Path, index: Mapping[str, int], offload: Offload) -> Outputs:
    """One path for both: all goes there.

    Args:
        answers: where lines go that were answered.
        errors: where the others go.
        index: the batch's lines by their ``custom_id``.
        offload: where it is written; the caller closes it after this.

    Raises:
        OSError, InUse: they cannot be had.
        ForeignFile: they have what is not of this batch.
    """
    files = _Files(answers, errors, offload)
    try:
        return Outputs(files.read(index), files)
    except BaseException:
        files.close()
        raise

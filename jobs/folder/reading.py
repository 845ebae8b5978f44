"""A batch's file on a disk."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jobs.lines import Call, Checked, Limits, LineError, Reader, Table, call_of
from tracehaul.runtime.offload import Offload

CHUNK_BYTES = 1 << 18


def check_file(path: Path, endpoint: str | None, refuse: Callable[[str], LineError | None], limits: Limits) -> Checked:
    """What it holds; the arguments are those of :class:`jobs.lines.Reader`. Takes a second or two for a large one.

    Raises:
        OSError: it cannot be read.
    """
    reader = Reader(endpoint, refuse, limits)
    with path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK_BYTES):
            reader.feed(data)
    return reader.end()


class FileSource:
    """Implements :class:`jobs.runner.Source`."""

    def __init__(self, path: Path, table: Table, offload: Offload) -> None:
        """Raises OSError."""
        self._table = table
        self._offload = offload
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    async def read(self, line: int) -> Call:
        # Decoded there, where it was checked: how deep a line may be nested depends on the stack.
        return await self._offload.run(partial(self._read, line))

    def _read(self, line: int) -> Call:
        offset, length = self._table.place(line)
        data = os.pread(self._handle, length, offset)
        if len(data) < length:
            raise OSError(f"the batch's file has become shorter: line {line + 1} is not there")
        return call_of(data)

    def close(self) -> None:
        """After the last read."""
        os.close(self._handle)

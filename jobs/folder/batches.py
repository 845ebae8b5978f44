"""Batches in a folder: of each a record, and beside it its input and what its lines were answered.

The input is a second name of the client's file, which may be deleted meanwhile.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from jobs.batch import OVER, Batch
from jobs.files import File
from jobs.folder.batch_records import read_batch, write_batch
from jobs.folder.files import FolderFiles
from jobs.folder.left import moved
from jobs.folder.outputs import ForeignFile, InUse, file_outputs
from jobs.folder.reading import FileSource, check_file
from jobs.keeping import Opened, Unreadable
from jobs.lines import BATCH_LIMITS, Checked, LineError
from jobs.outputs import Outputs
from tracehaul.runtime.offload import Offload

RECORD, INPUT, ANSWERS, ERRORS = ".json", ".input", ".answers", ".errors"


class FolderBatches:
    """Implements :class:`jobs.keeping.BatchStore`. One process has the folder at a time: the one that has the files."""

    def __init__(self, folder: Path, files: FolderFiles, offload: Offload, checking: Offload) -> None:
        """
        Args:
            folder: on the disk of the files.
            files: where inputs come from, and results go.
            offload: where the disk is waited for; the caller closes it.
            checking: where whole files are read, which takes seconds; likewise.

        Raises:
            OSError: the folder cannot be had.
        """
        self._folder = folder
        self._files = files
        self._offload, self._checking = offload, checking
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.found = [batch for path in folder.glob(f"*{RECORD}") if (batch := read_batch(path)) is not None]
        """That were there at the beginning."""
        kept = {path.stem for path in folder.glob(f"*{RECORD}")}  # also what cannot be read now
        kept -= {batch.id for batch in self.found if batch.status in OVER}
        for path in folder.iterdir():
            if path.suffix == ".tmp" or (path.suffix != RECORD and path.stem not in kept):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    async def adopt(self, folder: Path) -> list[Batch]:
        """As :meth:`jobs.folder.files.FolderFiles.adopt`; which these are."""
        paths = await self._offload.run(partial(moved, folder, self._folder, [INPUT, ANSWERS, ERRORS]))
        found = [await self._offload.run(partial(read_batch, path)) for path in paths]
        return [batch for batch in found if batch is not None]

    async def begin(self, batch: Batch, file: File) -> None:
        await self._offload.run(partial(self._begin, batch, self._files.path(file)))

    def _begin(self, batch: Batch, data: Path) -> None:
        kept = self._path(batch, INPUT)
        try:
            os.link(data, kept)
            self._write(batch)
        except OSError:
            kept.unlink(missing_ok=True)
            raise

    async def write(self, batch: Batch) -> None:
        await self._offload.run(partial(self._write, batch))

    async def forget(self, batch: Batch) -> None:
        await self._offload.run(partial(self._path(batch, RECORD).unlink, missing_ok=True))

    async def clean(self, batch: Batch) -> None:
        await self._offload.run(partial(self._clean, batch))

    async def check(self, batch: Batch, refuse: Callable[[str], LineError | None]) -> Checked:
        check = partial(check_file, self._path(batch, INPUT), batch.endpoint, refuse, BATCH_LIMITS)
        try:
            return await self._checking.run(check)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error

    async def open(self, batch: Batch, checked: Checked) -> Opened:
        answers, errors = self._path(batch, ANSWERS), self._path(batch, ERRORS)
        try:
            outputs = await self._checking.run(
                partial(file_outputs, answers, errors, checked.table.index, self._offload)
            )
        except (InUse, ForeignFile) as error:
            raise OSError(str(error)) from error
        try:
            source = FileSource(self._path(batch, INPUT), checked.table, self._offload)
        except OSError:
            outputs.close()
            raise
        return Opened(checked.table, source, outputs)

    async def settle(self, batch: Batch, outputs: Outputs) -> None:
        pass

    async def deliver(self, file: File, batch: Batch, outputs: Outputs, *, ok: bool) -> bool:
        if size := outputs.sink.size(ok=ok):
            path = self._path(batch, ANSWERS if ok else ERRORS)
            await self._files.take(path, msgspec.structs.replace(file, bytes=size))
        return bool(size)

    def _clean(self, batch: Batch) -> None:
        for kind in (INPUT, ANSWERS, ERRORS):
            with suppress(OSError):
                self._path(batch, kind).unlink(missing_ok=True)

    def _path(self, batch: Batch, kind: str) -> Path:
        return self._folder / f"{batch.id}{kind}"

    def _write(self, batch: Batch) -> None:
        write_batch(self._path(batch, RECORD), batch)

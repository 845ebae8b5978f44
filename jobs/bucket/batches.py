"""Batches whose records are rows of their router's, and whose inputs and lines are in a bucket.

Each row has an epoch, one more with each owner: who writes it must know the last one. A router that was believed to be
gone, and is not, so hears that its batches are another's with the first thing it would write.
"""

import errno
from collections.abc import Callable, Collection, Sequence
from functools import partial

import msgspec

from jobs.batch import Batch
from jobs.bucket.files import BucketFiles, verified
from jobs.bucket.objects import DAMAGED, Objects, clear, told
from jobs.bucket.outputs import DamagedSegment, Segments
from jobs.files import File
from jobs.keeping import Lost, Opened, Unreadable
from jobs.lines import BATCH_LIMITS, Call, Checked, LineError, Reader, Table, call_of
from jobs.outputs import Outputs
from records.documents import Document, Documents, Mark, Shelf
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload

log = Log(__name__)

KIND = "batch"
PAGE = 500
INPUT_TRIES = 3
"""So often an input is read before it is believed to be damaged."""


class _Row(msgspec.Struct, frozen=True):
    """What is known of a batch."""

    batch: Batch
    nbytes: int
    digest: str
    """Of its input."""
    segments: tuple[str, ...] | None = None
    """What is delivered, once that is settled."""


class _Mine(msgspec.Struct):
    """One that is this router's."""

    row: _Row
    epoch: int
    live: bool = True
    """Anything of it is in the bucket."""
    begun: bool = True
    """Its row is there."""

    @property
    def tags(self) -> dict[str, str]:
        return {"epoch": str(self.epoch), "live": "1" if self.live else ""}


class Adopted(msgspec.Struct, frozen=True):
    """What changed."""

    found: Sequence[Batch]
    """That are this router's, and were not known here."""
    lost: Sequence[str]
    """That are another's by now."""


class BucketBatches:
    """Implements :class:`jobs.keeping.BatchStore`."""

    def __init__(
        self, documents: Documents, objects: Objects, files: BucketFiles, router: str, checking: Offload
    ) -> None:
        """
        Args:
            documents: of the database; the caller closes them.
            objects: of the bucket.
            files: in the same two.
            router: whose batches these are.
            checking: where what takes seconds is done; the caller closes it.
        """
        self._documents = documents
        self._objects = objects
        self._files = files
        self._shelf = Shelf(KIND, router)
        self._checking = checking
        self._mine: dict[str, _Mine] = {}
        self._all_known = False
        """Also those that are over."""

    # --- whose they are ---------------------------------------------------------------------------------------

    async def adopt(self) -> Adopted:
        """Have what routers left that live no more, and what this one had in former lives. Raises OSError."""
        known = [name for name, mine in self._mine.items() if mine.live and mine.begun]
        with told():
            try:
                names = await self._documents.adopt(self._shelf)
                there = {each.name: each for each in await self._rows({} if not self._all_known else {"live": "1"})}
                for name in set(names) - there.keys():
                    if (document := await self._documents.get(self._shelf, name)) is not None:
                        there[name] = document
            except BaseException:
                self._all_known = False  # some may have come that nobody told of
                raise
        self._all_known = True
        found = [await self._claimed(each) for each in there.values() if each.name not in self._mine]
        lost = [name for name in known if name not in there and name in self._mine and self._mine[name].live]
        for name in lost:
            del self._mine[name]
        return Adopted([batch for batch in found if batch is not None], lost)

    async def held(self, living: Collection[str]) -> str | None:
        """A router that has batches and is neither this one nor one of these. Raises OSError."""
        with told():
            routers = await self._documents.shelves(KIND)
        return next((each for each in routers if each != self._shelf.tenant and each not in living), None)

    async def _rows(self, tags: dict[str, str]) -> Sequence[Document]:
        found: list[Document] = []
        after: Mark | None = None
        while page := await self._documents.list(self._shelf, tags, after, PAGE):
            after = page[-1].mark
            found += page
        return found

    async def _claimed(self, document: Document) -> Batch | None:
        """What that row tells, which is this router's from now on; None: it is not, or cannot be read."""
        try:
            row = msgspec.json.decode(document.body, type=_Row)
        except (msgspec.DecodeError, UnicodeError) as error:
            log.warning("a batch cannot be read: it is left out", batch=document.name, why=error)
            return None
        live = document.tags.get("live") == "1"
        mine = _Mine(row, int(document.tags.get("epoch", 0)) + live, live)
        try:
            with told():
                if live and not await self._documents.swap(self._shelf, self._document(mine), document.tags):
                    return None
        except OSError as error:
            log.warning("a batch is not gone on with yet", batch=document.name, why=error)
            self._all_known = False
            return None
        self._mine[row.batch.id] = mine
        return row.batch

    def _document(self, mine: _Mine) -> Document:
        batch = mine.row.batch
        return Document(batch.id, batch.created_at * 1_000_000, mine.tags, msgspec.json.encode(mine.row))

    def _of(self, batch: Batch) -> _Mine:
        if (mine := self._mine.get(batch.id)) is None:
            raise Lost(batch.id)
        return mine

    async def _change(self, mine: _Mine, row: _Row, *, live: bool = True) -> None:
        """Raises OSError, Lost."""
        changed = _Mine(row, mine.epoch, live)
        with told():
            if not await self._documents.swap(self._shelf, self._document(changed), mine.tags):
                self._mine.pop(row.batch.id, None)
                raise Lost(row.batch.id)
        mine.row, mine.live = row, live

    # --- what they are ----------------------------------------------------------------------------------------

    async def begin(self, batch: Batch, file: File) -> None:
        if (kept := await self._files.row(file.tenant, file.id)) is None:
            raise FileNotFoundError(errno.ENOENT, "its file is gone")
        mine = self._mine[batch.id] = _Mine(_Row(batch, kept.file.bytes, kept.digest), 1, begun=False)
        try:
            with told():
                # The row first: without one nobody would know of an input that is left.
                if not await self._documents.swap(self._shelf, self._document(mine), None):
                    raise Lost(batch.id)
                try:
                    await self._objects.copy(kept.object, _input(batch))
                except BaseException:
                    await self._objects.delete([_input(batch)])
                    await self._documents.delete(self._shelf, [batch.id])
                    raise
        except BaseException:
            # Where its row may be there, it is found again, and fails without its input.
            del self._mine[batch.id]
            raise
        mine.begun = True

    async def write(self, batch: Batch) -> None:
        mine = self._of(batch)
        await self._change(mine, msgspec.structs.replace(mine.row, batch=batch))

    async def forget(self, batch: Batch) -> None:
        with told():
            await clear(self._objects, _folder(batch))  # also what was written late
            await self._documents.delete(self._shelf, [batch.id])
        self._mine.pop(batch.id, None)

    async def clean(self, batch: Batch) -> None:
        mine = self._of(batch)
        with told():
            await clear(self._objects, _folder(batch))
        await self._change(mine, mine.row, live=False)

    # --- their lines ------------------------------------------------------------------------------------------

    async def check(self, batch: Batch, refuse: Callable[[str], LineError | None]) -> Checked:
        row = self._of(batch).row
        for left in reversed(range(INPUT_TRIES)):
            reader = Reader(batch.endpoint, refuse, BATCH_LIMITS)
            try:
                async for data in verified(self._objects, _input(batch), row.nbytes, row.digest):
                    await self._checking.run(partial(reader.feed, data))
                return await self._checking.run(reader.end)
            except FileNotFoundError as error:
                raise Unreadable(error.strerror) from error
            except OSError as error:
                if error.strerror != DAMAGED:
                    raise
                if not left:
                    raise Unreadable(error.strerror) from error
        raise AssertionError

    async def open(self, batch: Batch, checked: Checked) -> Opened:
        if (mine := self._mine.get(batch.id)) is None:
            raise OSError(errno.EIO, "it is another router's")
        table = checked.table
        segments = Segments(self._objects, f"{_folder(batch)}/lines", mine.epoch, table.index, self._checking)
        if mine.row.segments is None:
            outputs = Outputs(await segments.recover(), segments)
        else:
            ended = await segments.settled(mine.row.segments)
            outputs = Outputs(ended, segments, lost=[line for line in range(len(table)) if line not in ended])
        return Opened(table, _BucketInput(self._objects, _input(batch), table, self._checking), outputs)

    async def settle(self, batch: Batch, outputs: Outputs) -> None:
        mine = self._of(batch)
        names = tuple(_segments(outputs).names)
        if mine.row.segments != names:
            await self._change(mine, msgspec.structs.replace(mine.row, segments=names))

    async def deliver(self, file: File, batch: Batch, outputs: Outputs, *, ok: bool) -> bool:
        segments = _segments(outputs)
        if not segments.size(ok=ok):
            return False
        if await self._files.row(file.tenant, file.id) is not None:
            return True
        upload = await self._files.made(file.tenant, file.id, bytes_max=1 << 40)
        try:
            async for data in segments.delivered(ok=ok):
                await upload.write(data)
            await upload.flush()
            await self._files.add(upload, msgspec.structs.replace(file, bytes=upload.size))
        except DamagedSegment as error:
            segments.lose(error.lines)
            outputs.lose(error.lines, ok=ok)
            raise
        finally:
            await upload.aclose()
        return True


class _BucketInput:
    """Implements :class:`jobs.keeping.Input`."""

    def __init__(self, objects: Objects, name: str, table: Table, checking: Offload) -> None:
        self._objects = objects
        self._name = name
        self._table = table
        self._checking = checking

    async def read(self, line: int) -> Call:
        offset, length = self._table.place(line)
        with told():
            data = await self._objects.read(self._name, offset, length)
        try:
            # There, where it was checked: how deep a line may be nested depends on the stack.
            call = await self._checking.run(partial(call_of, data))
        except (msgspec.DecodeError, UnicodeError):
            raise OSError(errno.EIO, DAMAGED) from None
        if self._table.index.get(call.custom_id) != line:
            raise OSError(errno.EIO, DAMAGED)
        return call

    def close(self) -> None:
        pass


def _segments(outputs: Outputs) -> Segments:
    assert isinstance(outputs.sink, Segments)
    return outputs.sink


def _folder(batch: Batch) -> str:
    return f"batches/{batch.id}"


def _input(batch: Batch) -> str:
    return f"{_folder(batch)}/input"

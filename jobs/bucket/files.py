"""Files whose bytes are objects, and whose rows are in a database: any router that has both serves them.

A file is there if its row is. Of each object that may have to go there is a row beside, which says when to look: it is
written before the object, so whatever dies in between, none stays that is no file's.
"""

import errno
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import cast

import msgspec
import xxhash

from jobs.bucket.objects import DAMAGED, READ_BYTES, Objects, told
from jobs.bucket.upload import BucketUpload
from jobs.files import Arriving, File, FileLimits, NoRoom, over
from records.documents import Document, Documents, Mark, Shelf
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log

log = Log(__name__)

KIND = "file"
DUE = Shelf("file-due", "")
PAGE = 500
ARRIVES_S = 86_400
"""An object that is no file's after so long is nobody's."""


class _Row(msgspec.Struct, frozen=True):
    """What is known of a file."""

    file: File
    object: str
    digest: str


class _Due(msgspec.Struct, frozen=True):
    """Whose an object is, or was to be."""

    tenant: str
    file: str


class BucketFiles:
    """Implements :class:`jobs.files.Files`, of any number of processes at a time."""

    def __init__(self, documents: Documents, objects: Objects, limits: FileLimits) -> None:
        """Both belong to the caller, who closes them."""
        self.limits = limits
        self._documents = documents
        self._objects = objects

    async def get(self, tenant: str, name: str, now: int) -> File | None:
        row = await self.row(tenant, name)
        return None if row is None or over(row.file, now) else row.file

    async def row(self, tenant: str, name: str) -> _Row | None:
        """All that is known of that file. Raises OSError."""
        with told():
            found = await self._documents.get(Shelf(KIND, tenant), name)
        return None if found is None else _read(found)

    async def list(self, tenant: str, now: int) -> Sequence[File]:
        return [row.file for row in await self._rows(tenant) if not over(row.file, now)]

    async def _rows(self, tenant: str) -> Sequence[_Row]:
        found: list[_Row] = []
        after: Mark | None = None
        with told():
            while page := await self._documents.list(Shelf(KIND, tenant), {}, after, PAGE):
                after = page[-1].mark
                found += [row for each in page if (row := _read(each)) is not None]
        return found

    async def arriving(self, tenant: str, name: str, now: int) -> BucketUpload:
        try:
            return await self.made(tenant, name, self.limits.room(await self.list(tenant, now)))
        except OSError as error:
            raise NoRoom(f"files cannot be kept now: {error.strerror}") from None

    async def made(self, tenant: str, name: str, bytes_max: int) -> BucketUpload:
        """Room for that one, whatever else its tenant has. Raises OSError."""
        place = f"files/{name}.{secrets.token_hex(8)}"
        await self._due(place, _Due(tenant, name), clock.wall_s() + ARRIVES_S)
        return BucketUpload(self._objects, place, bytes_max, self._undo)

    async def keep(self, upload: Arriving, file: File) -> None:
        upload = cast(BucketUpload, upload)  # one of :meth:`arriving`
        await upload.flush()
        try:
            kept = await self.add(upload, file)
        except OSError as error:
            # Nobody knows whether the row is there: until somebody looks, its object is.
            upload.kept = True
            raise NoRoom(f"files cannot be kept now: {error.strerror}") from None
        if not kept:
            raise NoRoom("a file of this name is there already")

    async def add(self, upload: BucketUpload, file: File) -> bool:
        """What arrived is that file from now on; False: there is one of that name already, which is left alone.
        Raises OSError."""
        row = _Row(file, upload.name, upload.digest)
        document = Document(file.id, file.created_at * 1_000_000, {}, msgspec.json.encode(row))
        with told():
            if not await self._documents.swap(Shelf(KIND, file.tenant), document, None):
                return False
        upload.kept = True
        try:
            if file.expires_at is not None:
                await self._due(upload.name, _Due(file.tenant, file.id), file.expires_at)
            else:
                with told():
                    await self._documents.delete(DUE, [upload.name])
        except OSError as error:
            log.debug("when a file is to go is written when it is looked at", file=file.id, why=error)
        return True

    async def _due(self, place: str, due: _Due, at_s: float) -> None:
        with told():
            await self._documents.put(DUE, Document(place, int(at_s * 1e6), {}, msgspec.json.encode(due)))

    async def _undo(self, place: str) -> None:
        try:
            with told():
                await self._objects.delete([place])
                await self._documents.delete(DUE, [place])
        except OSError as error:
            log.warning("an object that is no file's stays for a while", object=place, why=error)

    async def delete(self, file: File) -> None:
        if (row := await self.row(file.tenant, file.id)) is not None:
            await self._gone(row)

    async def _gone(self, row: _Row) -> None:
        """The object goes first: where that cannot be, the file is there still, and can be deleted again."""
        with told():
            await self._objects.delete([row.object])
            await self._documents.delete(Shelf(KIND, row.file.tenant), [row.file.id])
            await self._documents.delete(DUE, [row.object])

    async def erase(self, tenant: str) -> int:
        own = await self._rows(tenant)
        for row in own:
            await self._gone(row)
        return len(own)

    async def sweep(self, now: int) -> None:
        try:
            with told():
                while page := await self._documents.list(DUE, {}, None, PAGE):
                    for each in page:
                        if each.at_us > now * 1_000_000:
                            return
                        await self._look(each.name, msgspec.json.decode(each.body, type=_Due), now)
        except OSError as error:
            log.warning("files whose time is over stay", why=error.strerror)

    async def _look(self, place: str, due: _Due, now: int) -> None:
        found = await self._documents.get(Shelf(KIND, due.tenant), due.file)
        row = None if found is None else _read(found)
        if found is not None and row is None:  # of a newer version, perhaps: not ours to say
            await self._due(place, due, now + ARRIVES_S)
            return
        if row is None or row.object != place:
            await self._objects.delete([place])
        elif over(row.file, now):
            await self._gone(row)
        elif row.file.expires_at is not None:
            await self._due(place, due, row.file.expires_at)
            return
        await self._documents.delete(DUE, [place])

    async def open(self, file: File, start: int = 0) -> AsyncGenerator[bytes]:
        row = await self.row(file.tenant, file.id)
        if row is None:
            raise FileNotFoundError(file.id)
        chunks = verified(self._objects, row.object, row.file.bytes, row.digest)
        try:
            first = await anext(chunks, b"")
        except FileNotFoundError as error:
            raise OSError(errno.EIO, error.strerror) from None  # its row is there: it was not deleted
        return _with(first, chunks, start)

    def close(self) -> None:
        pass


async def verified(objects: Objects, name: str, nbytes: int, digest: str) -> AsyncGenerator[bytes]:
    """The bytes of an object that is so long. The last are told once all are found right. Raises OSError."""
    sum_ = xxhash.xxh3_128()
    held, at = b"", 0
    while at < nbytes:
        with told():
            data = await objects.read(name, at, min(READ_BYTES, nbytes - at))
        if len(data) < min(READ_BYTES, nbytes - at):
            raise OSError(errno.EIO, DAMAGED)
        sum_.update(data)
        at += len(data)
        if held:
            yield held
        held = data
    if sum_.hexdigest() != digest:
        raise OSError(errno.EIO, DAMAGED)
    if held:
        yield held


async def _with(first: bytes, rest: AsyncGenerator[bytes], skip: int) -> AsyncGenerator[bytes]:
    try:
        if first[skip:]:
            yield first[skip:]
        skip -= min(skip, len(first))
        async for chunk in rest:
            if chunk[skip:]:
                yield chunk[skip:]
            skip -= min(skip, len(chunk))
    finally:
        await rest.aclose()


def _read(document: Document) -> _Row | None:
    try:
        return msgspec.json.decode(document.body, type=_Row)
    except (msgspec.DecodeError, UnicodeError) as error:
        log.warning("what is known of a file cannot be read: it is left out", file=document.name, why=error)
        return None

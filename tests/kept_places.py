"""Where files and batches are kept, for suites that all of them pass: a folder, a bucket in memory, a real one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jobs.batches import Batches
from jobs.bucket.batches import BucketBatches
from jobs.bucket.files import DUE, BucketFiles
from jobs.files import FileLimits, Files
from jobs.folder.files import FolderFiles
from kvstore.tiers.fake_objects import MemoryObjects
from kvstore.tiers.objects import ListedObject, ObjectsUnreachable, parse_url
from kvstore.tiers.s3 import S3Objects
from records.base import RecordsLost
from records.database import database_url
from records.documents import Documents
from records.documents_sql import SqlDocuments
from records.fakes import MemoryDocuments
from tests.folder_jobs import folder_batches
from tracehaul.runtime.offload import InlineOffload


class InFolder:
    """A folder of the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @asynccontextmanager
    async def files(self, limits: FileLimits) -> AsyncIterator[Files]:
        files = FolderFiles(self._folder / "files", limits, InlineOffload())
        try:
            yield files
        finally:
            files.close()

    @asynccontextmanager
    async def jobs(self, **more: Any) -> AsyncIterator[tuple[Files, Batches]]:
        async with self.files(FileLimits()) as files:
            assert isinstance(files, FolderFiles)
            yield files, folder_batches(self._folder / "batches", files, InlineOffload(), 2, **more)

    async def left(self) -> list[str]:
        """What takes room there, but for what is known of batches."""
        paths = [path for path in self._folder.glob("*/*") if path.parent.name != "batches" or path.suffix != ".json"]
        return sorted(path.name for path in paths)


class InBucket:
    """Objects, and rows of a database."""

    def __init__(self, documents: Callable[[], Documents], objects: Any, router: str = "a") -> None:
        self.made = documents
        self.objects = objects
        self.router = router

    @asynccontextmanager
    async def files(self, limits: FileLimits) -> AsyncIterator[Files]:
        documents = self.made()
        try:
            yield BucketFiles(documents, self.objects, limits)
        finally:
            await documents.close()

    @asynccontextmanager
    async def jobs(self, **more: Any) -> AsyncIterator[tuple[Files, Batches]]:
        documents = self.made()
        try:
            files = BucketFiles(documents, self.objects, FileLimits())
            store = BucketBatches(documents, self.objects, files, self.router, InlineOffload())
            batches = Batches(store, (), InlineOffload(), 2, **more)
            batches.took((await store.adopt()).found)
            yield files, batches
        finally:
            await documents.close()

    async def left(self) -> list[str]:
        """Objects, and rows that would have some deleted."""
        documents = self.made()
        names = [listed.name async for page in self.objects.pages() for listed in page]
        names += [f"due {each.name}" for each in await documents.list(DUE, {}, None, 100)]
        await documents.close()
        return sorted(names)


def in_memory() -> InBucket:
    """A bucket and a database that outlive what is opened over them."""
    documents = MemoryDocuments()
    return InBucket(lambda: documents, MemoryObjects())


def in_s3(url: str, folder: Path) -> InBucket:
    """A real bucket; rows in a file of SQLite's."""
    bucket, prefix = parse_url(url)
    database = database_url("", folder / "rows.sqlite")
    return InBucket(lambda: SqlDocuments(database, "s", 20.0), S3Objects(bucket, prefix, 30.0))


class Life:
    """A process's: it ends before or after the n-th thing that it asks of others."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.dead = asyncio.Event()
        self._left = at
        self._after = after

    async def ask(self, lost: type[Exception], call: Callable[[], Awaitable[Any]]) -> Any:
        if self.dead.is_set():
            raise lost("dead")
        self._left -= 1
        if self._left < 0 and not self._after:
            self.dead.set()
            raise lost("dead")
        found = await call()
        if self._left < 0:
            self.dead.set()
            raise lost("dead")
        return found


class Mortal:
    """What such a process asks; nothing is answered to one that is dead."""

    def __init__(self, inner: Any, life: Life, lost: type[Exception]) -> None:
        self._inner, self._life, self._lost = inner, life, lost

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._inner, name)
        return lambda *args, **more: self._life.ask(self._lost, partial(real, *args, **more))

    async def close(self) -> None:
        pass

    async def pages(self, under: str | None = None) -> AsyncIterator[Sequence[ListedObject]]:
        for page in [page async for page in self._inner.pages(under)]:
            yield await self._life.ask(self._lost, partial(asyncio.sleep, 0, page))


def mortal(place: InBucket, life: Life) -> InBucket:
    """As a process sees it that will die."""
    return InBucket(
        lambda: Mortal(place.made(), life, RecordsLost), Mortal(place.objects, life, ObjectsUnreachable), place.router
    )

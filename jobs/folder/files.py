"""Files in one folder: of each its bytes and, beside them, what is known of it.

What is known is written last and removed first, each time whole: a file is there if that is, and what a killed process
leaves beside is removed at the next start. So it needs no database, and a folder that was copied is whole.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from jobs.files import Arriving, File, FileLimits, NoRoom, TooLong, over
from jobs.folder.left import moved
from tracehaul.runtime.durable import sync_folder, write_whole
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload

log = Log(__name__)

T = TypeVar("T")

READ_BYTES = 1 << 18
KNOWN, BYTES, ARRIVING = ".json", ".bytes", ".part"


class Upload:
    """Implements :class:`jobs.files.Arriving`."""

    def __init__(self, path: Path, bytes_max: int, offload: Offload) -> None:
        """Raises OSError."""
        self.path = path
        self.size = 0
        self._bytes_max = bytes_max
        self._offload = offload
        self._work: asyncio.Future[None] | None = None
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    async def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._bytes_max:
            raise TooLong(f"a file must not be longer than {self._bytes_max} bytes")
        await self._on_disk(partial(self._write, data))

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._handle, left) :]

    async def flush(self) -> None:
        """All that was written is on the disk. Raises NoRoom."""
        await self._on_disk(partial(os.fsync, self._handle))

    async def _on_disk(self, work: Callable[[], None]) -> None:
        self._work = asyncio.ensure_future(on_disk(self._offload, work))
        await asyncio.shield(self._work)

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """What was not kept is gone."""
        if self._work is None or self._work.done():
            self._end()
        else:  # a thread may write yet: until then the handle's number must become no other file's
            self._work.add_done_callback(self._end)

    def _end(self, work: "asyncio.Future[None] | None" = None) -> None:
        if work is not None and not work.cancelled():
            work.exception()  # nobody waits for it any more
        os.close(self._handle)
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


class FolderFiles:
    """Implements :class:`jobs.files.Files`. One process has the folder at a time."""

    def __init__(self, folder: Path, limits: FileLimits, offload: Offload) -> None:
        """
        Args:
            folder: made if it is not there.
            limits: of what is kept.
            offload: where the disk is waited for; the caller closes it.

        Raises:
            OSError: the folder cannot be had, or another process has it.
        """
        self._folder = folder
        self.limits = limits
        self._offload = offload
        self._files: dict[tuple[str, str], File] = {}
        """By tenant and id, the oldest first."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover()
        except BaseException:
            os.close(self._lock)
            raise

    def _recover(self) -> None:
        folder = self._folder
        found = [file for path in folder.glob(f"*{KNOWN}") if (file := self._read(path)) is not None]
        for file in sorted(found, key=lambda file: (file.created_at, file.id)):
            self._files[file.tenant, file.id] = file
        known = {path.stem for path in folder.glob(f"*{KNOWN}")}  # also what cannot be read now
        for path in folder.iterdir():
            if path.suffix in (ARRIVING, ".tmp") or (path.suffix == BYTES and path.stem not in known):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _read(self, path: Path) -> File | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=File)
        except (OSError, msgspec.DecodeError, UnicodeError) as error:
            log.warning("what is known of a file cannot be read: it is left out", path=path, why=error)
            return None

    async def adopt(self, folder: Path) -> int:
        """What is in that folder, which the caller has locked, is here from now on; how many these are. Raises OSError:
        not all of it."""
        paths = await self._offload.run(partial(moved, folder, self._folder, [BYTES]))
        found = [file for path in paths if (file := await self._offload.run(partial(self._read, path))) is not None]
        all_ = [*self._files.values(), *found]
        self._files = {
            (file.tenant, file.id): file for file in sorted(all_, key=lambda file: (file.created_at, file.id))
        }
        return len(found)

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{name}{kind}"

    async def get(self, tenant: str, name: str, now: int) -> File | None:
        file = self._files.get((tenant, name))
        return None if file is None or over(file, now) else file

    async def list(self, tenant: str, now: int) -> Sequence[File]:
        return [file for file in self._files.values() if file.tenant == tenant and not over(file, now)]

    async def arriving(self, tenant: str, name: str, now: int) -> Upload:
        room = self.limits.room(await self.list(tenant, now))
        try:
            return Upload(self._path(name, ARRIVING), room, self._offload)
        except OSError as error:
            raise _no_room(error) from None

    async def keep(self, upload: Arriving, file: File) -> None:
        upload = cast(Upload, upload)  # one of :meth:`arriving`
        await upload.flush()
        await self.take(upload.path, file)

    async def take(self, path: Path, file: File) -> None:
        """The bytes at ``path``, on the same disk and whole, are that file's from now on, and stay at ``path``, too. A
        second time it changes nothing.

        Raises:
            NoRoom: they cannot be kept.
        """
        if (file.tenant, file.id) not in self._files:
            await on_disk(self._offload, partial(self._take, path, file))
            self._files[file.tenant, file.id] = file

    def _take(self, path: Path, file: File) -> None:
        data = self._path(file.id, BYTES)
        if not data.exists():
            os.link(path, data)
        try:
            sync_folder(self._folder)
            write_whole(self._path(file.id, KNOWN), msgspec.json.encode(file), private=True)
        except OSError:
            with suppress(OSError):
                self._delete(file.id)  # ``path`` still has the bytes
            raise

    async def delete(self, file: File) -> None:
        await self._offload.run(partial(self._delete, file.id))
        self._files.pop((file.tenant, file.id), None)

    async def erase(self, tenant: str) -> int:
        own = [file for file in self._files.values() if file.tenant == tenant]
        for file in own:
            await self.delete(file)
        return len(own)

    def _delete(self, name: str) -> None:
        self._path(name, KNOWN).unlink(missing_ok=True)
        self._path(name, BYTES).unlink(missing_ok=True)

    async def sweep(self, now: int) -> None:
        for file in [file for file in self._files.values() if over(file, now)]:
            try:
                await self.delete(file)
            except OSError as error:
                log.warning("a file whose time is over stays", file=file.id, why=error)

    def path(self, file: File) -> Path:
        """Where its bytes are."""
        return self._path(file.id, BYTES)

    async def open(self, file: File, start: int = 0) -> AsyncGenerator[bytes]:
        source = self.path(file).open("rb", buffering=0)
        source.seek(start)
        return self._chunks(source)

    async def _chunks(self, source: FileIO) -> AsyncGenerator[bytes]:
        with source:
            while data := await self._offload.run(partial(source.read, READ_BYTES)):
                yield data

    def close(self) -> None:
        """Let others have the folder."""
        os.close(self._lock)


async def on_disk(offload: Offload, work: Callable[[], T]) -> T:
    """Do it there. Raises NoRoom where the disk does not take it."""
    try:
        return await offload.run(work)
    except OSError as error:
        raise _no_room(error) from None


def _no_room(error: OSError) -> NoRoom:
    return NoRoom(f"the disk does not take it: {error.strerror or error}")

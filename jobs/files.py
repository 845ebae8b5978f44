"""Files that clients keep here, in one folder: of each its bytes and, beside them, what is known of it.

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
from typing import TypeVar

import msgspec

from jobs.left import moved
from tracehaul.runtime.durable import sync_folder, write_whole
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload

log = Log(__name__)

T = TypeVar("T")

READ_BYTES = 1 << 18
KNOWN, BYTES, ARRIVING = ".json", ".bytes", ".part"


class File(msgspec.Struct, frozen=True):
    """What is known of one. Times are Unix seconds."""

    id: str
    tenant: str
    """Whose it is, who alone sees it."""
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None


class FileLimits(msgspec.Struct, frozen=True):
    """Of all files."""

    file_bytes_max: int = 512 * 2**20
    tenant_bytes_max: int = 64 * 2**30
    files_max: int = 10_000
    """Of each tenant."""


class NoRoom(Exception):
    """A limit is reached, or the disk is full; says which."""


class TooLong(Exception):
    """One file is longer than a file may be."""


class Upload:
    """A file that arrives: :meth:`write` its bytes, then :meth:`keep` or :meth:`give_up`."""

    def __init__(self, path: Path, bytes_max: int, offload: Offload) -> None:
        """Raises OSError."""
        self.path = path
        self.size = 0
        self._bytes_max = bytes_max
        self._offload = offload
        self._work: asyncio.Future[None] | None = None
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    async def write(self, data: bytes) -> None:
        """More of it.

        Raises:
            TooLong, NoRoom: there is no place for more.
        """
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


class Files:
    """All of them. One process has the folder at a time."""

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

    def get(self, tenant: str, name: str, now: int) -> File | None:
        """That file of theirs; None: there is none, or its time is over."""
        file = self._files.get((tenant, name))
        return None if file is None or _over(file, now) else file

    def list(self, tenant: str, now: int) -> Sequence[File]:
        """All of theirs, the oldest first."""
        return [file for file in self._files.values() if file.tenant == tenant and not _over(file, now)]

    def arriving(self, tenant: str, name: str, now: int) -> Upload:
        """Room for one more; close it, whatever happens.

        Raises:
            NoRoom: there is none.
        """
        own = self.list(tenant, now)
        left = self.limits.tenant_bytes_max - sum(file.bytes for file in own)
        if len(own) >= self.limits.files_max:
            raise NoRoom(f"{len(own)} files are kept, which is the most: delete some")
        if left <= 0:
            raise NoRoom(f"files of {self.limits.tenant_bytes_max} bytes are kept, which is the most: delete some")
        try:
            return Upload(self._path(name, ARRIVING), min(left, self.limits.file_bytes_max), self._offload)
        except OSError as error:
            raise _no_room(error) from None

    async def keep(self, upload: Upload, file: File) -> None:
        """What arrived is that file from now on, also after a loss of power.

        Raises:
            NoRoom: it cannot be kept.
        """
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
        """It is gone, for whoever does not read it already. Raises OSError: it cannot be."""
        await self._offload.run(partial(self._delete, file.id))
        self._files.pop((file.tenant, file.id), None)

    async def erase(self, tenant: str) -> int:
        """None of theirs is there any more; how many there were. Raises OSError: some still are."""
        own = [file for file in self._files.values() if file.tenant == tenant]
        for file in own:
            await self.delete(file)
        return len(own)

    def _delete(self, name: str) -> None:
        self._path(name, KNOWN).unlink(missing_ok=True)
        self._path(name, BYTES).unlink(missing_ok=True)

    async def sweep(self, now: int) -> None:
        """Remove those whose time is over."""
        for file in [file for file in self._files.values() if _over(file, now)]:
            try:
                await self.delete(file)
            except OSError as error:
                log.warning("a file whose time is over stays", file=file.id, why=error)

    def path(self, file: File) -> Path:
        """Where its bytes are."""
        return self._path(file.id, BYTES)

    def open(self, file: File) -> AsyncGenerator[bytes]:
        """Its bytes, whatever becomes of the file meanwhile. Raises OSError: they are not there."""
        return self._chunks(self.path(file).open("rb", buffering=0))

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


def _over(file: File, now: int) -> bool:
    return file.expires_at is not None and file.expires_at <= now

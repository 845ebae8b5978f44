"""Files that clients keep here, wherever their bytes are: :class:`Files` has one contract suite."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec


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

    def room(self, own: Sequence[File]) -> int:
        """How long one more may be, beside these of its tenant. Raises NoRoom: there may be none."""
        left = self.tenant_bytes_max - sum(file.bytes for file in own)
        if len(own) >= self.files_max:
            raise NoRoom(f"{len(own)} files are kept, which is the most: delete some")
        if left <= 0:
            raise NoRoom(f"files of {self.tenant_bytes_max} bytes are kept, which is the most: delete some")
        return min(left, self.file_bytes_max)


class NoRoom(Exception):
    """A limit is reached, or what it would be kept in does not take it; says which."""


class TooLong(Exception):
    """One file is longer than a file may be."""


class Arriving(Protocol):
    """A file that arrives: :meth:`write` its bytes, then :meth:`Files.keep` it, and :meth:`aclose` whatever happens."""

    size: int

    async def write(self, data: bytes) -> None:
        """More of it.

        Raises:
            TooLong, NoRoom: there is no place for more.
        """
        ...

    async def aclose(self) -> None:
        """What was not kept is gone."""
        ...


class Files(Protocol):
    """All of them. Everything but where it says otherwise raises OSError, if it cannot be told or done now."""

    limits: FileLimits

    async def get(self, tenant: str, name: str, now: int) -> File | None:
        """That file of theirs; None: there is none, or its time is over."""
        ...

    async def list(self, tenant: str, now: int) -> Sequence[File]:
        """All of theirs, the oldest first."""
        ...

    async def arriving(self, tenant: str, name: str, now: int) -> Arriving:
        """Room for one more; close it, whatever happens.

        Raises:
            NoRoom: there is none.
        """
        ...

    async def keep(self, upload: Arriving, file: File) -> None:
        """What arrived is that file from now on, also after a loss of power.

        Raises:
            NoRoom: it cannot be kept.
        """
        ...

    async def delete(self, file: File) -> None:
        """It is gone, for whoever does not read it already."""
        ...

    async def erase(self, tenant: str) -> int:
        """None of theirs is there any more; how many there were. OSError: some still are."""
        ...

    async def sweep(self, now: int) -> None:
        """Remove those whose time is over; what cannot be now is told in the log, and is later."""
        ...

    async def open(self, file: File, start: int = 0) -> AsyncGenerator[bytes]:
        """Its bytes from there on, whatever becomes of it meanwhile; reading them may raise OSError: not all came then.

        Raises:
            FileNotFoundError: it is not there any more.
        """
        ...

    def close(self) -> None:
        """Let others have them."""
        ...


def over(file: File, now: int) -> bool:
    """Its time is."""
    return file.expires_at is not None and file.expires_at <= now

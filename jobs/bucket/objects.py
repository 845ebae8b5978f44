"""Named bytes in a bucket, as files and batches need them: :class:`Objects`. Names are paths.

No name is ever written twice with other bytes: what comes late hits nothing newer.
"""

import errno
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

from kvstore.tiers.objects import DELETE_MAX, ListedObject, ObjectMissing, ObjectsUnreachable
from records.base import RecordsLost

DAMAGED = "it is damaged: not what was written"
READ_BYTES = 4 << 20
"""At a time."""


class Objects(Protocol):
    """Every call but :meth:`upload` ends in bounded time, retries included.

    Every call raises what :class:`kvstore.tiers.objects.Objects` do; :func:`told` makes errors of the system of that.
    """

    async def put(self, name: str, view: memoryview) -> None:
        """Make the object, as a whole or not at all."""
        ...

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        """As :meth:`put`, in parts; what ``chunks`` raises ends it, and it leaves nothing."""
        ...

    async def read(self, name: str, start: int, nbytes: int) -> bytes:
        """So many bytes from there on; fewer where the object ends."""
        ...

    async def copy(self, source: str, target: str) -> None:
        """Make an object of the bytes of another."""
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """As of the tier's."""
        ...

    def pages(self, under: str | None = None) -> AsyncIterator[Sequence[ListedObject]]:
        """All objects below a name, in parts; each part may raise."""
        ...


@contextmanager
def told() -> Generator[None, None, None]:
    """What goes wrong with objects and rows is an OSError, that says so: FileNotFoundError where one is missing."""
    try:
        yield
    except ObjectMissing:
        raise FileNotFoundError(errno.ENOENT, "it is missing from the bucket") from None
    except ObjectsUnreachable as error:
        raise OSError(errno.EIO, f"the bucket: {error}") from error
    except RecordsLost as error:
        raise OSError(errno.EIO, f"the database: {error}") from error


async def clear(objects: Objects, under: str) -> None:
    """No object below that name is there. Raises as :class:`Objects`."""
    names = [listed.name async for page in objects.pages(under) for listed in page]
    for start in range(0, len(names), DELETE_MAX):
        await objects.delete(names[start : start + DELETE_MAX])

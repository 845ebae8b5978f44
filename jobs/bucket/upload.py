"""A file on its way to a bucket."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import xxhash

from jobs.bucket.objects import Objects, told
from jobs.files import NoRoom, TooLong

PIECE_BYTES = 1 << 20
"""What is handed on at a time."""
STALL_S = 120.0
"""A bucket that takes nothing for so long, retries included, is away."""
GIVE_UP_S = 5.0


class _GivenUp(Exception):
    """The file will not be whole."""


class BucketUpload:
    """Implements :class:`jobs.files.Arriving`. At most four pieces wait here; the rest is what parts are made of."""

    def __init__(self, objects: Objects, name: str, bytes_max: int, undo: Callable[[str], Awaitable[None]]) -> None:
        """``undo``: sees to it that the object of that name is gone."""
        self.name = name
        self.size = 0
        self.kept = False
        """Whether a file has it by now."""
        self._bytes_max = bytes_max
        self._undo = undo
        self._digest = xxhash.xxh3_128()
        self._piece = bytearray()
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=2)
        self._given_up = asyncio.Event()
        self._work = asyncio.create_task(self._upload(objects), name=f"upload {name}")

    @property
    def digest(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()

    async def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._bytes_max:
            raise TooLong(f"a file must not be longer than {self._bytes_max} bytes")
        self._digest.update(data)
        self._piece += data
        if len(self._piece) >= PIECE_BYTES:
            piece, self._piece = bytes(self._piece), bytearray()
            await self._hand(piece)

    async def flush(self) -> None:
        """All that was written is one object. Raises NoRoom."""
        if self._piece:
            await self._hand(bytes(self._piece))
            self._piece.clear()
        await self._hand(None)
        await self._or_ended(None)

    async def _hand(self, piece: bytes | None) -> None:
        if not self._work.done() and not self._pieces.full():
            self._pieces.put_nowait(piece)
            return
        putting = asyncio.create_task(self._pieces.put(piece))
        try:
            await self._or_ended(putting)
        finally:
            putting.cancel()

    async def _or_ended(self, waited: "asyncio.Task[None] | None") -> None:
        """Wait for it, or, with None, for the upload's end; where that fails, NoRoom."""
        both = {self._work} if waited is None else {self._work, waited}
        done, _ = await asyncio.wait(both, timeout=STALL_S, return_when=asyncio.FIRST_COMPLETED)
        if self._work.done():
            try:
                with told():
                    self._work.result()
            except OSError as error:
                raise NoRoom(f"what is uploaded is not kept: {error.strerror or error}") from None
        elif not done:
            raise NoRoom(f"the bucket takes nothing for {STALL_S:.0f} s")

    async def _upload(self, objects: Objects) -> None:
        await objects.upload(self.name, self._chunks())

    async def _chunks(self) -> AsyncGenerator[bytes]:
        ending = asyncio.create_task(self._given_up.wait())
        try:
            while True:
                if self._pieces.empty():
                    getting = asyncio.create_task(self._pieces.get())
                    await asyncio.wait((ending, getting), return_when=asyncio.FIRST_COMPLETED)
                    if ending.done():
                        getting.cancel()
                        raise _GivenUp
                    piece = getting.result()
                else:
                    piece = self._pieces.get_nowait()
                if ending.done():
                    raise _GivenUp
                if piece is None:
                    return
                yield piece
        finally:
            ending.cancel()

    async def aclose(self) -> None:
        self._given_up.set()
        if not self._work.done():
            await asyncio.wait((self._work,), timeout=GIVE_UP_S)
            self._work.cancel()
        if not self._work.cancelled() and self._work.done():
            self._work.exception()  # was told, or is of no interest any more
        if not self.kept:
            await self._undo(self.name)

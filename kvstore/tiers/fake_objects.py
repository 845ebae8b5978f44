"""Objects in memory, for the simulator and for tests: they survive a tier's life, and fail where told to.

What they cannot prove: that a service over a network keeps to what the tier expects of it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from kvstore.tiers.objects import DELETE_MAX, ListedObject, ObjectMissing, ObjectsUnreachable


class MemoryObjects:
    """Objects in a dict."""

    def __init__(self) -> None:
        self.data: dict[str, bytearray] = {}
        self.failing = False
        """Whether every call raises ObjectsUnreachable."""
        self.delay_s = 0.0
        """How long every call takes."""
        self.most = 0
        """The most objects that there ever were."""

    async def put(self, name: str, view: memoryview) -> None:
        await self._try()
        self.data[name] = bytearray(view)
        self.most = max(self.most, len(self.data))

    async def get(self, name: str, size_bytes: int) -> memoryview | None:
        await self._try()
        if name not in self.data:
            raise ObjectMissing(name)
        body = self.data[name]
        return memoryview(bytes(body)) if len(body) == size_bytes else None

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        body = b"".join([chunk async for chunk in chunks])
        await self.put(name, memoryview(body))

    async def read(self, name: str, start: int, nbytes: int) -> bytes:
        await self._try()
        if name not in self.data:
            raise ObjectMissing(name)
        return bytes(self.data[name][start : start + nbytes])

    async def copy(self, source: str, target: str) -> None:
        await self.put(target, memoryview(await self.read(source, 0, len(self.data.get(source, b"")))))

    async def delete(self, names: Sequence[str]) -> None:
        assert 0 < len(names) <= DELETE_MAX
        await self._try()
        for name in names:
            self.data.pop(name, None)

    async def pages(self, under: str | None = None) -> AsyncIterator[Sequence[ListedObject]]:
        await self._try()
        names = sorted(name for name in self.data if under is None or name.startswith(f"{under}/"))
        for start in range(0, len(names), DELETE_MAX):
            await self._try()
            page = names[start : start + DELETE_MAX]  # some of which are gone by now
            yield [ListedObject(name, len(self.data[name])) for name in page if name in self.data]

    async def probe(self) -> None:
        await self._try()

    async def _try(self) -> None:
        await asyncio.sleep(self.delay_s)
        if self.failing:
            raise ObjectsUnreachable("told to fail")

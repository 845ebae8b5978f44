"""Documents whose store is made when it is needed first: what talks to databases takes time to load."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from records.documents import Document, Documents, Mark, Shelf


class LaterDocuments:
    """Implements :class:`records.documents.Documents`. ``make``: makes what does it, once."""

    def __init__(self, make: Callable[[], Awaitable[Documents]]) -> None:
        self._make = make
        self._making = asyncio.Lock()
        self._made: Documents | None = None

    async def put(self, shelf: Shelf, document: Document) -> None:
        await (await self._documents()).put(shelf, document)

    async def get(self, shelf: Shelf, name: str) -> Document | None:
        return await (await self._documents()).get(shelf, name)

    async def list(
        self, shelf: Shelf, tags: Mapping[str, str], after: Mark | None, limit: int, *, newest_first: bool = False
    ) -> Sequence[Document]:
        return await (await self._documents()).list(shelf, tags, after, limit, newest_first=newest_first)

    async def tag(self, shelf: Shelf, name: str, tags: Mapping[str, str]) -> bool:
        return await (await self._documents()).tag(shelf, name, tags)

    async def swap(self, shelf: Shelf, document: Document, before: Mapping[str, str] | None) -> bool:
        return await (await self._documents()).swap(shelf, document, before)

    async def delete(self, shelf: Shelf, names: Sequence[str]) -> int:
        return await (await self._documents()).delete(shelf, names)

    async def adopt(self, shelf: Shelf) -> Sequence[str]:
        return await (await self._documents()).adopt(shelf)

    async def shelves(self, kind: str) -> Sequence[str]:
        return await (await self._documents()).shelves(kind)

    async def trim(self, kind: str, before_us: int, count_max: int, bytes_max: int) -> int:
        return await (await self._documents()).trim(kind, before_us, count_max, bytes_max)

    async def close(self) -> None:
        if self._made is not None:
            await self._made.close()

    async def _documents(self) -> Documents:
        async with self._making:
            if self._made is None:
                self._made = await self._make()
            return self._made

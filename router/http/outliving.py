"""Responses in the background outlive their router: each is written down before its client hears of it, and how it
ended. A router that starts runs again what had not ended. Each router has its own."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from math import inf
from typing import NamedTuple

import msgspec

from records.base import RecordsLost
from records.documents import Document, Documents, Mark, Shelf
from router.dialects.responses.answers import Response
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom

log = Log(__name__)
seldom = Seldom(log, 60.0)

KIND = "background"
KEEP_S = 5.0
"""A client is told of a response that takes longer to be written down all the same: then it does not outlive."""
AGAIN_S = 10.0
ADOPT_S = 2.0
"""So often it is looked what other routers have left."""
STILL_S = 5.0
"""Who stood still for so long may have been taken for gone, and the others may have stood still, too."""
CALM_S = 10.0
"""For so long it takes nothing from them then."""
PAGE = 100
Pair = tuple[str, bytes]
"""An item's id, and the item in JSON."""


class Written(msgspec.Struct, frozen=True):
    """What is known of one."""

    fresh: str
    """Its id without what comes before it."""
    created: int
    """Unix time."""
    tenant: str
    key: str | None
    """The id of the API key that asked for it."""
    headers: Mapping[str, str]
    body: bytes
    """As it was asked."""
    asked: Sequence[Pair]
    """What of it is in question, names of items resolved."""
    before: Sequence[Pair] | None
    """What it goes on from; None: nothing."""
    told: bytes | None = None
    """The response, once it has ended."""


class Running(NamedTuple):
    """What runs in the background."""

    task: asyncio.Task[None]
    begun: Response
    tenant: str
    """Whose it is."""
    written: Written | None
    """As it outlives this router."""


def begun(written: Written, headers: Mapping[str, str], before: Sequence[msgspec.Raw] | None) -> Written:
    """One that begins, with those of its headers that count, and with what it goes on from."""
    sent = {name: value for name, value in headers.items() if name.startswith("x-")}
    chained = None if before is None else [("", bytes(item)) for item in before]
    return msgspec.structs.replace(written, headers=sent, before=chained)


def _read(document: Document) -> Written | None:
    try:
        return msgspec.msgpack.decode(document.body, type=Written)
    except msgspec.DecodeError as error:
        log.warning("a response in the background cannot be read", response=document.name, why=error)
        return None


class Outliving:
    """What one router has written down."""

    def __init__(self, documents: Documents, router: str, age_s: float, *, shared: bool = False) -> None:
        """``age_s``: older ones are forgotten. ``shared``: other routers have theirs beside these."""
        self.shared = shared
        self.router = router
        self.documents = documents
        self._shelf = Shelf(KIND, router)
        self._age_s = age_s
        self._undoing: set[asyncio.Task[None]] = set()
        self._kept: set[str] = set()
        """What has not ended and is written down."""

    async def begin(self, written: Written) -> None:
        """As :meth:`put`; but who is cancelled meanwhile leaves nothing behind."""
        putting = asyncio.create_task(self.put(written), name=f"write {written.fresh}")
        try:
            await asyncio.shield(putting)
        except asyncio.CancelledError:
            undoing = asyncio.create_task(self._undo(putting, written.fresh), name=f"forget {written.fresh}")
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            raise

    async def close(self) -> None:
        """What was to be forgotten is, if that can be soon."""
        if self._undoing:
            await asyncio.wait(self._undoing, timeout=KEEP_S)

    async def _undo(self, putting: asyncio.Task[None], fresh: str) -> None:
        await putting  # what is under way would come after
        await self.forget(fresh)

    async def put(self, written: Written) -> None:
        """It outlives this router from now on, if the database takes it."""
        document = Document(written.fresh, written.created * 1_000_000, {}, msgspec.msgpack.encode(written))
        try:
            async with asyncio.timeout(KEEP_S):
                await self.documents.put(self._shelf, document)
            self._keeps(written)
        except (RecordsLost, TimeoutError) as error:
            why = str(error) or "it takes too long"
            log.warning("a response in the background does not outlive this router", response=written.fresh, why=why)

    def _keeps(self, written: Written) -> None:
        (self._kept.add if written.told is None else self._kept.discard)(written.fresh)

    async def has(self, fresh: str) -> bool:
        """It is this router's to run; False: it was taken over, as this one was believed to be gone."""
        if not self.shared or fresh not in self._kept:
            return True
        try:
            async with asyncio.timeout(KEEP_S):
                return await self.documents.get(self._shelf, fresh) is not None
        except (RecordsLost, TimeoutError):
            return True  # nobody knows

    async def forget(self, fresh: str) -> None:
        """It was deleted."""
        self._kept.discard(fresh)
        try:
            async with asyncio.timeout(KEEP_S):
                await self.documents.delete(self._shelf, [fresh])
        except (RecordsLost, TimeoutError) as error:
            log.warning("a response in the background is not forgotten", response=fresh, why=error)

    async def held(self, living: Collection[str]) -> str | None:
        """A router that has any and is neither this one nor one of these. Raises RecordsLost, TimeoutError."""
        if not self.shared:
            return None
        async with asyncio.timeout(KEEP_S):
            routers = await self.documents.shelves(KIND)
        return next((each for each in routers if each != self.router and each not in living), None)

    async def erase(self, tenant: str) -> None:
        """Nothing is kept of theirs, also of what routers left that are gone. Raises RecordsLost."""
        for router in await self.documents.shelves(KIND):
            await self._erase(Shelf(KIND, router), tenant, inf)

    async def erase_own(self, tenant: str, until_s: float) -> None:
        """Nothing is kept of theirs that this router has, and that began until then, in Unix seconds. Raises
        RecordsLost."""
        await self._erase(self._shelf, tenant, until_s)

    async def _erase(self, shelf: Shelf, tenant: str, until_s: float) -> None:
        after: Mark | None = None
        while page := await self.documents.list(shelf, {}, after, PAGE):
            after = page[-1].mark
            read = [found for one in page if (found := _read(one)) is not None]
            theirs = [each.fresh for each in read if each.tenant == tenant and each.created <= until_s]
            await self.documents.delete(shelf, theirs)

    async def all(self) -> list[Written]:
        """The oldest first; those that are too old are forgotten. Waits for the database."""
        while True:
            try:
                return await self._all()
            except RecordsLost as error:
                log.warning("responses in the background of before are not known yet", why=error)
                await asyncio.sleep(AGAIN_S)

    async def left(self) -> AsyncGenerator[Sequence[Written] | None]:
        """What routers have left that are gone, as it comes, which is this one's from now on; None: this one stood
        still, and others may have taken what it runs. Ends at once where nothing is shared."""
        calm_s = 0.0
        while self.shared:
            before_s = clock.now_s()
            await asyncio.sleep(ADOPT_S)
            if clock.now_s() - before_s > ADOPT_S + STILL_S:
                calm_s = clock.now_s() + CALM_S
                yield None
            if clock.now_s() < calm_s:
                continue
            try:
                found = await self._adopted()
            except RecordsLost as error:
                seldom.warning("what other routers left in the background is not gone on with", why=error)
                continue
            if found:
                log.info("responses in the background of a router that is gone are here", responses=len(found))
                yield found

    async def _adopted(self) -> list[Written]:
        """Raises RecordsLost."""
        names = await self.documents.adopt(self._shelf)
        found = [await self.documents.get(self._shelf, name) for name in names]
        return [written for document in found if document is not None and (written := self._found(document))]

    def _found(self, document: Document) -> Written | None:
        written = _read(document)
        if written is not None:
            self._keeps(written)
        return written

    async def _all(self) -> list[Written]:
        found: list[Written] = []
        old: list[str] = []
        after: Mark | None = None
        while page := await self.documents.list(self._shelf, {}, after, PAGE):
            after = page[-1].mark
            for document in page:
                if document.at_us / 1e6 < clock.wall_s() - self._age_s:
                    old.append(document.name)
                    continue
                if (written := self._found(document)) is not None:
                    found.append(written)
        if old:
            await self.documents.delete(self._shelf, old)
        return found

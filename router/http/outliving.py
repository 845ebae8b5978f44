"""Responses in the background outlive their router: each is written down before its client hears of it, and how it
ended. A router that starts runs again what had not ended. Each router has its own."""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from records.base import RecordsLost
from records.documents import Document, Documents, Mark, Shelf
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log

log = Log(__name__)

KIND = "background"
KEEP_S = 5.0
"""A client is told of a response that takes longer to be written down all the same: then it does not outlive."""
AGAIN_S = 10.0
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
        self._documents = documents
        self._shelf = Shelf(KIND, router)
        self._age_s = age_s
        self._undoing: set[asyncio.Task[None]] = set()

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
                await self._documents.put(self._shelf, document)
        except (RecordsLost, TimeoutError) as error:
            why = str(error) or "it takes too long"
            log.warning("a response in the background does not outlive this router", response=written.fresh, why=why)

    async def forget(self, fresh: str) -> None:
        """It was deleted."""
        try:
            async with asyncio.timeout(KEEP_S):
                await self._documents.delete(self._shelf, [fresh])
        except (RecordsLost, TimeoutError) as error:
            log.warning("a response in the background is not forgotten", response=fresh, why=error)

    async def erase(self, tenant: str) -> None:
        """Nothing is kept of theirs here. Raises RecordsLost."""
        after: Mark | None = None
        while page := await self._documents.list(self._shelf, {}, after, PAGE):
            after = page[-1].mark
            theirs = [each.name for each in page if (written := _read(each)) is not None and written.tenant == tenant]
            await self._documents.delete(self._shelf, theirs)

    async def all(self) -> list[Written]:
        """The oldest first; those that are too old are forgotten. Waits for the database."""
        while True:
            try:
                return await self._all()
            except RecordsLost as error:
                log.warning("responses in the background of before are not known yet", why=error)
                await asyncio.sleep(AGAIN_S)

    async def adopted(self) -> list[Written]:
        """Those of routers that live no more, which are this one's from now on. Raises RecordsLost."""
        names = await self._documents.adopt(self._shelf)
        found = [await self._documents.get(self._shelf, name) for name in names]
        return [written for document in found if document is not None and (written := _read(document)) is not None]

    async def _all(self) -> list[Written]:
        found: list[Written] = []
        old: list[str] = []
        after: Mark | None = None
        while page := await self._documents.list(self._shelf, {}, after, PAGE):
            after = page[-1].mark
            for document in page:
                if document.at_us / 1e6 < clock.wall_s() - self._age_s:
                    old.append(document.name)
                    continue
                if (written := _read(document)) is not None:
                    found.append(written)
        if old:
            await self._documents.delete(self._shelf, old)
        return found

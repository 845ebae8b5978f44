"""What was erased, written down where all routers see it: one that stood still, or was gone, erases it when it goes on.

A router that lives is told, too, so that a client is answered once all of them have done it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec

from records.base import RecordsLost
from records.documents import Document, Documents, Mark, Shelf
from router.calls.errors import CallFailed, unavailable
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.errors import ClusterError

seldom = Seldom(Log(__name__), 60.0)

KIND, SEEN = "erased", "erased-seen"
LOOK_S = 2.0
WAIT_S = 5.0
"""Clients wait at a start so long."""
PAGE = 100
KEEP_S = 90 * 86_400
"""A router that is gone for longer does not hear of it."""
COUNT_MAX = 100_000
DONE_MAX = 1000
PARAMETER = "erasure"
"""By what another router is told which one it does."""


class Erasure(msgspec.Struct, frozen=True):
    """Of a tenant: all that is kept, its traces, or one of these."""

    tenant: str
    all: bool = False
    trace: str | None = None


class Erasures:
    """As one router knows them."""

    def __init__(self, documents: Documents, router: str) -> None:
        self._documents = documents
        self._router = router
        self._done: dict[str, None] = {}
        """By name."""
        self._own: set[str] = set()
        """Noted here in this life: who asked hears what comes of it, and asks again."""
        self._known = asyncio.Event()

    async def note(self, erasure: Erasure) -> str:
        """All routers will do it; returns its name.

        Raises:
            CallFailed: it cannot be written down.
        """
        try:
            newest = await self._documents.list(Shelf(KIND, ""), {}, None, 1, newest_first=True)
            at_us = max(int(clock.wall_s() * 1e6), *(each.at_us + 1 for each in newest), 0)
            name = f"{at_us:020}-{self._router}"
            self._own.add(name)
            await self._documents.put(Shelf(KIND, ""), Document(name, at_us, {}, msgspec.msgpack.encode(erasure)))
            await self._documents.trim(KIND, at_us - int(KEEP_S * 1e6), COUNT_MAX, 2**40)
        except RecordsLost as error:
            raise unavailable(f"it could not be written down, ask again: {error}", "not_erased") from error
        return name

    def did(self, name: str | None) -> None:
        """This router has done it."""
        if name is not None:
            self._done[name] = None
            while len(self._done) > DONE_MAX:
                del self._done[next(iter(self._done))]

    async def run(self, erase: Callable[[Erasure, float], Awaitable[None]]) -> None:
        """Have that do what this router was not told of, until it is cancelled; it is told when that was asked for, in
        Unix seconds."""
        mark: Mark | None = None
        while True:
            try:
                mark = await self._seen() if mark is None else mark
                while found := await self._documents.list(Shelf(KIND, ""), {}, mark, PAGE):
                    for each in found:
                        if each.name not in self._own and each.name not in self._done:
                            await erase(msgspec.msgpack.decode(each.body, type=Erasure), each.at_us / 1e6)
                            self.did(each.name)
                        self._own.discard(each.name)
                        mark = each.mark
                    await self._see(mark)
            except (RecordsLost, CallFailed, ClusterError, msgspec.DecodeError) as error:
                seldom.warning("what was erased elsewhere is not erased here yet", why=error)
            self._known.set()
            await asyncio.sleep(LOOK_S)

    async def caught_up(self) -> None:
        """What was erased before this router began is done, or cannot be asked for, or that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                await self._known.wait()

    async def _seen(self) -> Mark:
        """Up to where an earlier life knew them; a router that is new has nothing to erase."""
        found = await self._documents.get(Shelf(SEEN, ""), self._router)
        if found is None:
            await self._see(mark := Mark(int(clock.wall_s() * 1e6), ""))
            return mark
        return Mark(found.at_us, found.body.decode())

    async def _see(self, mark: Mark) -> None:
        await self._documents.put(Shelf(SEEN, ""), Document(self._router, mark.at_us, {}, mark.name.encode()))

"""Writes down what is billed, page by page, where it outlives the router."""

import asyncio
from collections.abc import Callable
from typing import Self

import msgspec

from records.base import RecordsLost
from records.documents import Document, Documents, Shelf
from router.dispatch.bills import Bills
from router.policy.bill_pages import Heard, Page, TraceRow
from router.policy.prices import Bill
from router.traces.trace import TraceKey
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.tasks import Tasks

SHELF = Shelf("bills", "")
PAGE_S = 60.0
ROWS_MAX = 2000
"""Of one page; then the next begins."""
LATE_S = 0.5
"""What is billed is written together, at most so long after."""
STALE_S = 5.0
"""How far workers are that have nothing to do, so long after."""
TIMEOUT_S = 10.0
WAITING_MAX = 1000
"""Pages that could not be written; more are lost, the oldest first."""
LOOK_S = 30.0
"""How often it is looked at what stores hold of traces."""
TRIM_S = 3600.0
NO_LIMIT = 2**62
LEFT_S = 600.0
LEFT_PAGES = 20
"""So late and so many pages of earlier routers tell of workers that may have died since."""

seldom = Seldom(Log(__name__))


class BillKeeper:
    """One life of one router's, for as long as it is entered.

    Args:
        bills: what is written.
        documents: where.
        life: names this life among those of all routers.
        keep_s: what is older is erased.
        wall_s: tells Unix time.
    """

    def __init__(
        self,
        bills: Bills,
        documents: Documents,
        life: str,
        keep_s: float,
        wall_s: Callable[[], float] = clock.wall_s,
    ) -> None:
        self._wall_s = wall_s
        self._bills = bills
        self._documents = documents
        self._life = life
        self._keep_s = keep_s
        self._count = 0
        self._began_s = clock.now_s()
        self._at_us = self._wall_us()
        self._rows: dict[tuple[TraceKey, str], TraceRow] = {}
        self._dirty = False
        self._put_s = -STALE_S
        self._waiting: dict[str, Document] = {}
        self._trimmed_s = -TRIM_S
        self._looked_s = clock.now_s()
        self._tasks = Tasks("bills")
        bills.on_billed = self._billed

    async def __aenter__(self) -> Self:
        self._tasks.start(self._run(), "writer")
        return self

    async def __aexit__(self, *_: object) -> None:
        """All is written that can be."""
        await self._tasks.close()
        await self.flush()

    async def flush(self) -> None:
        """Write what was billed up to now, and how far the workers are."""
        self._turn()
        await self._write()

    def _billed(self, key: TraceKey, tenant: str, bill: Bill, steps: int) -> None:
        row = self._rows.get((key, tenant)) or TraceRow(*key, tenant, 0, Bill())
        self._rows[key, tenant] = TraceRow(*key, tenant, row.steps + steps, row.bill + bill)
        self._dirty = True

    async def _remember(self) -> None:
        """What workers there were when the last router was lost."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = await self._documents.list(SHELF, {}, None, LEFT_PAGES, newest_first=True)
            pages = [msgspec.msgpack.decode(document.body, type=Heard) for document in found]
        except (RecordsLost, TimeoutError, msgspec.MsgspecError) as error:
            seldom.warning("what was billed before could not be read", why=error)
            return
        now_us, now_s = self._wall_us(), clock.now_s()
        late = [(page, max(0.0, (now_us - page.until_us) / 1e6)) for page in pages]
        self._bills.readings.left(
            [(row, now_s - ago_s) for page, ago_s in late if ago_s < LEFT_S for row in page.workers], now_s
        )

    async def _run(self) -> None:
        await self._remember()
        while True:
            await asyncio.sleep(LATE_S)
            if self._bills.look is not None and clock.now_s() - self._looked_s >= LOOK_S:
                self._looked_s = clock.now_s()
                await self._bills.look()
            now_s = clock.now_s()
            self._bills.readings.settle(now_s)
            changed = self._dirty or self._bills.readings.changed
            late_s = LATE_S * (1 + self._bills.readings.count // ROWS_MAX)  # a large page is written less often
            if now_s - self._began_s >= PAGE_S or len(self._rows) >= ROWS_MAX:
                self._turn()
            elif now_s - self._put_s >= (min(STALE_S, late_s) if changed else STALE_S):
                self._put()
            await self._write()

    def _put(self) -> int:
        """What is on the page now is to be written; returns how many pages that takes: several where workers tell a
        new router of all that they have kept."""
        readings, prices = self._bills.readings, self._bills.prices
        self._dirty = readings.changed = False
        self._put_s = clock.now_s()
        workers = readings.worker_rows(prices)
        parts = list(readings.account_rows(prices, ROWS_MAX)) or [()]
        for at, part in enumerate(parts):
            rows = () if at else tuple(self._rows.values())
            self._wait(at, Page(self._at_us, prices.tariff.unit, rows, workers, part, prices.tariff, self._wall_us()))
        return len(parts)

    def _wait(self, at: int, page: Page) -> None:
        name = f"{self._life}/{self._count + at}"
        self._waiting[name] = Document(name, self._at_us, {}, msgspec.msgpack.encode(page))
        while len(self._waiting) > WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]

    def _turn(self) -> None:
        self._count += self._put()
        self._rows = {}
        self._began_s, self._at_us = clock.now_s(), max(self._wall_us(), self._at_us + 1)
        self._bills.readings.turn(self._began_s)

    def _wall_us(self) -> int:
        return int(self._wall_s() * 1e6)

    async def _write(self) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                for name, document in list(self._waiting.items()):
                    await self._documents.put(SHELF, document)
                    if self._waiting.get(name) is document:
                        del self._waiting[name]
                if clock.now_s() - self._trimmed_s >= TRIM_S:
                    self._trimmed_s = clock.now_s()
                    before_us = self._wall_us() - int(self._keep_s * 1e6)
                    await self._documents.trim(SHELF.kind, before_us, NO_LIMIT, NO_LIMIT)
        except (RecordsLost, TimeoutError) as error:
            seldom.warning("bills could not be written; they will be", pages=len(self._waiting), why=error)

"""Traces again from the rows that were written of them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from records.base import TraceRow
from router.dispatch.ledger import Stored
from router.traces.changes import Clock, Read, Unreadable, read
from router.traces.packing import unpacked
from router.traces.trace import TraceKey
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload
from tracehaul.wire.ids import TraceId

seldom = Seldom(Log(__name__), 60.0)

TURN_S = 0.02
"""The event loop is let go after so long."""


@dataclass
class Reread:
    """What rows say."""

    found: dict[TraceKey, Read] = field(default_factory=dict[TraceKey, Read])
    bad: set[TraceKey] = field(default_factory=set[TraceKey])
    """Those that cannot be read."""
    stored: dict[TraceKey, Stored] = field(default_factory=dict[TraceKey, Stored])
    """Of both; without traces."""
    rows: int = 0


def now_here() -> Clock:
    """The time that changes are told by."""
    return Clock(clock.boot_id(), clock.now_s(), clock.wall_s())


async def reread(pages: AsyncIterator[Sequence[TraceRow]], offload: Offload) -> Reread:
    """All that some rows say, those of each trace in their order.

    Raises:
        RecordsLost: they cannot be read, or not on.
    """
    told, turn_s = Reread(), clock.perf_s()
    async with aclosing(_ahead(pages)) as ahead:
        async for page in ahead:
            bodies = await offload.run(partial(_unpacked, page))
            for row, body in zip(page, bodies, strict=True):
                _take(told, row, body)
                if clock.perf_s() - turn_s > TURN_S:
                    await asyncio.sleep(0)
                    turn_s = clock.perf_s()
    return told


async def _ahead(pages: AsyncIterator[Sequence[TraceRow]]) -> AsyncGenerator[Sequence[TraceRow], None]:
    """The same, each asked for while the one before it is read."""
    coming = asyncio.ensure_future(anext(pages, None))
    try:
        while (page := await coming) is not None:
            coming = asyncio.ensure_future(anext(pages, None))
            yield page
    finally:
        coming.cancel()
        await asyncio.wait([coming])
        if not coming.cancelled():
            coming.exception()  # who leaves does not ask what became of it


def _unpacked(page: Sequence[TraceRow]) -> list[bytes | Unreadable]:
    return [_body(row) for row in page]


def _body(row: TraceRow) -> bytes | Unreadable:
    try:
        return unpacked(row.version, row.body)
    except Unreadable as error:
        return error


def _take(told: Reread, row: TraceRow, body: bytes | Unreadable) -> None:
    key = (row.tenant, TraceId(row.trace))
    told.rows += 1
    stored = told.stored.setdefault(key, Stored(None, 0, 0.0))
    stored.number = row.number
    try:
        if isinstance(body, Unreadable):
            raise body
        told.found[key] = now = read(key, told.found.get(key), row.number, body)
        told.bad.discard(key)
        if now.follows:
            stored.since_bytes, stored.count = stored.since_bytes + len(body), stored.count + 1
        else:
            stored.whole_bytes, stored.since_bytes, stored.count = len(body), 0, 0
    except Unreadable as error:
        told.found.pop(key, None)
        if key not in told.bad:
            seldom.warning("a trace cannot be read", trace=row.trace, why=error)
        told.bad.add(key)

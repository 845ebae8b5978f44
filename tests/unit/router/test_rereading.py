"""Traces again from rows: pages are asked for ahead, and nothing is left of them that nobody wants."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from records.base import RecordsLost, TraceRow
from router.dispatch.rereading import reread
from sim import loop as virtual
from tracehaul.runtime.offload import InlineOffload

PAGE_S = 1.0


class Pages:
    """Of rows that say nothing; ``lost``: the one that cannot be read."""

    def __init__(self, count: int, lost: int | None = None) -> None:
        self._count = count
        self._lost = lost
        self.begun = self.ended = 0

    async def read(self) -> AsyncIterator[Sequence[TraceRow]]:
        for at in range(self._count):
            self.begun += 1
            try:
                await asyncio.sleep(PAGE_S)
            finally:
                self.ended += 1
            if at == self._lost:
                raise RecordsLost("gone")
            yield [TraceRow("", f"trace-{at}", 1, 0, b"")]


def test_all_pages_are_read() -> None:
    told = virtual.run(lambda: reread(Pages(3).read(), InlineOffload()))
    assert (told.rows, len(told.bad)) == (3, 3)


def test_a_page_that_is_lost_is_told() -> None:
    with pytest.raises(RecordsLost):
        virtual.run(lambda: reread(Pages(3, lost=1).read(), InlineOffload()))


def test_nothing_is_asked_for_when_nobody_wants_it_any_more() -> None:
    pages = Pages(3)

    async def main() -> int:
        reading = asyncio.ensure_future(reread(pages.read(), InlineOffload()))
        await asyncio.sleep(1.5 * PAGE_S)  # the second is on its way
        reading.cancel()
        await asyncio.wait([reading])
        return len(asyncio.all_tasks())

    assert virtual.run(main) == 1
    assert (pages.begun, pages.ended) == (2, 2)

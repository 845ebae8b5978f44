"""What must not go wrong while traces go from router to router: deletions, and calls that come meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from records.base import RecordsLost, TraceName, TraceRow
from router.dispatch import handover as module
from tests.unit.router.test_handover import Router, run, soon
from tests.unit.router.test_journal import known
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.ids import TraceId

__all__ = ["soon"]


def test_what_was_only_known_here_is_not_told_to_be_deleted() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        one.m.begin("a", 1e9)
        await two.book.arrive("", TraceId("a"))
        with pytest.raises(Unavailable):  # its step runs on, and its rows are there
            await two.book.delete("", TraceId("a"))
        assert one.records.kept
        one.records.lost = two.records.lost = "no route to host"
        with pytest.raises(Unavailable):  # who knows
            await two.book.delete("", TraceId("b"))
        one.records.lost = two.records.lost = None
        assert not await two.book.delete("", TraceId("b"))

    run(test)


def test_who_lost_a_trace_does_not_tell_that_it_is_deleted() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        del two._wire.doors["one:7000"]
        await two.serve("a", tokens=50)
        await two.written()
        with pytest.raises(Unavailable):
            await one.book.delete("", TraceId("a"))
        assert two.records.kept
        two._wire.doors["one:7000"] = one.doorway
        await one.book.arrive("", TraceId("a"))
        assert await one.book.delete("", TraceId("a"))
        assert not two.records.kept

    run(test)


def test_a_trace_goes_on_only_when_it_has_come() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        two.records.reading_s = 0.1
        coming = asyncio.create_task(two.book.arrive("", TraceId("a")))
        await one.until(lambda: bool(one.handover.stats.given))
        await asyncio.sleep(0.02)
        await one.book.arrive("", TraceId("a"))  # back again
        await coming
        assert known(one)
        assert not known(two)
        await one.serve("a", tokens=30)
        await one.written()
        assert one.journal.stats.lost == 0

    run(test)


def test_a_call_that_comes_while_its_trace_is_adopted_writes_it() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        one.kill()
        two.records.reading_s = 0.2
        await two.until(lambda: bool(two.handover._taking))
        two.records.reading_s = 0.0
        await two.serve("a", tokens=40)
        await two.until(lambda: not two.handover._taking)
        await two.step("a", tokens=50)
        await two.written()
        assert two.journal.stats.lost == 0
        assert known(two)["a"].steps_count == 3  # type: ignore[attr-defined]

    run(test)


def test_reading_what_was_adopted_and_errors_nobody_thought_of_end_no_router() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        one.kill()
        two.records.reading_s = 1.5 * module.LIVES_S
        await two.until(lambda: bool(two.handover._taking))
        await asyncio.sleep(1.2 * module.LIVES_S)
        assert not known(two)
        assert two.records.tables.lives["two"][2] > two.records.tables.now_s()
        two.records.crash = KeyError("odd")
        await asyncio.sleep(2 * module.BEAT_S)
        two.records.crash = None
        await two.until(lambda: bool(known(two)))
        await asyncio.sleep(2 * module.BEAT_S)
        assert two.records.tables.lives["two"][2] > two.records.tables.now_s()

    run(test)


def test_what_was_claimed_and_could_not_be_read_is_known_later() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        rows, two.records.rows = two.records.rows, _lost  # type: ignore[method-assign, assignment]
        await two.book.arrive("", TraceId("a"))
        assert two.handover.stats.unfetched == 1
        two.records.rows = rows  # type: ignore[method-assign]
        await two.until(lambda: bool(known(two)))

    run(test)


async def _lost(names: Sequence[TraceName]) -> AsyncIterator[Sequence[TraceRow]]:
    raise RecordsLost("away")
    yield ()


def test_a_trace_whose_call_is_not_over_stays() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        step = one.m.begin("a", 1e9)
        one.m.end("a", step, 1e9 + 1)
        await one.written()
        await two.book.arrive("", TraceId("a"))
        assert two.handover.stats.busy == 1
        one.m.answer("a", step, 1e9 + 2)
        await two.book.arrive("", TraceId("a"))
        assert two.handover.stats.fetched == 1

    run(test)


def test_a_tenants_traces_are_erased_while_they_are_written() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        one.records.erasing_s = 0.05
        assert await one.book.erase("") == 1
        await one.until(lambda: one.journal.behind == 0)
        assert one.journal.stats.failures == 0

    run(test)

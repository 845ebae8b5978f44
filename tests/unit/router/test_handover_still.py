"""Routers that stood still, and traces whose writing was refused: what another one has by now is read anew."""

import asyncio
import threading

from router.dispatch import handover as module
from router.traces.prefixes import Sought
from tests.unit.router.test_handover import Router, run, soon
from tests.unit.router.test_journal import known
from tracehaul.wire.ids import TraceId

__all__ = ["soon"]

A = TraceId("a")
SAID = [bytes([at]) * 16 for at in range(6)]


def unreachable(one: Router) -> None:
    """Nobody reaches it, and it goes on."""
    one.unplugged(True)


async def stands_still() -> None:
    threading.Event().wait(2 * module.STILL_S)
    await asyncio.sleep(0.01)


def test_who_stood_still_serves_nothing_that_was_deleted_meanwhile() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.serve("b")
        await one.written()
        unreachable(one)
        await two.book.arrive("", A)
        assert await two.book.delete("", A)
        one.records.lost = "no route to host"
        await stands_still()
        await one.book.arrive("", A)
        assert set(known(one)) == {"a", "b"}, "nobody waits for a store that is gone"
        one.records.lost = None
        await stands_still()
        await one.book.arrive("", A)  # before it can have looked at all of them
        assert set(known(one)) == {"b"}
        await one.written()
        assert {row.trace for row in one.records.kept} == {"b"}

    run(test)


def test_who_stood_still_looks_which_traces_are_its_own() -> None:
    async def test(one: Router, two: Router) -> None:
        for name in "abc":
            await one.serve(name)
        await one.written()
        unreachable(one)
        await two.serve("a", tokens=40)
        await two.book.arrive("", TraceId("b"))
        await two.book.delete("", TraceId("b"))
        await two.written()
        assert set(known(one)) == {"a", "b", "c"}
        await stands_still()
        await one.until(lambda: set(known(one)) == {"c"})
        assert one.journal.stats.lost == 2
        await one.serve("c", tokens=30)
        await one.written()
        assert one.journal.stats.lost == 2

    run(test)


def test_a_conversation_whose_writing_was_refused_is_read_anew() -> None:
    """It has no name, so nothing but itself says that it is another router's."""

    async def test(one: Router, two: Router) -> None:
        place = one.book.place("", Sought(SAID[:2], 0), A)
        await one.step("a")
        await one.written()
        unreachable(one)
        await two.serve("a", tokens=40)
        await two.written()
        await one.step("a", tokens=20)  # the call is not over yet
        await one.until(lambda: one.journal.stats.lost == 1)
        one.book.over("", place.trace)
        assert known(one)["a"].steps_count == 2  # type: ignore[attr-defined]
        one.unplugged(False)
        await one.book.arrive("", None, Sought(SAID[:3], 0))
        assert known(one)["a"].steps_count == 2  # type: ignore[attr-defined]
        await one.step("a", tokens=50)
        await one.written()
        assert one.journal.stats.lost == 1, "it is written here again"
        assert not known(two)

    run(test)


def test_a_trace_that_is_only_known_here_goes_when_it_was_deleted() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        step = one.m.begin("a", 1e9)
        await two.serve("a", tokens=20)
        one.m.end("a", step, 1e9 + 1)
        one.m.answer("a", step, 1e9 + 1)
        one.journal.changed()
        assert await one.book.delete("", A)
        assert known(two)
        await two.book.arrive("", A)
        assert not known(two)

    run(test)

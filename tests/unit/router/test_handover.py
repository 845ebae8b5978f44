"""Two routers' traces over one store of records: whose they are, and what each knows."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from records.base import Batch, Claim, Holder, RecordsLost, TraceName, TraceRow
from records.fakes import MemoryRecords, MemoryTables
from router.dispatch import handover as module
from router.dispatch import journal as journal_module
from router.dispatch.handover import Doorway, Handover
from router.traces.prefixes import Sought
from tests.unit.router.test_journal import Life, known
from tracehaul.rpc.base import CallContext
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.cluster import GiveTrace, TraceGiven
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.ids import TraceId
from tracehaul.wire.messages import Reply, Request

A = ("", TraceId("a"))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LATE_S": 0.01, "AGAIN_S": (0.01, 0.02), "LOAD_S": 0.5, "ERASE_S": 0.2, "CLOSE_S": 0.5}.items():
        monkeypatch.setattr(journal_module, name, value)
    for name, value in {"FETCH_S": 1.0, "GIVE_S": 0.2, "LIVES_S": 0.2, "BEAT_S": 0.05}.items():
        monkeypatch.setattr(module, name, value)


class Wire:
    """Peers: asks the others, unless these are gone."""

    def __init__(self) -> None:
        self.doors: dict[str, Doorway] = {}
        self.asked = 0

    async def call(self, address: str, request: Request, *, timeout_s: float) -> Reply:
        self.asked += 1
        if address not in self.doors:
            raise PeerLost("nobody listens there")
        return await self.doors[address].call(request, CallContext(peer="router"))


class SlowRecords(MemoryRecords):
    """Rows, and what is erased or written, take as long as a test wants."""

    reading_s = erasing_s = 0.0
    crash: Exception | None = None
    """What is wrong with saying that a router lives."""

    async def rows(self, names: Sequence[TraceName]) -> AsyncIterator[Sequence[TraceRow]]:
        found = [page async for page in super().rows(names)]
        await asyncio.sleep(self.reading_s)
        for page in found:
            yield page

    async def erase(self, tenant: str) -> int:
        gone = await super().erase(tenant)
        await asyncio.sleep(self.erasing_s)
        return gone

    async def write(self, batch: Batch) -> frozenset[TraceName]:
        done = await super().write(batch)
        await asyncio.sleep(2 * self.erasing_s)
        return done

    async def live(self, for_s: float) -> Mapping[str, str]:
        if self.crash is not None:
            raise self.crash
        return await super().live(for_s)


class Router(Life):
    """One life of a router that shares its records."""

    def __init__(self, tables: MemoryTables, wire: Wire, name: str, life: str = "1") -> None:
        self.records = SlowRecords(tables, name, life, f"{name}:7000")
        super().__init__(self.records, shared=True)
        self.handover = Handover(name, self.records, self.journal, wire, InlineOffload())  # type: ignore[arg-type]
        self.book.elsewhere = self.handover
        self.doorway = Doorway(None)  # type: ignore[arg-type]
        self.doorway.handover = self.handover
        self._wire, self._address = wire, f"{name}:7000"

    async def start(self) -> None:
        self._wire.doors[self._address] = self.doorway
        await self.handover.start()
        await self.journal.start()

    async def serve(self, trace: str, tokens: int = 8) -> None:
        """A call of a named trace."""
        await self.book.arrive("", TraceId(trace))
        await self.step(trace, tokens)

    def unplugged(self, gone: bool) -> None:
        """Nobody reaches it, and it goes on; or they do again."""
        if gone:
            del self._wire.doors[self._address]
        else:
            self._wire.doors[self._address] = self.doorway

    def kill(self) -> None:
        """Nothing more of it is done."""
        del self._wire.doors[self._address]
        for tasks in (self.journal, self.handover):
            for task in list(tasks._tasks._running):  # type: ignore[attr-defined]
                task.cancel()


@asynccontextmanager
async def routers(*names: str) -> AsyncGenerator[list[Router], None]:
    tables, wire = MemoryTables(), Wire()
    started = [Router(tables, wire, name) for name in names]
    for router in started:
        await router.start()
    yield started
    for router in started:
        await router.journal.close()
        await router.handover.close()


def run(test: Callable[[Router, Router], Awaitable[None]]) -> None:
    async def main() -> None:
        async with routers("one", "two") as (one, two):
            await test(one, two)
            one.traces.check()
            two.traces.check()

    asyncio.run(main())


def test_any_router_serves_any_trace_as_if_it_had_always_had_it() -> None:
    async def test(one: Router, two: Router) -> None:
        for at in range(6):
            await (one, two)[at % 2].serve("a", tokens=8 + at)
            if at == 0:
                await one.written()  # what nobody has written of yet, nobody finds
        assert known(two)["a"].steps_count == 6  # type: ignore[attr-defined]
        assert not known(one)
        assert (two.handover.stats.fetched, one.handover.stats.fetched) == (3, 2)
        assert one.handover.stats.given == 3
        await two.written()
        assert two.journal.stats.lost == one.journal.stats.lost == 0

    run(test)


def test_a_trace_of_a_killed_router_is_taken_at_its_next_call() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        one.kill()
        await two.serve("a", tokens=20)
        assert known(two)["a"].steps_count == 2  # type: ignore[attr-defined]

    run(test)


def test_a_trace_that_was_claimed_without_an_answer_comes_all_the_same() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        claim = two.records.claim

        async def unsure(name: TraceName) -> Claim | None:
            await claim(name)
            raise RecordsLost("it does not answer in time")

        two.records.claim = unsure  # type: ignore[method-assign]
        await two.serve("a", tokens=30)  # anew, as nothing came
        two.records.claim = claim  # type: ignore[method-assign]
        assert not known(one)
        await two.until(lambda: two.journal.behind == 0 and "a" in known(two))
        await two.serve("a", tokens=40)
        await two.written()
        assert known(two)["a"].steps_count == 2  # type: ignore[attr-defined]

    run(test)


def test_a_trace_that_was_given_and_not_taken_comes_back() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()

        async def away(name: TraceName) -> Claim | None:
            raise RecordsLost("no route to host")

        two.records.claim = away  # type: ignore[method-assign]
        await two.book.arrive("", TraceId("a"))
        assert one.handover.stats.given == 1
        assert not known(one)
        assert not known(two)
        await one.until(lambda: "a" in known(one))
        await one.serve("a", tokens=20)
        assert known(one)["a"].steps_count == 2  # type: ignore[attr-defined]
        await one.written()

    run(test)


def test_of_many_calls_only_the_first_wait_for_a_database_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_S", 0.3)
    frozen = True

    async def test(one: Router, two: Router) -> None:
        nonlocal frozen
        holder = two.records.holder

        async def silent(*args: Any) -> Holder | None:
            while frozen:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return await holder(*args)

        two.records.holder = silent  # type: ignore[method-assign]
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for name in "abcdefgh":
            await two.serve(name)
        assert loop.time() - began_s < 2 * 0.3
        assert two.handover.stats.unfetched == 8
        frozen = False
        await one.serve("z")
        await one.written()
        await two.until(lambda: two.handover._impatient_s == 0.0)
        await two.serve("z")
        assert two.handover.stats.fetched == 1, "it answers again"

    run(test)


def test_what_a_router_that_is_gone_had_is_another_ones_after_a_while() -> None:
    async def test(one: Router, two: Router) -> None:
        for name in "abc":
            await one.serve(name)
        await one.written()
        one.kill()
        await two.until(lambda: len(known(two)) == 3)
        assert two.handover.stats.adopted == 3
        await two.serve("b", tokens=30)
        await two.written()
        assert two.handover.stats.fetched == 0

    run(test)


def test_a_router_that_stood_still_writes_nothing_over_and_knows_it() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        del two._wire.doors["one:7000"]  # it does not answer, and goes on
        await two.serve("a", tokens=50)
        await two.written()
        rows = list(two.records.kept)
        await one.step("a", tokens=9)
        await one.until(lambda: one.journal.stats.lost == 1)
        assert two.records.kept == rows
        assert not known(one)
        two._wire.doors["one:7000"] = one.doorway
        await one.serve("a", tokens=70)
        assert known(one)["a"].steps_count == 3  # type: ignore[attr-defined]

    run(test)


def test_a_trace_stays_where_a_step_of_it_runs_and_is_only_known_elsewhere() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        step = one.m.begin("a", 1e9)
        await two.serve("a", tokens=20)
        assert two.handover.stats.busy == 1
        assert known(two)["a"].steps_count == 2  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        assert two.journal.stats.changes == 0
        one.m.end("a", step, 1e9 + 1)
        one.m.answer("a", step, 1e9 + 1)
        one.journal.changed()
        await two.serve("a", tokens=30)  # now it comes, with what became of it there
        assert two.handover.stats.fetched == 1
        assert known(two)["a"].steps_count == 3  # type: ignore[attr-defined]
        assert not known(one)

    run(test)


def test_a_store_that_is_gone_holds_no_call_up_and_the_newer_writer_has_it_afterwards() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        for router in (one, two):
            router.records.lost = "no route to host"
        await two.serve("a", tokens=20)  # anew
        assert known(two)["a"].steps_count == 1  # type: ignore[attr-defined]
        assert two.handover.stats.unfetched == 1
        for router in (one, two):
            router.records.lost = None
        await two.until(lambda: two.journal.stats.lost == 1)  # it is the other one's
        await two.serve("a", tokens=30)
        assert known(two)["a"].steps_count == 2  # type: ignore[attr-defined]
        await two.written()

    run(test)


def test_nobody_adopts_after_an_outage_before_the_others_could_say_that_they_live() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        await two.until(lambda: two.handover._well_since_s is not None)
        for router in (one, two):
            router.records.lost = "away"
        await asyncio.sleep(2 * module.LIVES_S)
        two.records.lost = None
        await asyncio.sleep(module.BEAT_S * 2)
        one.records.lost = None
        await asyncio.sleep(2 * module.LIVES_S)
        assert two.handover.stats.adopted == 0
        assert known(one)

    run(test)


def test_a_conversation_without_a_name_is_found_at_another_router() -> None:
    async def test(one: Router, two: Router) -> None:
        said = [bytes([at]) * 16 for at in range(4)]
        place = one.book.place("", Sought(said[:2], 0), TraceId("t"))
        await one.step(place.trace)
        one.book.over("", place.trace)
        await one.written()
        await two.book.arrive("", None, Sought(said, 0))
        assert two.book.find("", Sought(said, 0), TraceId("u")).trace == "t"
        assert not known(one)
        asked = two.handover.stats.fetched
        await two.book.arrive("", None, Sought(said, 0))
        await two.book.arrive("", None, Sought([b"x" * 16], 0, first=True))
        assert two.handover.stats.fetched == asked

    run(test)


def test_a_deleted_trace_is_gone_for_all() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        await two.book.arrive("", TraceId("a"))
        assert await two.book.delete("", TraceId("a"))
        assert not one.records.kept
        await one.book.arrive("", TraceId("a"))
        assert not known(one)

    run(test)


def test_calls_of_one_trace_at_once_ask_once() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        await asyncio.gather(*(two.book.arrive("", TraceId("a")) for _ in range(5)))
        assert two.handover.stats.fetched == 1
        assert two._wire.asked == 1

    run(test)


def test_a_router_that_cannot_write_lets_go_all_the_same() -> None:
    async def test(one: Router, two: Router) -> None:
        await one.serve("a")
        await one.written()
        one.records.lost = "the disk is full"
        await one.step("a", tokens=90)
        reply = await one.doorway.call(GiveTrace(*A), CallContext(peer="two"))
        assert reply == TraceGiven(given=True)
        one.records.lost = None

    run(test)

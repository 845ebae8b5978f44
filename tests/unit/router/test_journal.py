"""The journal's shell: what a next life of a router knows, whatever the store of records does."""

import asyncio
from collections.abc import Callable

import pytest

from records.base import Batch, Claim, Marks, RecordsLost, TraceName, TraceRow
from records.fakes import MemoryRecords
from router.dispatch import journal as module
from router.dispatch.journal import Journal
from router.dispatch.ledger import CHANGES_FEW
from router.traces.book import Book
from router.traces.events import Event
from router.traces.machine import Traces
from router.traces.packing import VERSION
from router.traces.texts import Said, fresh
from tests.unit.router.test_traces import Machine, left
from tracehaul.runtime import clock
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import Unavailable

DAY_S = 86400.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LATE_S": 0.01, "AGAIN_S": (0.01, 0.02), "LOAD_S": 0.1, "ERASE_S": 0.1, "CLOSE_S": 0.5}.items():
        monkeypatch.setattr(module, name, value)


class Life:
    """One life of a router's traces."""

    def __init__(
        self, records: MemoryRecords, keep_s: float = DAY_S, edition: str = "one", *, shared: bool = False
    ) -> None:
        self.m = Machine(traces_max=4, bytes_max=1 << 24)
        self.traces: Traces = self.m.traces
        self.journal = Journal(records, self.traces, self.send, keep_s, {"m": edition}, InlineOffload(), shared=shared)
        self.book = Book(self.traces, self)  # type: ignore[arg-type]
        self.book.written = self.journal

    def send(self, event: Event) -> None:
        self.traces.handle(event, clock.now_s())
        self.journal.changed()

    async def step(self, trace: str, tokens: int = 8) -> None:
        now_s = clock.now_s()
        step = self.m.begin(trace, now_s)
        self.m.end(trace, step, now_s, left([*range(tokens)], step))
        self.m.answer(trace, step, now_s, said=Said(fresh("x" * tokens, range(tokens)), model="m"))
        self.journal.changed()

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not done():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def written(self) -> None:
        await self.until(lambda: self.journal.behind == 0 and not self.journal.failing)


def known(life: Life) -> dict[str, object]:
    return {trace.trace: trace for trace in life.traces.all()}


def test_a_next_life_knows_what_was_written_and_forgets_what_was_forgotten() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        for at in range(40):
            await one.step("abcde"[at % 5], tokens=8 + at)
            await one.written()
        await one.journal.close()
        two = Life(records)
        await two.journal.start()
        assert known(two) == known(one)
        assert len(known(two)) == 4  # of five: the limit
        two.traces.check()
        await two.step("e", tokens=99)
        await two.journal.close()
        three = Life(records)
        await three.journal.start()
        assert known(three) == known(two)
        await three.journal.close()
        four = Life(records, keep_s=0.0)
        await asyncio.sleep(0.01)
        await four.journal.start()
        assert not known(four)
        await four.until(lambda: not records.kept)
        await four.journal.close()

    asyncio.run(main())


def test_rows_of_a_trace_do_not_pile_up() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        for _ in range(3 * CHANGES_FEW):
            await one.step("a")
            await one.written()
        assert one.journal.stats.whole > 1
        assert len(records.kept) <= CHANGES_FEW + 1
        await one.journal.close()

    asyncio.run(main())


def test_a_store_that_is_gone_is_caught_up_with(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.written()
        records.lost = "the disk is full"
        await one.step("a", tokens=50)
        await one.step("b")
        await one.until(lambda: one.journal.failing)
        assert one.journal.behind == 2
        await asyncio.sleep(0.1)
        with pytest.raises(Unavailable):
            await one.journal.erased(("", "a"))
        records.lost = None
        await one.written()
        await one.journal.close()
        two = Life(records)
        await two.journal.start()
        assert known(two) == known(one)
        await two.journal.close()

    asyncio.run(main())
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "stands still" in line]) == 1


def test_a_store_that_is_gone_at_the_start_gives_the_traces_later() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.step("b", tokens=30)
        await one.written()
        await one.journal.close()
        records.lost = "no route to host"
        two = Life(records)
        await two.journal.start()  # returns all the same
        await two.step("b", tokens=5)
        records.lost = None
        await two.until(lambda: "a" in known(two))
        await two.written()
        assert known(two)["b"].context_tokens == 5
        await two.journal.close()
        three = Life(records)
        await three.journal.start()
        assert known(three) == known(two)
        await three.journal.close()

    asyncio.run(main())


def test_a_deleted_trace_is_gone_on_return_and_does_not_come_back() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.step("b")
        await one.written()
        assert await one.book.delete("", "a")
        assert {row.trace for row in records.kept} == {"b"}
        assert not await one.book.delete("", "a")
        await one.step("a", tokens=3)
        await one.journal.close()
        two = Life(records)
        await two.journal.start()
        assert known(two)["a"].steps_count == 1
        await two.journal.close()

    asyncio.run(main())


def test_all_of_a_tenants_traces_are_erased_and_nobody_elses() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        for name in "ab":
            await one.step(name)
        await one.written()
        other = [Claim("red", "x", 0)]
        await records.write(Batch([TraceRow("red", "x", 1, VERSION, b"?")], [(other[0], Marks())]))
        await one.step("a", tokens=20)
        assert await one.book.erase("") == 2
        assert [row.tenant for row in records.kept] == ["red"]
        assert not known(one)
        await one.step("a", tokens=3)
        await one.written()
        records.lost = "gone"
        with pytest.raises(Unavailable):
            await one.book.erase("")
        records.lost = None
        assert await one.book.erase("") == 1
        await one.step("b")
        await one.journal.close()
        two = Life(records)
        await two.journal.start()
        assert known(two).keys() == {"b"}
        await two.journal.close()

    asyncio.run(main())


def test_what_cannot_be_read_is_left_alone() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.written()
        await one.journal.close()
        newer, torn = TraceRow("", "n", 90, VERSION + 1, b"?"), TraceRow("", "t", 91, VERSION, b"\xc1")
        await records.write(Batch([newer, torn], [(Claim("", name, 0), Marks()) for name in "nt"]))
        two = Life(records)
        await two.journal.start()
        assert known(two) == known(one)
        assert two.journal.stats.unreadable == 2
        await two.step("c")
        await two.written()
        assert {newer, torn} <= set(records.kept)
        await two.step("t")
        await two.written()
        assert torn not in records.kept
        await two.journal.close()

    asyncio.run(main())


def test_a_store_that_does_not_say_whether_it_has_written_is_written_to_again() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.written()
        write, left_to_fail = records.write, [True]

        async def unsure(batch: Batch) -> frozenset[TraceName]:
            lost = await write(batch)
            if left_to_fail and left_to_fail.pop():
                raise RecordsLost("it does not answer in time")
            return lost

        records.write = unsure  # type: ignore[method-assign]
        await one.step("a", tokens=40)
        await one.until(lambda: not left_to_fail)
        await one.written()
        await one.journal.close()
        two = Life(records)
        await two.journal.start()
        assert known(two) == known(one)
        await two.journal.close()

    asyncio.run(main())

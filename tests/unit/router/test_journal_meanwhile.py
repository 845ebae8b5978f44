"""The journal's shell while other things happen: what is deleted, changed, overdue or wrong meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from records.base import Batch, Claim, Marks, TraceName, TraceRow
from records.fakes import MemoryRecords
from router.dispatch import journal as module
from router.dispatch import ledger
from router.dispatch.journal import Journal
from router.policy.retention import RetentionConfig
from router.traces.events import Suspended
from router.traces.machine import Traces
from tests.unit.router.test_journal import DAY_S, Life, known, soon
from tests.unit.router.test_traces import key
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import Unavailable

__all__ = ["soon"]


class Slow(MemoryRecords):
    """Writes, and reads, when it is let; of what it was given it keeps a list."""

    def __init__(self) -> None:
        super().__init__()
        self.free = asyncio.Event()
        self.free.set()
        self.asked = asyncio.Event()
        self.batches: list[Batch] = []

    async def write(self, batch: Batch) -> frozenset[TraceName]:
        self.asked.set()
        await self.free.wait()
        await asyncio.sleep(0.002)  # whoever waits for an earlier one goes on first
        self.batches.append(batch)
        return await super().write(batch)

    async def rows(self, names: Sequence[TraceName]) -> AsyncIterator[Sequence[TraceRow]]:
        await self.free.wait()
        async for rows in super().rows(names):
            yield rows


def rows_of(records: MemoryRecords, trace: str) -> list[TraceRow]:
    return [row for row in records.kept if row.trace == trace]


def test_texts_of_another_model_behind_the_same_name_are_not_known() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.journal.close()
        for edition, texts in (("two", 0), ("one", 1)):
            two = Life(records, edition=edition)
            await two.journal.start()
            assert two.m.trace("a").lefts == one.m.trace("a").lefts
            assert len(two.m.trace("a").texts) == texts
            await two.journal.close()

    asyncio.run(main())


@pytest.mark.parametrize("expired", [False, True])
def test_what_is_deleted_while_a_batch_is_made_is_in_it_once(monkeypatch: pytest.MonkeyPatch, expired: bool) -> None:
    async def main() -> None:
        records = Slow()
        one = Life(records, keep_s=0.05 if expired else DAY_S)
        await one.journal.start()
        monkeypatch.setattr(module, "TURN_S", -1.0)  # lets go after each
        if expired:
            await one.step("a")
            await one.written()
            await asyncio.sleep(0.06)
            monkeypatch.setattr(ledger, "SWEEP_S", 0.01)
            await one.step("b")
            await one.step("c")
        else:
            await one.step("a")
            await one.step("b")
        taken = "b" if expired else "a"
        while key(taken) in one.m.traces.changed:  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0)
        await one.book.delete("", "a")
        assert not rows_of(records, "a")
        await one.step("d")
        await one.until(lambda: rows_of(records, "d") != [])
        for batch in records.batches:
            named = [(row.tenant, row.trace) for row in batch.rows] + [claim[:2] for claim in batch.erased]
            assert len(named) == len(set(named))
        await one.journal.close()

    asyncio.run(main())


def test_a_trace_that_is_deleted_while_it_is_written_is_gone_on_return() -> None:
    async def main() -> None:
        records = Slow()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.written()
        records.free.clear()
        records.asked.clear()
        await one.step("a", tokens=20)
        await records.asked.wait()
        deleting = asyncio.create_task(one.book.delete("", "a"))
        await asyncio.sleep(0)
        records.free.set()
        assert await deleting
        assert not rows_of(records, "a")
        await one.journal.close()

    asyncio.run(main())


def test_one_batch_does_not_erase_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        first = MemoryRecords()
        one = Life(first)
        await one.journal.start()
        await one.step("a")
        await one.journal.close()
        [row] = first.kept
        many = [row._replace(trace=f"t{at}", number=at + 1) for at in range(150)]
        for keep_s in (0.0, 0.3):  # known no more at the start; later
            records = Slow()
            await records.write(Batch(many, [(Claim("", row.trace, 0), Marks()) for row in many]))
            records.batches.clear()
            two = Life(records, keep_s)
            if keep_s:
                two.traces = two.m.traces = Traces(200, 1 << 24, RetentionConfig())
                two.journal = Journal(records, two.traces, two.send, keep_s, {"m": "one"}, InlineOffload())
                monkeypatch.setattr(ledger, "SWEEP_S", 0.05)
            await two.journal.start()
            await two.until(lambda: not records.kept)  # noqa: B023
            assert max(len(batch.erased) for batch in records.batches) <= 64
            await two.until(lambda: two.journal.stats.batches == len(records.batches))  # noqa: B023
            assert two.journal.stats.bytes_written == sum(len(r.body) for b in records.batches for r in b.rows)
            await two.journal.close()

    asyncio.run(main())


def test_what_is_deleted_before_it_is_known_does_not_come_back() -> None:
    async def main() -> None:
        records = Slow()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        await one.step("b")
        await one.journal.close()
        records.free.clear()
        two = Life(records)
        await two.journal.start()  # in vain
        with pytest.raises(Unavailable):
            await two.book.delete("", "a")
        records.free.set()
        await two.until(lambda: "b" in known(two))
        assert "a" not in known(two)
        await two.until(lambda: not rows_of(records, "a"))
        assert not await two.book.delete("", "a")
        await two.journal.close()

    asyncio.run(main())


def test_what_is_deleted_while_others_become_known_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        for name in "abc":
            await one.step(name)
        await one.journal.close()
        monkeypatch.setattr(module, "TURN_S", -1.0)  # lets go after each
        two = Life(records)
        starting = asyncio.create_task(two.journal.start())
        while "a" not in known(two):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert "c" not in known(two)
        with pytest.raises(Unavailable):
            await two.book.delete("", "c")
        await starting
        assert known(two).keys() == {"a", "b"}
        await two.until(lambda: not rows_of(records, "c"))
        await two.journal.close()

    asyncio.run(main())


def test_an_error_that_nobody_thought_of_is_told_and_the_journal_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        write, wrong = records.write, [True]

        async def failing(batch: Batch) -> frozenset[TraceName]:
            if wrong:
                raise TypeError("connect() got an unexpected keyword argument")
            return await write(batch)

        records.write = failing  # type: ignore[method-assign]
        await one.step("a")
        await one.until(lambda: one.journal.failing)
        assert one.journal.behind == 1
        wrong.clear()
        await one.written()
        assert rows_of(records, "a")
        await one.journal.close()

    asyncio.run(main())
    assert any("stands still" in record.getMessage() for record in caplog.records)


def test_what_should_have_happened_meanwhile_happens_though_nobody_calls() -> None:
    async def main() -> None:
        records = MemoryRecords()
        one = Life(records)
        await one.journal.start()
        await one.step("a")
        one.send(Suspended(key("a"), 0.01, 0.05, None))
        await one.journal.close()
        assert one.m.trace("a").state == "suspended"
        await asyncio.sleep(0.06)
        two = Life(records)
        await two.journal.start()
        assert two.m.trace("a").state == "ended"
        await two.journal.close()

    asyncio.run(main())

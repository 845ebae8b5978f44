"""Batches in a bucket: every line is told of once, whoever dies, is frozen or goes on, whatever is away or damaged."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from cluster.kept_jobs import _none_left
from jobs import batches as running
from jobs import runner as asking
from jobs.bucket import outputs as lines
from jobs.bucket.batches import BucketBatches
from jobs.bucket.files import BucketFiles
from jobs.bucket.segments import Segment
from jobs.files import FileLimits
from jobs.lines import Call
from jobs.live import StillRuns
from jobs.results import result
from jobs.retries import Answer, NoAnswer
from kvstore.tiers.objects import ObjectsUnreachable
from records.base import RecordsLost
from tests.contract.test_records import on_a_loop
from tests.kept_places import InBucket, Life, in_memory, mortal
from tests.live_batches import ALL, KEPT, live, order, over, read, told, until
from tests.unit.jobs.test_batches import LINES, NOW, Prompt, Slow, calls, new
from tracehaul.runtime.offload import InlineOffload


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "AGAIN_S", 0.01)
    monkeypatch.setattr(asking, "AGAIN_S", 0.01)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_death_between_any_two_effects_loses_nothing_and_doubles_nothing(after: bool, elsewhere: bool) -> None:
    async def main(at: int) -> bool:
        kept, ends, ordered = in_memory(), Life(at, after=after), False
        with suppress(OSError, RecordsLost, ObjectsUnreachable, running.NoRoom):
            async with live(mortal(kept, ends)) as (files, batches):
                await order(files, batches)
                ordered = True
                ended = asyncio.create_task(over(batches))
                await asyncio.wait((ended, asyncio.create_task(ends.dead.wait())), return_when="FIRST_COMPLETED")
                ended.cancel()
        if elsewhere:
            kept.made().gone.add("a")  # type: ignore[attr-defined]
            kept.router = "b"
        async with live(kept) as (files, batches):
            await order(files, batches)
            batch = await over(batches)
            if not ordered and batch.status == "failed":  # nobody was told of it, and its input did not come
                await batches.erase("t")
                await order(files, batches)
                batch = await over(batches)
            assert batch.status == "completed", at
            assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (LINES, LINES - 1, 1), at
            assert await told(files, batch) == ALL, at
            await batches.erase("t")
            await files.erase("t")
            await files.sweep(10**10)
        assert await kept.left() == [], at
        return not ends.dead.is_set()

    deaths = 0
    while not asyncio.run(main(deaths)):
        deaths += 1
    assert deaths > 25, "it has more effects than that"


@pytest.mark.parametrize("after", [False, True])
def test_a_batch_that_was_begun_by_half_leaves_nothing_when_all_of_its_tenant_is_erased(after: bool) -> None:
    async def main(at: int) -> bool:
        kept, ends = in_memory(), Life(at, after=after)
        with suppress(OSError, RecordsLost, ObjectsUnreachable, running.NoRoom):
            async with kept.jobs(wall_s=lambda: NOW) as (files, _):
                upload = await files.arriving("t", "file-in", NOW)
                await upload.write(calls())
                await files.keep(upload, msgspec.structs.replace(KEPT, bytes=upload.size))
                await upload.aclose()
            async with mortal(kept, ends).jobs(wall_s=lambda: NOW) as (_, batches):
                await batches.store.begin(new(), KEPT)
                ends.dead.set()
        async with live(kept) as (files, batches):
            await until(lambda: not batches._live)
            await batches.erase("t")
            await files.erase("t")
            await files.sweep(10**10)
        assert await kept.left() == [], at
        return ends._left >= 0

    deaths = 0
    while not asyncio.run(main(deaths)):
        deaths += 1
    assert deaths >= 5


@on_a_loop
async def test_a_tenant_is_not_said_to_be_erased_before_what_a_router_left_is_taken_over() -> None:
    kept = in_memory()
    async with live(kept, Held()) as (files, batches):
        await order(files, batches)
    kept.made().gone.add("a")  # type: ignore[attr-defined]
    kept.router = "b"
    documents = kept.made()
    store = BucketBatches(
        documents, kept.objects, BucketFiles(documents, kept.objects, FileLimits()), "b", InlineOffload()
    )
    with pytest.raises(StillRuns, match="router a left"):
        await _none_left(store, "t", ["c"])
    assert await _none_left(store, "t", ["a"]) == (0, 0), "it does it itself"
    await store.adopt()
    assert await _none_left(store, "t", ["c"]) == (0, 0)


class Held(Prompt):
    """Answers when it may."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.asked = 0

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
        self.asked += 1
        if self.asked > 2:
            await self.may.wait()
        return await super().ask(call, timeout_s, urgent=urgent)


@pytest.mark.parametrize(("to", "hears"), [("b", False), ("b", True), ("a", False)])
@on_a_loop
async def test_who_was_frozen_and_lost_its_batch_changes_nothing(
    to: str, hears: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another router, or to one of its own name."""
    monkeypatch.setattr(lines, "JOINED", 2)  # it moves lines about, too
    kept, held = in_memory(), Held()
    other = InBucket(kept.made, kept.objects, to)
    async with live(kept, held) as (files, batches), AsyncRest() as rest:
        await order(files, batches)
        await until(lambda: batches.list("t")[0].counts.completed >= 2)
        kept.made().gone.update({"a"} - {to})  # type: ignore[attr-defined]
        second = Held()
        files_b, batches_b = await rest.enter(live(other, second))
        await until(lambda: batches_b.list("t")[0].counts.completed >= 2 and second.asked >= 1)
        if hears:
            batches.lost((await batches.store.adopt()).lost)  # type: ignore[attr-defined]
        held.may.set()
        await until(lambda: batches.get("t", "batch_1") is None)
        second.may.set()
        batch = await over(batches_b)
        assert batch.status == "completed"
        assert await told(files_b, batch) == ALL


@on_a_loop
async def test_a_write_that_came_through_though_it_was_told_to_be_lost_counts_once() -> None:
    kept, put, lost = in_memory(), None, 0

    async def lossy(name: str, view: memoryview) -> None:
        nonlocal lost
        assert put is not None
        await put(name, view)
        if "/lines/" in name and lost < 3:
            lost += 1
            raise ObjectsUnreachable("no answer")

    put, kept.objects.put = kept.objects.put, lossy
    async with live(kept, Slow()) as (files, batches):
        await order(files, batches)
        await until(lambda: batches.list("t")[0].counts.completed >= 2)
    names = [name for name in kept.objects.data if "/lines/" in name]
    assert len(names) > 2, "some are there twice"
    async with live(kept) as (files, batches):
        batch = await over(batches)
        assert batch.counts.completed + batch.counts.failed == LINES
        assert (await told(files, batch)).total() == LINES


@on_a_loop
async def test_what_comes_between_two_files_of_one_delivery_is_in_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, now, half = in_memory(), NOW, asyncio.Event()
    deliver = BucketBatches.deliver

    async def first_alone(self: BucketBatches, *args: Any, ok: bool) -> bool:
        if not ok:
            half.set()
            await asyncio.Event().wait()
        return await deliver(self, *args, ok=ok)

    with monkeypatch.context() as dying:
        dying.setattr(BucketBatches, "deliver", first_alone)
        async with live(kept, Slow(), wall_s=lambda: now) as (files, batches):
            await order(files, batches)
            await until(lambda: batches.list("t")[0].counts.completed >= 2)
            now += 3600
            await half.wait()
    late = result("batch_1", "c4", Answer(200, b"{}"))
    await kept.objects.put(f"batches/batch_1/lines/{Segment.of(1, 999, late, ok=True).name}", memoryview(late))
    async with live(kept, wall_s=lambda: now) as (files, batches):
        batch = await over(batches)
        assert batch.status == "expired"
        found = await told(files, batch)
        assert (found["c4-"], found["c4+"], found.total()) == (1, 0, LINES)
        assert (batch.counts.completed, batch.counts.failed) == (2, LINES - 2)


class AsyncRest:
    """Contexts that end with it."""

    async def __aenter__(self) -> "AsyncRest":
        self._entered: list[Any] = []
        return self

    async def enter(self, context: Any) -> Any:
        self._entered.append(context)
        return await context.__aenter__()

    async def __aexit__(self, *why: Any) -> None:
        for context in self._entered:
            await context.__aexit__(None, None, None)


@pytest.mark.parametrize("part", ["objects", "documents"])
@on_a_loop
async def test_a_batch_waits_for_what_is_away_and_goes_on(part: str) -> None:
    kept = in_memory()

    def away(is_so: bool) -> None:
        if part == "objects":
            kept.objects.failing = is_so
        else:
            kept.made().lost = "away" if is_so else None  # type: ignore[attr-defined]

    for at in range(1, 12, 2):
        held = Prompt()
        flaky = mortal(kept, steps := Steps(at))
        async with live(flaky, held) as (files, batches):
            steps.hit = lambda: away(True)
            ordered = asyncio.create_task(order(files, batches))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await steps.reached.wait()
            await asyncio.sleep(0.05)
            away(False)
            with suppress(OSError, running.NoRoom):
                await ordered
            batches.took((await batches.store.adopt()).found)  # type: ignore[attr-defined]
            if batches.list("t") and (await over(batches)).status == "failed":
                assert ordered.exception() is not None, "nobody was told of it"
                await batches.erase("t")
            await order(files, batches)
            batch = await over(batches)
            assert batch.status == "completed", at
            assert await told(files, batch) == ALL, at
            await batches.erase("t")
            await files.erase("t")


class Steps(Life):
    """Says when so much was asked."""

    def __init__(self, at: int) -> None:
        super().__init__(10**9, after=False)
        self.reached = asyncio.Event()
        self.hit: Callable[[], None] | None = None
        self._at = at

    async def ask(self, lost: type[Exception], call: Callable[[], Awaitable[Any]]) -> Any:
        if self.hit is not None:
            self._at -= 1
            if self._at == 0:
                self.hit()
                self.reached.set()
        return await call()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
@pytest.mark.parametrize("when", ["running", "delivering"])
@on_a_loop
async def test_lines_that_the_bucket_lost_are_asked_again_or_said_to_be_lost(
    damage: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = in_memory()

    def broken() -> None:
        name = next(name for name in kept.objects.data if "/lines/" in name and ".ok." in name)
        match damage:
            case "flip":
                kept.objects.data[name][9] ^= 1
            case "cut":
                del kept.objects.data[name][-1:]
            case _:
                del kept.objects.data[name]

    first = Slow()
    async with live(kept, first) as (files, batches):
        await order(files, batches)
        await until(lambda: batches.list("t")[0].counts.completed >= 2)
        if when == "delivering":
            broken()
            await batches.cancel(batches.list("t")[0])
            batch = await over(batches)
            found = await told(files, batch)
            assert {name[:2] for name in found} == {f"c{at}" for at in range(LINES)}
            assert (found.total(), batch.counts.completed + batch.counts.failed) == (LINES, LINES)
            file = await files.get("t", batch.error_file_id or "", NOW)
            assert file is not None
            assert b'"answer_lost"' in await read(files, file)
            return
    broken()
    async with live(kept) as (files, batches):
        batch = await over(batches)
        assert batch.status == "completed"
        assert await told(files, batch) == ALL or (await told(files, batch)).total() == LINES


@pytest.mark.parametrize("damage", ["flip", "missing"])
@on_a_loop
async def test_an_input_that_is_damaged_fails_the_batch_and_says_so(damage: str) -> None:
    kept = in_memory()
    async with kept.jobs(wall_s=lambda: NOW) as (files, batches):
        upload = await files.arriving("t", "file-in", NOW)
        await upload.write(calls())
        await files.keep(upload, msgspec.structs.replace(KEPT, bytes=upload.size))
        await upload.aclose()
        await batches.store.begin(new(), KEPT)
    name = "batches/batch_1/input"
    if damage == "flip":
        kept.objects.data[name][9] ^= 1
    else:
        del kept.objects.data[name]
    async with live(kept) as (files, batches):
        batch = await over(batches)
        assert batch.status == "failed"
        assert batch.errors[0].code == "file_unreadable"
        assert damage[:4] in batch.errors[0].message or "damaged" in batch.errors[0].message


@on_a_loop
async def test_many_lines_become_few_objects() -> None:
    count = 1000
    body = {"model": "m", "prompt": "hi"}
    rows = [{"custom_id": f"c{at}", "method": "POST", "url": "/v1/completions", "body": body} for at in range(count)]
    kept = in_memory()
    most = 0

    class Watching(Prompt):
        async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
            nonlocal most
            most = max(most, sum("/lines/" in name for name in kept.objects.data))
            return Answer(200, b"{}")

    async with live(kept, Watching()) as (files, batches):
        await order(files, batches, b"\n".join(map(msgspec.json.encode, rows)))
        batch = await over(batches)
        assert batch.counts.completed == count
        assert (await told(files, batch)).total() == count
    assert 0 < most < 2 * lines.JOINED, "they are put together"

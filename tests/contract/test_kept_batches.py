"""What keeps batches, whichever it is: every line is told of once, and what was answered is not asked again."""

import pytest

from jobs import batches as running
from jobs import runner as asking
from jobs.lines import Call
from jobs.retries import Answer, NoAnswer
from tests.contract.test_kept_files import Place, place
from tests.contract.test_records import on_a_loop
from tests.live_batches import ALL, KEPT, live, order, over, told, until
from tests.unit.jobs.test_batches import LINES, NOW, Prompt, Slow

__all__ = ["place"]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "AGAIN_S", 0.01)
    monkeypatch.setattr(asking, "AGAIN_S", 0.01)


@on_a_loop
async def test_a_batch_is_answered_and_leaves_its_files_alone(place: Place) -> None:
    async with live(place) as (files, batches):
        await order(files, batches)
        await files.delete(KEPT)
        batch = await over(batches)
        assert batch.status == "completed"
        assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (LINES, LINES - 1, 1)
        assert await told(files, batch) == ALL
    async with live(place) as (files, batches):
        assert batches.get("t", "batch_1") == batch
        assert await batches.erase("t") == 1
        assert await files.erase("t") == 2
    assert await place.left() == []


@on_a_loop
async def test_what_was_answered_is_not_asked_again_by_the_next_life(place: Place) -> None:
    first = Slow()
    async with live(place, first) as (files, batches):
        await order(files, batches)
        await until(lambda: batches.list("t")[0].counts.completed >= 2)
    asked: list[str] = []

    class Counting(Prompt):
        async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
            asked.append(call.custom_id)
            return Answer(200, b"{}")

    async with live(place, Counting()) as (files, batches):
        batch = await over(batches)
        assert len(asked) == LINES - 2
        assert sum((await told(files, batch)).values()) == batch.counts.completed == LINES


@on_a_loop
async def test_what_there_is_is_delivered_when_the_window_is_over(place: Place) -> None:
    now = NOW
    async with live(place, Slow(), wall_s=lambda: now) as (files, batches):
        await order(files, batches)
        await until(lambda: batches.list("t")[0].counts.completed >= 2)
        now += 3600
        batch = await over(batches)
        assert batch.status == "expired"
        found = await told(files, batch)
        assert (sum(name.endswith("+") for name in found), found.total()) == (2, LINES)

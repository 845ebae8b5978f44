"""Batches over whatever death: whoever starts next goes on, and every line is in one of the two files, once."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from jobs.batch import OVER, Batch
from jobs.batches import Batches
from jobs.cap import fixed
from jobs.files import File, FileLimits
from jobs.folder.batches import FolderBatches
from jobs.folder.files import FolderFiles
from jobs.lines import Call
from jobs.live import Means, TooMany
from jobs.retries import Answer, NoAnswer
from jobs.runner import Runner
from tests.folder_jobs import folder_batches
from tracehaul.runtime.offload import InlineOffload

T = TypeVar("T")

LINES = 5
WRONG = "c3"
DEAD = 9
NOW = 1_000_000


class Dying(InlineOffload):
    """Its process ends, as by kill -9, before or after its n-th work."""

    def __init__(self, at: int, *, after: bool) -> None:
        super().__init__()
        self._left = at
        self._after = after

    async def run(self, function: Callable[[], T]) -> T:
        self._left -= 1
        if self._left < 0 and not self._after:
            os._exit(DEAD)
        result = await super().run(function)
        if self._left < 0:
            os._exit(DEAD)
        return result


class Prompt:
    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
        return Answer(400 if call.custom_id == WRONG else 200, b'{"a": 1}', "req")


class Slow:
    """Answers the first lines, and none after."""

    def __init__(self) -> None:
        self.answered = 0

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
        if self.answered == 2:
            await asyncio.Event().wait()
        self.answered += 1
        return Answer(200, b"{}")


def calls() -> bytes:
    body = {"model": "m", "prompt": "hi"}
    lines = [{"custom_id": f"c{at}", "method": "POST", "url": "/v1/completions", "body": body} for at in range(LINES)]
    return b"\n".join(map(msgspec.json.encode, lines))


def new() -> Batch:
    return Batch("batch_1", "t", "/v1/completions", "file-in", "1h", NOW, NOW + 3600)


async def live(
    folder: Path, offload: InlineOffload, use: Callable[[Batches, FolderFiles], "asyncio.Future[T]"], **more
) -> T:
    """What ``use`` does while batches run."""
    files = FolderFiles(folder / "files", FileLimits(), offload)
    batches = folder_batches(folder / "batches", files, offload, 2, wall_s=more.get("wall_s", lambda: NOW))
    runner = Runner(fixed(2), random.Random(1))
    asker = more.get("asker", Prompt())
    running = [
        asyncio.create_task(runner.run()),
        asyncio.create_task(batches.run(Means(runner, lambda batch: asker, lambda batch, model: None))),
    ]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(20):
            return await use(batches, files)
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        files.close()


async def over(batches: Batches) -> Batch:
    while (batch := batches.get("t", "batch_1")) is None or batch.status not in OVER:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return batch


async def order(batches: Batches, files: FolderFiles) -> Batch:
    """Upload and begin what is not there yet, and see it to its end."""
    if (file := await files.get("t", "file-in", NOW)) is None:
        upload = await files.arriving("t", "file-in", NOW)
        await upload.write(calls())
        file = File("file-in", "t", "in", "batch", upload.size, NOW)
        await files.keep(upload, file)
        upload.close()
    if batches.get("t", "batch_1") is None:
        await batches.create(new(), file)
    return await over(batches)


def told(folder: Path, batch: Batch) -> Counter[str]:
    """How often each line was told of, by its file."""
    found: Counter[str] = Counter()
    for name, mark in ((batch.output_file_id, "+"), (batch.error_file_id, "-")):
        if name is not None:
            lines = (folder / "files" / f"{name}.bytes").read_bytes().splitlines()
            found.update(msgspec.json.decode(line)["custom_id"] + mark for line in lines)
    return found


@pytest.mark.parametrize("after", [False, True])
def test_a_death_between_any_two_effects_loses_nothing_and_doubles_nothing(tmp_path: Path, after: bool) -> None:
    expected = Counter({f"c{at}{'-' if f'c{at}' == WRONG else '+'}": 1 for at in range(LINES)})
    deaths = 0
    while True:
        folder = tmp_path / str(deaths)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                asyncio.run(live(folder, Dying(deaths, after=after), order))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        batch = asyncio.run(live(folder, InlineOffload(), order))
        assert batch.status == "completed", deaths
        assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (LINES, LINES - 1, 1)
        assert told(folder, batch) == expected, deaths
        assert sorted(path.suffix for path in (folder / "batches").iterdir()) == [".json"]
        if code == 0:
            break
        assert code == DEAD
        deaths += 1
    assert deaths > 15, "it has more effects than that"


def test_what_there_is_is_delivered_when_the_window_is_over(tmp_path: Path) -> None:
    now, asker = NOW, Slow()

    async def use(batches: Batches, files: FolderFiles) -> Batch:
        nonlocal now
        ending = asyncio.create_task(order(batches, files))
        while (batch := batches.get("t", "batch_1")) is None or batch.counts.completed < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        now += 3600
        return await ending

    batch = asyncio.run(live(tmp_path, InlineOffload(), use, wall_s=lambda: now, asker=asker))
    assert batch.status == "expired"
    found = told(tmp_path, batch)
    assert sum(found.values()) == LINES
    assert sum(name.endswith("+") for name in found) == 2
    assert batch.error_file_id is not None
    errors = (tmp_path / "files" / f"{batch.error_file_id}.bytes").read_bytes()
    assert errors.count(b'"batch_expired"') == LINES - 2


def test_so_many_are_taken_of_a_tenant(tmp_path: Path) -> None:
    async def use(batches: Batches, files: FolderFiles) -> None:
        ending = asyncio.create_task(order(batches, files))
        while batches.get("t", "batch_1") is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        file = await files.get("t", "file-in", NOW)
        assert file is not None
        await batches.create(msgspec.structs.replace(new(), id="batch_2"), file)
        with pytest.raises(TooMany):
            await batches.create(msgspec.structs.replace(new(), id="batch_3"), file)
        await batches.create(msgspec.structs.replace(new(), id="batch_4", tenant="other"), file)
        ending.cancel()

    asyncio.run(live(tmp_path, InlineOffload(), use, asker=Slow()))


def test_who_left_before_a_batch_had_begun_leaves_none(tmp_path: Path) -> None:
    begin, may = FolderBatches.begin, asyncio.Event()

    async def main() -> None:
        files = FolderFiles(tmp_path / "files", FileLimits(), InlineOffload())
        batches = folder_batches(tmp_path / "batches", files, InlineOffload(), 1, wall_s=lambda: NOW)
        upload = await files.arriving("t", "file-in", NOW)
        await upload.write(calls())
        file = File("file-in", "t", "in", "batch", upload.size, NOW)
        await files.keep(upload, file)
        await upload.aclose()

        async def slowly(batch: Batch, file: File) -> None:
            await may.wait()
            await begin(store, batch, file)

        store = batches.store
        assert isinstance(store, FolderBatches)
        store.begin = slowly  # type: ignore[method-assign]
        creating = asyncio.create_task(batches.create(new(), file))
        await asyncio.sleep(0.01)
        creating.cancel()
        await asyncio.wait([creating])
        with pytest.raises(TooMany):
            await batches.create(new(), file)
        may.set()
        await asyncio.sleep(0.05)
        assert list((tmp_path / "batches").iterdir()) == []
        await batches.create(new(), file)
        assert len(batches.list("t")) == 1
        files.close()

    asyncio.run(main())

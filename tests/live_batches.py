"""A process that runs batches, wherever they are kept, and what it told of each line: for suites."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from jobs.batch import OVER, Batch
from jobs.batches import Batches
from jobs.cap import fixed
from jobs.files import File, Files
from jobs.live import Means
from jobs.runner import Runner
from tests.kept_places import InBucket, InFolder
from tests.unit.jobs.test_batches import LINES, NOW, WRONG, Prompt, calls, new

ALL = Counter({f"c{at}{'-' if f'c{at}' == WRONG else '+'}": 1 for at in range(LINES)})


@asynccontextmanager
async def live(place: InFolder | InBucket, asker: Any = None, **more: Any) -> AsyncIterator[tuple[Files, Batches]]:
    """A process that runs batches."""
    async with place.jobs(**{"wall_s": lambda: NOW, **more}) as (files, batches):
        runner = Runner(fixed(2), random.Random(1))
        means = Means(runner, lambda batch: asker or Prompt(), lambda batch, model: None)
        tasks = [asyncio.create_task(runner.run()), asyncio.create_task(batches.run(means))]
        await asyncio.sleep(0)
        try:
            yield files, batches
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def order(files: Files, batches: Batches, content: bytes | None = None) -> None:
    """Upload and begin what is not there yet."""
    if (file := await files.get("t", "file-in", NOW)) is None:
        upload = await files.arriving("t", "file-in", NOW)
        await upload.write(content or calls())
        file = msgspec.structs.replace(KEPT, bytes=upload.size)
        await files.keep(upload, file)
        await upload.aclose()
    if batches.get("t", "batch_1") is None:
        await batches.create(new(), file)


KEPT = File("file-in", "t", "in", "batch", 0, NOW)


async def until(so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not so():  # noqa: ASYNC110 - whatever it looks at
            await asyncio.sleep(0.002)


async def over(batches: Batches) -> Batch:
    await until(lambda: (batch := batches.get("t", "batch_1")) is not None and batch.status in OVER)
    await until(lambda: not batches._live)
    batch = batches.get("t", "batch_1")
    assert batch is not None
    return batch


async def told(files: Files, batch: Batch) -> Counter[str]:
    """How often each line was told of, by its file."""
    found: Counter[str] = Counter()
    for name, mark in ((batch.output_file_id, "+"), (batch.error_file_id, "-")):
        if name is not None:
            file = await files.get("t", name, NOW)
            assert file is not None
            found.update(
                msgspec.json.decode(line)["custom_id"] + mark for line in (await read(files, file)).splitlines()
            )
    return found


async def read(files: Files, file: File) -> bytes:
    """All of it."""
    return b"".join([chunk async for chunk in await files.open(file)])

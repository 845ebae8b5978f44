"""What clients keep at a router, files and batches: opened with it, swept as it runs."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from jobs.batches import Batches
from jobs.files import FileLimits, Files
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.runtime.tasks import Tasks

log = Log(__name__)

SWEEP_S = 60.0


@asynccontextmanager
async def opened_jobs(folder: Path, config: ApiConfig) -> AsyncGenerator[Jobs | None, None]:
    """What is in that folder, as long as this is open; None: it cannot be had, and the router serves without."""
    offload, writing = ThreadOffload("files", threads=2), ThreadOffload("batches", threads=2)
    checking = ThreadOffload("checks")  # seconds each: nothing short waits behind them
    try:
        limits = FileLimits(config.file_bytes_max, config.files_bytes_max, config.files_max)
        try:
            files = await offload.run(lambda: Files(folder / "files", limits, offload))
        except OSError as error:
            log.warning("neither files nor batches are served", folder=folder, why=error)
            yield None
            return
        try:
            make = partial(Batches, folder / "batches", files, writing, checking, config.batches_max)
            batches = await writing.run(make)
            async with Tasks("files") as tasks:
                tasks.start(_sweeping(files), "sweep")
                yield Jobs(files, batches)
        finally:
            files.close()
    finally:
        checking.close()
        writing.close()
        offload.close()


async def _sweeping(files: Files) -> None:
    while True:
        await files.sweep(int(wall_s()))
        await asyncio.sleep(SWEEP_S)

"""What clients keep at a router: opened with it, swept as it runs."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from jobs.files import FileLimits, Files
from router.http.config import ApiConfig
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.runtime.tasks import Tasks

log = Log(__name__)

SWEEP_S = 60.0


@asynccontextmanager
async def opened_files(folder: Path, config: ApiConfig) -> AsyncGenerator[Files | None, None]:
    """The files in that folder, as long as this is open; None: they cannot be had, and the router serves without."""
    offload = ThreadOffload("files", threads=2)
    try:
        limits = FileLimits(config.file_bytes_max, config.files_bytes_max, config.files_max)
        try:
            files = await offload.run(lambda: Files(folder, limits, offload))
        except OSError as error:
            log.warning("files cannot be kept: /v1/files is not served", folder=folder, why=error)
            yield None
            return
        try:
            async with Tasks("files") as tasks:
                tasks.start(_sweeping(files), "sweep")
                yield files
        finally:
            files.close()
    finally:
        offload.close()


async def _sweeping(files: Files) -> None:
    while True:
        await files.sweep(int(wall_s()))
        await asyncio.sleep(SWEEP_S)

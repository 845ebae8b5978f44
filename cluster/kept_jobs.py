"""What clients keep at a router, files and batches, in a folder or in a bucket: opened with it, swept as it runs."""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from jobs.batches import Batches
from jobs.bucket.batches import BucketBatches
from jobs.bucket.files import BucketFiles
from jobs.bucket.objects import Objects, told
from jobs.files import FileLimits, Files
from jobs.folder.batches import FolderBatches
from jobs.folder.files import FolderFiles
from jobs.folder.left import BATCHES, FILES, KNOWN, locked, others
from jobs.live import StillRuns
from kvstore.tiers.objects import parse_url
from records.documents import Documents
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from tracehaul.runtime.clock import now_s, wall_s
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload, ThreadOffload
from tracehaul.runtime.tasks import Tasks

log = Log(__name__)


class _Whose(msgspec.Struct):
    tenant: str


seldom = Seldom(log, 60.0)

SWEEP_S = 60.0
LOOK_S = 2.0
"""So often it is looked what other routers have left."""
GONE_S = 10.0
"""A router whose folder nobody has had for so long is not about to start again."""
KNOWN_S = 5.0
"""A router that starts waits so long for the database to tell of its batches."""
BUSY_S = 10.0
"""A folder of one's own that somebody has is waited for: what was left in it is being moved."""


@asynccontextmanager
async def opened_jobs(folder: Path, config: ApiConfig) -> AsyncGenerator[Jobs | None, None]:
    """What is in that folder, as long as this is open, and what routers that are gone have left in those beside it;
    None: it cannot be had, and the router serves without."""
    offload, writing = ThreadOffload("files", threads=2), ThreadOffload("batches", threads=2)
    checking = ThreadOffload("checks")  # seconds each: nothing short waits behind them
    try:
        try:
            files = await _files(folder / FILES, _limits(config), offload)
        except OSError as error:
            log.warning("neither files nor batches are served", folder=folder, why=error)
            yield None
            return
        try:
            store = await writing.run(partial(FolderBatches, folder / BATCHES, files, writing, checking))
            batches = Batches(store, store.found, checking, config.batches_max)
            async with Tasks("files") as tasks:
                tasks.start(_sweeping(files), "sweep")
                tasks.start(_adopting(folder, files, store, batches, offload), "adopt")
                yield Jobs(files, batches, partial(_held, folder, offload), partial(_erase_left, folder, offload))
        finally:
            files.close()
    finally:
        checking.close()
        writing.close()
        offload.close()


@asynccontextmanager
async def opened_bucket(
    config: ApiConfig, documents: Documents, scope: str, router: str
) -> AsyncGenerator[Jobs | None, None]:
    """What is in the bucket and the database, as :func:`opened_jobs`. Neither must answer now.

    Args:
        config: says where the bucket is.
        documents: of the database; the caller closes them.
        scope: tells what is there from what others have there.
        router: whose batches these are.
    """
    from kvstore.tiers.s3 import PART_TIMEOUT_S, NoBucket, S3Objects

    bucket, prefix = parse_url(config.files_url)
    checking = ThreadOffload("checks")
    try:
        try:
            objects = S3Objects(bucket, f"{prefix}/{scope}".lstrip("/"), PART_TIMEOUT_S)
        except NoBucket as error:
            log.warning("neither files nor batches are served", bucket=config.files_url, why=error)
            yield None
            return
        files = BucketFiles(documents, objects, _limits(config))
        store = BucketBatches(documents, objects, files, router, checking)
        batches = Batches(store, (), checking, config.batches_max)
        async with Tasks("files") as tasks:
            tasks.start(_sweeping(files), "sweep")
            known = asyncio.Event()
            tasks.start(_going_on(store, batches, known), "adopt")
            tasks.start(_probing(objects, config.files_url), "probe")
            with suppress(TimeoutError):
                async with asyncio.timeout(KNOWN_S):
                    await known.wait()
            yield Jobs(files, batches, store.held, partial(_none_left, store), shared=True)
    finally:
        checking.close()


async def _probing(objects: Objects, url: str) -> None:
    """Say at the start what would be said with the first file."""
    try:
        with told():
            async for _ in objects.pages("files/none"):
                pass
    except OSError as error:
        log.error("the bucket of files cannot be used now: it is tried with each call", url=url, why=error.strerror)


async def _going_on(store: BucketBatches, batches: Batches, known: asyncio.Event) -> None:
    """Go on with what this router had before, and with what others left; what it had is known then, or cannot be."""
    while True:
        try:
            adopted = await store.adopt()
            batches.took(adopted.found)
            batches.lost(adopted.lost)
            if adopted.found:
                log.info("batches are gone on with", batches=len(adopted.found))
        except OSError as error:
            seldom.warning("batches of before, and of others, are not known yet", why=error)
        known.set()
        await asyncio.sleep(LOOK_S)


def _limits(config: ApiConfig) -> FileLimits:
    return FileLimits(config.file_bytes_max, config.files_bytes_max, config.files_max)


async def _files(folder: Path, limits: FileLimits, offload: Offload) -> FolderFiles:
    """Raises OSError."""
    until_s = now_s() + BUSY_S
    while True:
        try:
            return await offload.run(partial(FolderFiles, folder, limits, offload))
        except BlockingIOError:
            if now_s() > until_s:
                raise
        await asyncio.sleep(BUSY_S / 20)


async def _adopting(folder: Path, files: FolderFiles, store: FolderBatches, batches: Batches, offload: Offload) -> None:
    """Go on with what is left in the folders beside this one, once nobody has had one for :data:`GONE_S`."""
    free_s: dict[Path, float] = {}
    while True:
        try:
            left = await offload.run(partial(others, folder))
            free_s = {each: free_s.get(each, now_s()) for each in left if await offload.run(partial(_is_free, each))}
            for each in [each for each, since_s in free_s.items() if now_s() - since_s >= GONE_S]:
                del free_s[each]
                await _adopt(each, files, store, batches)
        except OSError as error:
            seldom.warning("what other routers left is not gone on with", folder=folder.parent, why=error)
        await asyncio.sleep(LOOK_S)


async def _held(folder: Path, offload: Offload, living: Collection[str]) -> str | None:
    """See :attr:`router.http.jobs.Jobs.held`."""
    for each in await offload.run(partial(others, folder)):
        if each.name not in living and not await offload.run(partial(_is_free, each)):
            return each.name
    return None


async def _erase_left(folder: Path, offload: Offload, tenant: str, living: Collection[str] | None) -> tuple[int, int]:
    """See :attr:`router.http.jobs.Jobs.erase_left`."""
    batches = files = 0
    for each in await offload.run(partial(others, folder)):
        gone = await offload.run(partial(_erased, each, tenant))
        if gone is None and living is not None and each.name not in living:
            raise StillRuns(f"the router {each.name} has its folder, and does not answer")
        batches, files = batches + (gone or (0, 0))[0], files + (gone or (0, 0))[1]
    return batches, files


async def _none_left(store: BucketBatches, tenant: str, living: Collection[str] | None) -> tuple[int, int]:
    """See :attr:`router.http.jobs.Jobs.erase_left`: nothing, once what routers had that are gone is taken over."""
    if living is not None and (router := await store.held(living)) is not None:
        raise StillRuns(f"what the router {router} left is not taken over yet")
    return 0, 0


def _erased(folder: Path, tenant: str) -> tuple[int, int] | None:
    """None: somebody has it."""
    with locked(folder) as mine:
        return (_gone(folder / BATCHES, tenant), _gone(folder / FILES, tenant)) if mine else None


def _gone(folder: Path, tenant: str) -> int:
    """How many of theirs there were; what is known of each goes first."""
    count = 0
    for path in folder.glob(f"*{KNOWN}"):
        try:
            theirs = msgspec.json.decode(path.read_bytes(), type=_Whose).tenant == tenant
        except (msgspec.DecodeError, UnicodeError):
            continue
        if theirs:
            count += 1
            path.unlink()
            for part in folder.glob(f"{path.stem}.*"):
                part.unlink(missing_ok=True)
    return count


def _is_free(folder: Path) -> bool:
    with locked(folder) as mine:
        return mine


async def _adopt(folder: Path, files: FolderFiles, store: FolderBatches, batches: Batches) -> None:
    with locked(folder) as mine:
        if mine:
            kept, found = await files.adopt(folder / FILES), await store.adopt(folder / BATCHES)
            batches.took(found)
            log.info(
                "files and batches of a router that is gone are here", of=folder.name, files=kept, batches=len(found)
            )


async def _sweeping(files: Files) -> None:
    while True:
        await files.sweep(int(wall_s()))
        await asyncio.sleep(SWEEP_S)

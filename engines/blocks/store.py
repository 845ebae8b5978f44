"""The store as an engine calls it: from threads that wait, with a deadline for each call, and no exception."""

import asyncio
import concurrent.futures
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engines.blocks.config import EngineConfig, EngineRefused
from engines.blocks.direct import GOOD, Beside, Direct
from engines.blocks.joined import Joined
from engines.blocks.pages import Page
from kvstore.client import OutgoingBlock, StagingBuffer
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, setup_beside
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.ids import BlockHash

log = Log(__name__)

T = TypeVar("T")

LATE_S = 0.5
"""The loop thread ends what is asked of it at its deadline; only if it cannot run at all is it left behind."""
CLOSE_S = 5.0
PART_BYTES = 16 << 20
"""Blocks move in parts of about so much: one is copied between pages and staging memory while the next is with the
store, and what was copied is still in the processor's cache."""
PARTS = 2
"""Of one get, on their way at a time."""


class EngineStats(msgspec.Struct):
    """Counts since the start, in blocks. Each is written by whoever counts, so they are near enough."""

    got: int = 0
    missed: int = 0
    put: int = 0
    lost: int = 0
    """Blocks that no store took in time."""
    dropped: int = 0
    """Blocks that found no free staging memory, and were not waited for."""


class EngineStore:
    """Blocks of one layout, from any thread. What is lost, late, refused or wrong is a miss.

    Pages of host memory go to stores of the same host as they are (:mod:`.direct`). Between others no transfer ever
    touches a page: what misses its deadline lands in staging memory, which is used again only when it has settled.
    """

    def __init__(self, config: EngineConfig, layout: KVLayout, page_bytes: int, rank: str = "") -> None:
        """Join, and wait for the stores at most ``config.attach_s``; without any it goes on, and misses.

        Args:
            config: the server's.
            layout: of this rank's blocks.
            page_bytes: the most that a block takes.
            rank: what tells this process from its server's others; empty: there are none.

        Raises:
            EngineRefused: it cannot be used as it is set up.
        """
        self.root = layout.root()
        self.stats = EngineStats()
        self._config = config
        self._ready = False
        self._refused: str | None = None
        self._news = threading.Event()
        self._room = threading.Condition()
        self._free: deque[StagingBuffer] = deque()
        self._part_blocks = PART_BYTES // max(page_bytes, 1) or 1
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        name = f"{config.name}-{rank}" if rank else config.name
        setup_beside(name)
        self._joined = Joined(config, layout, page_bytes, name, self._told)
        self._direct = Direct(self._joined, self._submit, config.staging_bytes // 2)
        self._thread = threading.Thread(target=self._run, name="tracehaul-store", daemon=True)
        self._thread.start()
        self._news.wait(config.attach_s)
        if self._refused is not None:
            self._thread.join(CLOSE_S)
            raise EngineRefused(self._refused)
        if not self._ready:
            log.warning("no store was found: all is computed until one is", routers=config.routers)
        file = config.layout_file or os.environ.get("TRACEHAUL_LAYOUT_FILE", "")
        if file and rank in ("", "0"):
            made = Path(f"{file}.{os.getpid()}")
            made.write_bytes(msgspec.json.encode(layout))
            made.replace(file)  # whoever waits for it finds it whole

    def now_s(self) -> float:
        """Of the store's loop, from any thread."""
        return self._loop.time()

    @property
    def ready(self) -> bool:
        """Whether blocks move: a store gave back what it was given, and the pool is ours."""
        return self._ready and self._refused is None

    @property
    def puts_free(self) -> int:
        """Blocks that :meth:`put_later` would take now."""
        return len(self._free)

    def exists(self, hashes: Sequence[BlockHash]) -> int:
        """How many of them, from the first on, some store holds. A hint."""
        looking = self.looking(hashes)
        return self._result(looking, self._config.timeout_s) or 0

    def looking(self, hashes: Sequence[BlockHash]) -> "concurrent.futures.Future[int] | None":
        """As :meth:`exists`, for who cannot wait; None: nothing is there."""
        if not self.ready or not hashes:
            return None
        return self._submit(self._look(list(hashes)))

    def get(self, hashes: Sequence[BlockHash], pages: Sequence[Page], timeout_s: float | None = None) -> list[bool]:
        """Land block ``i`` in ``pages[i]``; whether it did. One that did not may hold anything only if it was begun.
        ``timeout_s``: as configured if not given."""
        timeout_s = self._config.timeout_s if timeout_s is None else timeout_s
        pieces = self._direct.lends(pages) if self.ready and timeout_s > 0 else None
        if pieces is not None:
            return self._got(self._direct.get(hashes, pieces, partial(self._result, timeout_s=timeout_s), timeout_s))
        goods: list[bool] = []
        deadline_s = self.now_s() + timeout_s
        parts: deque[_Lent] = deque()
        begun = 0
        while True:
            while begun < len(hashes) and len(parts) < PARTS and self.ready and self.now_s() < deadline_s:
                parts.append(self._start_get(hashes[begun:], deadline_s))
                begun += parts[-1].count
            if not parts:
                break
            goods += self._end_get(parts.popleft(), pages[len(goods) :])
        return self._got(goods + [False] * (len(hashes) - len(goods)))

    def put(
        self, hashes: Sequence[BlockHash], parents: Sequence[BlockHash], pages: Sequence[Page], tenant: str = ""
    ) -> list[bool]:
        """Publish blocks; whether each can be got now. Waits for staging memory and for the stores."""
        timeout_s = self._config.timeout_s
        pieces = self._direct.lends(pages) if self.ready else None
        if pieces is not None:
            wait = partial(self._result, timeout_s=timeout_s)
            return self._were_put(self._direct.put(hashes, parents, pieces, tenant, wait, timeout_s))
        parts: list[tuple[int, concurrent.futures.Future[list[bool]] | None]] = []
        deadline_s = self.now_s() + timeout_s
        at = 0
        while at < len(hashes) and self.ready and (left_s := deadline_s - self.now_s()) > 0:
            with self._room:
                self._room.wait_for(lambda: self._free, left_s)
            parts.append(self._start_put(hashes[at:], parents[at:], pages[at:], tenant, deadline_s))
            if not parts[-1][0]:
                break
            at += parts[-1][0]
        goods: list[bool] = []
        for taken, putting in parts:
            goods += self._result(putting, deadline_s - self.now_s()) or [False] * taken
        return goods + [False] * (len(hashes) - len(goods))

    def put_later(
        self, hashes: Sequence[BlockHash], parents: Sequence[BlockHash], pages: Sequence[Page], tenant: str = ""
    ) -> int:
        """Copy the first of the blocks, as many as there is free staging memory for, and publish them in the
        background; how many. Waits for nothing; the pages may change as soon as it returns."""
        taken, deadline_s = 0, self.now_s() + self._config.timeout_s
        while taken < len(hashes) and self.ready:
            more, _ = self._start_put(hashes[taken:], parents[taken:], pages[taken:], tenant, deadline_s)
            if not more:
                break
            taken += more
        self.stats.dropped += len(hashes) - taken
        return taken

    def put_beside(
        self, hashes: Sequence[BlockHash], parents: Sequence[BlockHash], pages: Sequence[Page], tenant: str = ""
    ) -> Beside | None:
        """As :meth:`put_later`, from where they are; see :class:`Beside`. None: they cannot be lent."""
        pieces = self._direct.lends(pages) if self.ready else None
        if pieces is None:
            return None
        until_s = self.now_s() + self._config.timeout_s
        beside = self._direct.put_beside(hashes, parents, pieces, tenant, until_s, self._were_put)
        self.stats.dropped += len(hashes) - beside.count
        return beside

    def close(self) -> None:
        """Leave the fleet. Calls after it miss."""
        self._refused = self._refused or "closed"
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(CLOSE_S)

    # --- the loop's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._joined.run(self._stopping, self._open))
        except BaseExceptionGroup as group:
            self._refuse(_first(group))
        except Exception as error:
            self._refuse(error)
        finally:
            self._ready = False
            self._news.set()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.close()

    def _refuse(self, error: BaseException) -> None:
        known = isinstance(error, EngineRefused | ClusterError | OSError)
        text = " ".join(str(error).split())
        self._refused = text if isinstance(error, EngineRefused) else f"tracehaul: {text or type(error).__name__}"
        log.error("the store is not used", why=self._refused, error=None if known else error)

    def _open(self) -> None:
        self._free.extend(self._joined.puts)

    def _told(self, refused: str | None) -> None:
        self._refused = self._refused or refused
        self._ready = True
        self._news.set()

    async def _look(self, hashes: list[BlockHash]) -> int:
        where = await self._joined.client.exists(hashes)
        return next((place for place, node in enumerate(where) if node is None), len(where))

    async def _land(self, lent: "_Lent", hashes: Sequence[BlockHash], timeout_s: float) -> None:
        staging = self._joined.client.staging
        deadline_s = clock.now_s() + timeout_s
        buffers = await staging.acquire(len(hashes), timeout_s)
        given = False
        try:
            sizes = await self._joined.client.get(hashes, buffers, deadline_s - clock.now_s())
            given = lent.give(buffers, sizes)
        finally:
            if not given:
                staging.release(buffers)

    async def _publish(self, blocks: list[OutgoingBlock], tenant: str, deadline_s: float) -> list[bool]:
        try:
            outcomes = await self._joined.put(blocks, max(0.0, deadline_s - clock.now_s()), tenant)
        finally:
            for block in blocks:
                self._give_back(block.buffer)
        return self._were_put([outcome in GOOD for outcome in outcomes])

    def _give_back(self, buffer: StagingBuffer) -> None:
        """For the next put, once no transfer reads from it."""
        unsettled = buffer.unsettled()
        if unsettled is not None:
            unsettled.add_done_callback(lambda _: self._give_back(buffer))
            return
        with self._room:
            self._free.append(buffer)
            self._room.notify_all()

    # --- the engine's threads -----------------------------------------------------------------------------

    def _start_get(self, hashes: Sequence[BlockHash], deadline_s: float) -> "_Lent":
        """The first of the blocks, on their way to staging memory."""
        staging = self._joined.client.staging
        count = min(len(hashes), self._part_blocks, max(1, (staging.count - len(self._joined.puts)) // PARTS))
        lent = _Lent(count, deadline_s)
        lent.landing = self._submit(self._land(lent, list(hashes[:count]), deadline_s - self.now_s()))
        return lent

    def _end_get(self, lent: "_Lent", pages: Sequence[Page]) -> list[bool]:
        """Wait for what was begun, and copy it; whether each block is there."""
        lent.wait(lent.deadline_s - self.now_s() + LATE_S)
        landed = lent.take()
        if landed is None:
            if lent.landing is not None:
                lent.landing.cancel()
            return [False] * lent.count
        buffers, sizes = landed
        goods: list[bool] = []
        try:
            for page, buffer, size in zip(pages, buffers, sizes, strict=False):
                good = size == page.nbytes
                if good:
                    page.load(buffer.view(page.nbytes))
                goods.append(good)
        except Exception as error:
            log.error("a block could not be copied to the engine", error=error)
        finally:
            self._soon(self._joined.client.staging.release, buffers)
        return goods + [False] * (lent.count - len(goods))

    def _start_put(
        self,
        hashes: Sequence[BlockHash],
        parents: Sequence[BlockHash],
        pages: Sequence[Page],
        tenant: str,
        deadline_s: float,
    ) -> "tuple[int, concurrent.futures.Future[list[bool]] | None]":
        """How many of the first blocks were copied, and what becomes of them."""
        with self._room:
            buffers = [self._free.popleft() for _ in range(min(len(hashes), self._part_blocks, len(self._free)))]
        blocks: list[OutgoingBlock] = []
        try:
            for block_hash, parent, page, buffer in zip(hashes, parents, pages, buffers, strict=False):
                page.save(buffer.view(page.nbytes))
                blocks.append(OutgoingBlock(block_hash, parent, buffer, page.nbytes))
        except Exception as error:
            log.error("a block could not be copied from the engine", error=error)
            with self._room:
                self._free.extend(buffers[len(blocks) :])
        if not blocks:
            return 0, None
        return len(blocks), self._submit(self._publish(blocks, tenant, deadline_s))

    def _got(self, goods: list[bool]) -> list[bool]:
        self.stats.got += sum(goods)
        self.stats.missed += len(goods) - sum(goods)
        return goods

    def _were_put(self, goods: list[bool]) -> list[bool]:
        self.stats.put += sum(goods)
        self.stats.lost += len(goods) - sum(goods)
        return goods

    def _submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T] | None":
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            return None

    def _soon(self, call: Callable[..., object], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _result(self, future: "concurrent.futures.Future[T] | None", timeout_s: float) -> T | None:
        """None: there is none in time, or something failed."""
        if future is None:
            return None
        try:
            return future.result(max(0.0, timeout_s) + LATE_S)
        except (TimeoutError, concurrent.futures.CancelledError, ClusterError):
            future.cancel()
        except Exception as error:
            log.error("the store failed", error=error)
        return None


class _Lent:
    """Buffers on their way from the loop's thread to the caller, who may have given up: one of the two has them."""

    def __init__(self, count: int, deadline_s: float) -> None:
        self.count = count
        self.deadline_s = deadline_s
        self.landing: concurrent.futures.Future[None] | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._landed: tuple[list[StagingBuffer], list[int | None]] | None = None
        self._closed = False

    def give(self, buffers: list[StagingBuffer], sizes: list[int | None]) -> bool:
        """False: nobody waits any more, and the buffers stay with who gives them."""
        with self._lock:
            if self._closed:
                return False
            self._landed = buffers, sizes
            return True

    def wait(self, timeout_s: float) -> None:
        """Until they were given, or never will be."""
        landing = self.landing
        if landing is None:
            return
        landing.add_done_callback(lambda _: self._done.set())
        error = landing.exception() if self._done.wait(timeout_s) and not landing.cancelled() else None
        if error is not None and not isinstance(error, ClusterError):
            log.error("the store failed", error=error)

    def take(self) -> tuple[list[StagingBuffer], list[int | None]] | None:
        """What was given; nothing is taken in after that."""
        with self._lock:
            self._closed = True
            return self._landed


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""A tier of objects: one block each, over anything that keeps objects by name.

The index is that of the other tiers, a slot being a share of the budget and not a place: whatever its size a block
takes ``slot_bytes`` of it, and there are never more objects than slots. So that this holds, the object of a slot that
was given up is deleted before another is put; both go in batches.

A service that does not answer costs misses, and few of them wait: after some failures in a row the tier is not
*available*, which fails every call at once and keeps what the index knows, until the service answers a probe in the
background. Nothing is stored before the first listing has told what is there.
"""

import asyncio
from collections.abc import Sequence

import numpy as np

from kvstore.tiers.base import LoadOutcome, StoreOutcome, Tier, TierBlock, TierStats
from kvstore.tiers.breaker import Breaker
from kvstore.tiers.indexed import BlockRead, IndexedTier
from kvstore.tiers.objects import (
    DELETE_MAX,
    Listing,
    ObjectMissing,
    Objects,
    ObjectsRefused,
    ObjectsUnreachable,
    pack_name,
)
from kvstore.tiers.slots import Placement, SlotIndex
from tracehaul.runtime.finish import finish
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.wire.blocks import Stored
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

log = Log(__name__)

IN_FLIGHT_BYTES = 64 << 20
"""Of bodies on their way, in each direction: what a slow service can make this process hold."""
IN_FLIGHT_MIN, IN_FLIGHT_MAX = 4, 64
"""Requests at once, in each direction, whatever the blocks' size. An object store answers late and many at once."""
STORES_MAX = 8
FAILURES_MAX = 3
PAUSE_S, PAUSE_MAX_S = 1.0, 30.0
"""Between probes of a service that does not answer."""


class ObjectStats(TierStats):
    """What this kind of tier counts besides."""

    puts: int = 0
    gets: int = 0
    deletes: int = 0
    """Requests, each for up to 1000 objects."""
    listings: int = 0
    """Pages of up to 1000 objects, and probes."""
    lost: int = 0
    """Objects that were gone when they were read; these alone count as ``failed``."""
    unanswered: int = 0
    """Reads and writes of blocks that the service did not do: the blocks that were to be read are kept."""
    deleted: int = 0
    useless: int = 0
    """Objects found at the start that no block needs: deleted."""
    outages: int = 0
    """How often the service was given up for a while."""


class ObjectTier(IndexedTier):
    """The :class:`kvstore.tiers.base.Tier` over objects.

    It holds nothing, and takes nothing, before :meth:`recover` has returned; :meth:`run` sees to that, too.
    """

    def __init__(self, name: str, objects: Objects, offload: Offload, slots_max: int, slot_bytes: int) -> None:
        self.stats = ObjectStats()
        super().__init__(SlotIndex(slots_max, slot_bytes), self.stats)
        self.name = name
        self.stores_max = STORES_MAX
        self.metered = True
        self._objects = objects
        self._offload = offload
        self._slots_max = slots_max
        self._slot_bytes = slot_bytes
        self._recovered = False
        self._breaker = Breaker(FAILURES_MAX, PAUSE_S, PAUSE_MAX_S)
        self._to_mend = asyncio.Event()
        self._to_mend.set()
        at_once = max(IN_FLIGHT_MIN, min(IN_FLIGHT_MAX, IN_FLIGHT_BYTES // slot_bytes))
        self._puts = asyncio.Semaphore(at_once)
        self._gets = asyncio.Semaphore(at_once)
        self._names: list[str | None] = [None] * slots_max
        """By slot: the object that is there, or may be."""
        self._reads: dict[int, int] = {}
        self._trash: dict[str, None] = {}
        """Objects of no slot, to be deleted before any slot is filled."""
        self._emptying = asyncio.Lock()

    @property
    def available(self) -> bool:
        return self._recovered and not self._breaker.open

    @property
    def parts(self) -> Sequence[Tier]:
        return (self,)

    # --- start, and outages -------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take over what earlier lives left, and delete of it what is of no use. Once; it may be tried again.

        Raises:
            ObjectsUnreachable: the service does not answer; nothing was taken over.
        """
        assert not self._recovered
        listing = Listing()
        async for page in self._objects.pages():
            self.stats.listings += 1
            listing.add(page, self._slot_bytes)
        records, names = listing.restore(self._slots_max)
        for start in range(0, len(listing.useless), DELETE_MAX):
            await self._delete(listing.useless[start : start + DELETE_MAX])
        self._index.restore(records)
        self._names[: len(names)] = names
        self._recovered = True
        self.stats.recovered = len(self._index)
        self.stats.useless = len(listing.useless)
        self._mended()
        if self._listener is not None and records:
            self._listener([Stored(record.block.hash) for record in records])
        log.info(
            "tier recovered", tier=self.name, blocks=len(names), deleted=len(listing.useless), foreign=listing.foreign
        )

    async def run(self) -> None:
        while True:
            await self._to_mend.wait()
            if self._breaker.open:
                await asyncio.sleep(self._breaker.pause_s)
            try:
                if not self._recovered:
                    await self.recover()
                else:
                    self.stats.listings += 1
                    await self._objects.probe()
                self._mended()
            except ObjectsUnreachable as error:
                if self._breaker.open:
                    self._breaker.still_failing()
                else:
                    self._failed(error, final=True)

    def _mended(self) -> None:
        if self._breaker.open:
            log.info("a tier answers again", tier=self.name)
        self._breaker.close()
        self._to_mend.clear()

    def _failed(self, error: ObjectsUnreachable, *, final: bool = False) -> None:
        if self._breaker.failed(final=final or isinstance(error, ObjectsRefused)):
            self.stats.outages += 1
            self._to_mend.set()
            log.error("a tier does not answer: its blocks are misses until it does", tier=self.name, reason=error)

    # --- writing ------------------------------------------------------------------------------------------

    async def store(self, blocks: Sequence[TierBlock], views: Sequence[memoryview]) -> list[StoreOutcome]:
        if not self.available:
            return ["present" if block.hash in self._index else "failed" for block in blocks]
        outcomes: list[StoreOutcome] = ["present" if block.hash in self._index else "full" for block in blocks]
        evicted = self._index.evicted
        placements = self._index.place(blocks)
        self._throw_away()
        self._tell()
        self.stats.evicted += self._index.evicted - evicted
        writes = [(i, placement) for i, placement in enumerate(placements) if placement is not None]
        self.stats.full += outcomes.count("full") - len(writes)
        if writes:
            await finish(self._store(blocks, views, writes, outcomes))
        return outcomes

    async def _store(
        self,
        blocks: Sequence[TierBlock],
        views: Sequence[memoryview],
        writes: Sequence[tuple[int, Placement]],
        outcomes: list[StoreOutcome],
    ) -> None:
        if await self._empty_trash():
            done = await asyncio.gather(*(self._put(blocks[i], views[i], placement) for i, placement in writes))
        else:
            done = [False] * len(writes)
        for (i, placement), put in zip(writes, done, strict=True):
            if put:
                outcomes[i] = "stored"
                self.stats.stored += 1
                self.stats.stored_bytes += blocks[i].size_bytes
                self._index.commit(placement.slot)
            else:
                outcomes[i] = "failed"
                self.stats.unanswered += 1
                self._index.cancel(placement.slot)
        self._throw_away()
        self._tell()

    async def _put(self, block: TierBlock, view: memoryview, placement: Placement) -> bool:
        async with self._puts:
            if not self.available:
                return False
            name = self._names[placement.slot] = pack_name(block, placement.sequence)
            self.stats.puts += 1
            try:
                await self._objects.put(name, view[: block.size_bytes])
            except ObjectsUnreachable as error:
                self._failed(error)
                return False
        self._breaker.answered()
        return True

    def _throw_away(self) -> None:
        """Objects of slots that were given up become trash, unless they are being read."""
        for slot in self._index.take_stale():
            if slot in self._reads:
                self._index.still_stale([slot])
                continue
            name, self._names[slot] = self._names[slot], None
            if name is not None:
                self._trash[name] = None

    async def _empty_trash(self) -> bool:
        """Delete the objects of no slot; False if that was not possible."""
        async with self._emptying:
            while self._trash:
                names = list(self._trash)[:DELETE_MAX]
                try:
                    await self._delete(names)
                except ObjectsUnreachable as error:
                    self._failed(error)
                    return False
                for name in names:
                    del self._trash[name]
        return True

    async def _delete(self, names: Sequence[str]) -> None:
        self.stats.deletes += 1
        await self._objects.delete(names)
        self.stats.deleted += len(names)

    # --- reading ------------------------------------------------------------------------------------------

    async def _load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[LoadOutcome]:
        outcomes: list[LoadOutcome] = ["absent"] * len(hashes)
        reads = self._begin(hashes, views)
        for read in reads:
            self._reads[read.slot] = self._reads.get(read.slot, 0) + 1
        for read, outcome in zip(reads, await asyncio.gather(*map(self._read, reads)), strict=True):
            outcomes[read.place] = outcome
            self._index.end_read(read.slot)
            self._reads[read.slot] -= 1
            if not self._reads[read.slot]:
                del self._reads[read.slot]
            if outcome in ("corrupt", "failed"):
                self._bad(read.block, outcome)
        self._throw_away()
        if self._trash and self.available:
            await self._empty_trash()
        return outcomes

    async def _read(self, read: BlockRead) -> LoadOutcome:
        name = self._names[read.slot]
        assert name is not None
        async with self._gets:
            if not self.available:
                return "unavailable"
            self.stats.gets += 1
            try:
                body = await self._objects.get(name, read.block.size_bytes)
            except ObjectMissing:
                self._breaker.answered()
                self.stats.lost += 1
                self.stats.failed += 1
                return "failed"
            except ObjectsUnreachable as error:
                self.stats.unanswered += 1
                self._failed(error)
                return "unavailable"
            self._breaker.answered()
            if body is None or not await self._offload.run(lambda: _land(body, read.view, read.block)):
                return "corrupt"
            return "loaded"

    def _bad(self, block: TierBlock, outcome: LoadOutcome) -> None:
        self.stats.corrupt += outcome == "corrupt"
        log.warning("dropped a bad block", tier=self.name, block=block.hash.hex(), lost=outcome == "failed")
        self._drop_read(block)

    async def drop(self, block_hash: BlockHash) -> None:
        if self._index.drop(block_hash):
            self._throw_away()
            self._tell()
            if self.available:
                await finish(self._empty_trash())

    async def flush(self) -> None:
        """What was put has survived already."""

    def check(self) -> None:
        self._index.check()
        named = {name.partition(".")[0] for name in self._names if name is not None}
        assert {block_hash.hex() for block_hash in self._index.held()} <= named, "a held block without an object"
        assert not any(name in self._trash for name in self._names if name is not None)

    def close(self) -> None:
        self._offload.close()


def _land(body: memoryview, view: memoryview, block: TierBlock) -> bool:
    """In a thread: copy the body to where it is wanted, and verify it there. Both let go of the interpreter's lock."""
    target = view[: block.size_bytes]
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(body, np.uint8))
    return checksum(target) == block.checksum

"""A tier of fixed slots over a device: the shell around :class:`kvstore.tiers.slots.SlotIndex`."""

import asyncio
from collections.abc import Sequence
from functools import partial

from kvstore.tiers.base import LoadOutcome, SlotDevice, StoreOutcome, Tier, TierBlock, TierStats
from kvstore.tiers.indexed import BlockRead, IndexedTier
from kvstore.tiers.records import ERASED, PAGE_BYTES, Layout, Record, pack_record, unpack_records
from kvstore.tiers.slots import Placement, SlotIndex
from tracehaul.runtime.finish import finish
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash, Checksum

log = Log(__name__)
seldom = Seldom(log)
seldom_bad = Seldom(log, every_s=1.0)

READ_RUN_BYTES = 1 << 20
"""Neighbouring slots read in one call, and hashed by the thread that read them."""

STORES_MAX = 4
"""Some wait for the device while others' records are written, behind the bytes that the device took before them."""

_Write = tuple[int, Placement, memoryview]


class SlotTier(IndexedTier):
    """The :class:`kvstore.tiers.base.Tier` over a slot device. Reads and writes have threads of their own.

    A cancelled call ends when the device has let go of its views.
    """

    def __init__(self, name: str, device: SlotDevice, reads: Offload, writes: Offload) -> None:
        self.stats = TierStats()
        super().__init__(SlotIndex(device.slots_max, device.slot_bytes), self.stats)
        self.name = name
        self.stores_max = STORES_MAX
        self.metered = False
        self._device = device
        self._reads = reads
        self._writes = writes
        self._erasing = asyncio.Lock()
        layout = Layout(device.slot_bytes, device.slots_max)
        self.stats.unreadable = self._index.restore(unpack_records(device.records(), layout))
        self.stats.recovered = len(self._index)

    @property
    def available(self) -> bool:
        return True

    @property
    def parts(self) -> Sequence[Tier]:
        return (self,)

    # --- writing ------------------------------------------------------------------------------------------

    async def store(self, blocks: Sequence[TierBlock], views: Sequence[memoryview]) -> list[StoreOutcome]:
        outcomes: list[StoreOutcome] = ["present" if block.hash in self._index else "full" for block in blocks]
        evicted = self._index.evicted
        placements = self._index.place(blocks)
        placed = len(placements) - placements.count(None)
        ahead = self._index.evict_ahead(placed * STORES_MAX, blocks[-1].tenant) if placed else []
        self._tell()
        self.stats.evicted += self._index.evicted - evicted
        writes = [
            (i, placement, view)
            for i, (placement, view) in enumerate(zip(placements, views, strict=True))
            if placement is not None
        ]
        refused = outcomes.count("full") - len(writes)
        self.stats.full += refused
        if refused:
            seldom.warning("a tier is full, and nothing in it can make room", tier=self.name, blocks=refused)
        if writes:
            # Taken before anything is awaited, so that nobody else erases them when they have been written.
            stale = self._index.take_stale([placement.slot for _, placement, _ in writes])
            await finish(self._store(blocks, writes, stale, ahead, outcomes))
        return outcomes

    async def _store(
        self,
        blocks: Sequence[TierBlock],
        writes: Sequence[_Write],
        stale: Sequence[int],
        ahead: Sequence[int],
        outcomes: list[StoreOutcome],
    ) -> None:
        try:
            if self._erasing.locked():  # perhaps slots that this call was given
                async with self._erasing:
                    pass
            await self._writes.run(lambda: self._write(blocks, writes, stale, ahead))
        except OSError as error:
            self.stats.failed += len(writes)
            seldom.warning("a tier's device refused a write", tier=self.name, blocks=len(writes), error=error)
            for i, placement, _ in writes:
                outcomes[i] = "failed"
                self._index.cancel(placement.slot)
            self._index.cleared(ahead)
            self._index.still_stale(ahead)
            return
        for i, placement, _ in writes:
            outcomes[i] = "stored"
            self._index.commit(placement.slot)
            self.stats.stored += 1
            self.stats.stored_bytes += blocks[i].size_bytes
        self._index.cleared(ahead)
        self._tell()

    def _write(
        self, blocks: Sequence[TierBlock], writes: Sequence[_Write], stale: Sequence[int], ahead: Sequence[int]
    ) -> None:
        """In a thread. The order is what makes a killed process harmless: no record names what is being written."""
        if stale:
            self._device.write_records(dict.fromkeys(stale, ERASED))
        self._device.write([placement.slot for _, placement, _ in writes], [view for _, _, view in writes])
        records = {
            placement.slot: pack_record(Record(placement.slot, placement.sequence, blocks[i]))
            for i, placement, _ in writes
        }
        self._device.write_records(records | dict.fromkeys(ahead, ERASED))

    async def _erase(self) -> None:
        """Erase the records of slots that were given up and not given out again; one call at a time."""
        async with self._erasing:
            stale = self._index.take_stale()
            if not stale:
                return
            try:
                await self._writes.run(lambda: self._device.write_records(dict.fromkeys(stale, ERASED)))
            except OSError:
                self._index.still_stale(stale)
                raise

    # --- reading ------------------------------------------------------------------------------------------

    async def _load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[LoadOutcome]:
        outcomes: list[LoadOutcome] = ["absent"] * len(hashes)
        reads = [
            read._replace(view=read.view[: pages_bytes(read.block.size_bytes)]) for read in self._begin(hashes, views)
        ]
        if not reads:
            return outcomes
        try:
            # Neighbours together and the rest side by side: depth is what a disk's throughput comes from.
            parts = _runs(reads, self._device.slot_bytes)
            sums = await asyncio.gather(*(self._reads.run(partial(self._read, part)) for part in parts))
        finally:
            for read in reads:
                self._index.end_read(read.slot)
        for part, part_sums in zip(parts, sums, strict=True):
            for read, actual in zip(part, part_sums, strict=True):
                if actual == read.block.checksum:
                    outcomes[read.place] = "loaded"
                else:
                    outcomes[read.place] = "failed" if actual is None else "corrupt"
                    self._bad(read.block, unreadable=actual is None)
        if any(outcome in ("corrupt", "failed") for outcome in outcomes):
            await self._forget()
        return outcomes

    def _read(self, reads: Sequence[BlockRead]) -> list[Checksum | None]:
        """In a thread: the checksum of what each slot gave; None where it gave nothing."""
        try:
            self._device.read([read.slot for read in reads], [read.view for read in reads])
        except OSError:
            if len(reads) == 1:
                return [None]
            return [self._read([read])[0] for read in reads]  # find out which
        return [checksum(read.view[: read.block.size_bytes]) for read in reads]

    def _bad(self, block: TierBlock, *, unreadable: bool) -> None:
        if unreadable:
            self.stats.failed += 1
        else:
            self.stats.corrupt += 1
        seldom_bad.warning("dropped a bad block", tier=self.name, block=block.hash.hex(), unreadable=unreadable)
        self._drop_read(block)

    async def drop(self, block_hash: BlockHash) -> None:
        if self._index.drop(block_hash):
            self._tell()
            await self._forget()

    async def _forget(self) -> None:
        try:
            await finish(self._erase())
        except OSError as error:
            seldom.warning("a tier's device refused to forget a block", tier=self.name, error=error)

    async def flush(self) -> None:
        try:
            await self._writes.run(self._device.flush)
        except OSError as error:
            self.stats.failed += 1
            seldom.warning("a tier's device refused a flush", tier=self.name, error=error)

    async def run(self) -> None:
        """Nothing."""

    def check(self) -> None:
        self._index.check()

    def close(self) -> None:
        self._reads.close()
        self._writes.close()
        self._device.close()


def _runs(reads: Sequence[BlockRead], slot_bytes: int) -> list[list[BlockRead]]:
    """The reads by slot, cut where slots are not neighbours or the run is long."""
    runs: list[list[BlockRead]] = []
    for read in sorted(reads, key=lambda read: read.slot):
        if runs and runs[-1][-1].slot + 1 == read.slot and (len(runs[-1]) + 1) * slot_bytes <= READ_RUN_BYTES:
            runs[-1].append(read)
        else:
            runs.append([read])
    return runs


def pages_bytes(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages: what a device moves."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES

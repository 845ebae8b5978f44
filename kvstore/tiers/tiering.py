"""What moves blocks between a node's memory and the tier below it.

Down: every published block is copied to the tier in the background, in the order of publishing, as fast as the device
takes them. So a block that the arena evicts is there already and leaving memory costs nothing, and a node that is
killed has lost at most the blocks that still waited. These are spared while blocks that can be had again are near the
end of the order; one that is evicted before its turn is gone, and counted.

Up: a lease of blocks that only the tier has waits for them to come into the arena, for a bounded time, and readers
read memory under a lease as ever. The tier keeps its copy.

A block is visible as long as either has it: subscribers hear of the first arrival, of moves, and of the last loss.
"""

import asyncio
import contextlib
import mmap
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

import msgspec

from kvstore.index.arena import Arena
from kvstore.index.tenants import TenantKey
from kvstore.tiers.base import Tier, TierBlock, part_of, readable, told_above, told_below
from kvstore.tiers.meter import RaiseMeter
from kvstore.tiers.slot_tier import pages_bytes
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.blocks import BlockSpec, Change, Publication, Slot, Stored
from tracehaul.wire.ids import BlockHash, LeaseId

seldom = Seldom(Log(__name__))

TIER_HOLDER = "\0tier"
"""Holder of what is on its way up or down: no connection has this name."""
BATCH_BYTES = 4 << 20
BATCH_BLOCKS_MAX = 64
HOLD_S = 600.0
"""A copy on its way protects its slot as long as it takes; this bounds what a device that hangs can keep."""
FLUSH_S = 1.0
"""What was written this long ago survives a loss of power."""
RETRY_S = 1.0
"""Pause after a write that the device refused."""
SCRUB_BURST_S = 0.5
SCRUB_PAUSE_S = 5.0
"""Between two rounds, and while there is nothing."""


class TieringConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of the moves. Raises ValueError where they make no sense."""

    promotions_max: int = 1024
    """Blocks on their way from the tier to memory at once; those asked for beyond it are misses."""
    promote_timeout_s: float = 2.0
    """How long a lease waits for its blocks; those that come later can be leased then."""
    scrub_bytes_s: int = 2 << 20
    """How fast blocks on disk are read in the background to find those that went bad; 0: never."""

    def __post_init__(self) -> None:
        if self.scrub_bytes_s < 0 or self.promotions_max < 1 or self.promote_timeout_s <= 0:
            raise ValueError("promotions_max and promote_timeout_s must be positive, scrub_bytes_s not negative")


class TieringStats(msgspec.Struct):
    """Counts since the node's start."""

    demoted: int = 0
    """Blocks that left memory and stayed in the tier."""
    evicted_unwritten: int = 0
    """Blocks evicted before their turn to be written: gone."""
    promoted: int = 0
    promote_failed: int = 0
    """Blocks that were asked for and turned out bad, or lost their slot meanwhile."""
    promote_refused: int = 0
    """Blocks not promoted because memory had no slot to give, too many were on their way, or what has them does not
    answer."""
    promote_late: int = 0
    """Leases that did not wait for all their blocks."""


class _Promotion:
    """Blocks that come up together. Protected from their arrival until nobody waits for them any more."""

    def __init__(self) -> None:
        self.waiters = 0
        self.task: asyncio.Task[None] | None = None
        self.hold: LeaseId | None = None


class Tiering:
    """Moves between one arena and one tier; all of one event loop.

    ``announce`` takes what subscribers must hear. ``settle`` must follow every change of the arena made here: it hands
    the arena's changes to :meth:`merge` and arms its timers.
    """

    def __init__(
        self,
        arena: Arena,
        buffer: memoryview,
        slot_bytes: int,
        tier: Tier,
        config: TieringConfig,
        announce: Callable[[Sequence[Change]], None],
        settle: Callable[[], None],
    ) -> None:
        self.tier = tier
        self.stats = TieringStats()
        self._arena = arena
        self._buffer = buffer
        self._slot_bytes = slot_bytes
        self._config = config
        self._announce = announce
        self._settle = settle
        # What is being written cannot be evicted: in a small arena that must stay a small part.
        share = len(buffer) // slot_bytes // (4 * tier.stores_max)
        self._batch_blocks = max(1, min(BATCH_BLOCKS_MAX, BATCH_BYTES // slot_bytes, share))
        self._writing = 0
        self._behind: OrderedDict[BlockHash, None] = OrderedDict()  # in memory only, oldest first
        self._waiting = asyncio.Event()
        self._unflushed = asyncio.Event()
        self._coming: dict[BlockHash, _Promotion] = {}
        self._promotions: set[_Promotion] = set()
        self._meter = RaiseMeter(len(tier.parts))
        self._closed = False
        self._scrubbing = asyncio.Event()
        """Set when the scrubber's rate may have become other than 0."""
        tier.listen(self._on_tier)
        tier.protect(arena.rank, arena.quota_shares())
        arena.stand_over(self)

    @property
    def config(self) -> TieringConfig:
        """Its limits as they are now."""
        return self._config

    def reconfigure(self, config: TieringConfig) -> None:
        """Other limits from now on."""
        self._config = config
        self._scrubbing.set()

    @property
    def raise_block_s(self) -> tuple[float, ...]:
        """How long a block of each part of the tier takes to come into memory."""
        return tuple(self._meter.block_s)

    @property
    def behind(self) -> int:
        """Blocks that wait to be written, or are being written."""
        return len(self._behind) + self._writing

    def is_behind(self, block_hash: BlockHash) -> bool:
        """As :class:`kvstore.index.arena.Below` has it."""
        return block_hash in self._behind

    def size_of(self, block_hash: BlockHash) -> int:
        """As :class:`kvstore.index.arena.Below` has it."""
        block = self.tier.find(block_hash)
        return 0 if block is None else block.size_bytes

    def repinned(self, hashes: Iterable[BlockHash]) -> None:
        """As :class:`kvstore.index.arena.Below` has it."""
        self.tier.repinned(hashes)

    # --- what is visible ----------------------------------------------------------------------------------

    def merge(self, changes: Sequence[Change]) -> list[Change]:
        """What subscribers must hear of the arena's changes."""
        told: list[Change] = []
        for change in changes:
            told.append(told_above(change, self.tier, 1))
            below = told[-1] is not change
            if isinstance(change, Stored):
                if not below:
                    self._behind[change.hash] = None
                    self._waiting.set()
                continue
            waited = change.hash in self._behind
            self._behind.pop(change.hash, None)
            if below:
                self.tier.touch(change.hash)
                self.stats.demoted += 1
            else:
                self.stats.evicted_unwritten += waited
                if waited:
                    seldom.warning("blocks leave memory before they are written: the tier is slow", tier=self.tier.name)
        return told

    def _on_tier(self, changes: Sequence[Change]) -> None:
        above = self._arena.exists([change.hash for change in changes])
        told = [told_below(change, 1) for change, in_memory in zip(changes, above, strict=True) if not in_memory]
        if told:
            self._announce(told)

    def above(self, hashes: Sequence[BlockHash]) -> bytes:
        """One byte per hash: 1 where memory has it."""
        return self._arena.exists(hashes)

    def exists(self, hashes: Sequence[BlockHash]) -> bytes:
        """One byte per hash: 1 where memory or the tier has it."""
        held = self._arena.exists(hashes)
        if 0 not in held:
            return held
        find = self.tier.find
        return bytes([above or find(h) is not None for above, h in zip(held, hashes, strict=True)])

    def published(self) -> tuple[BlockHash, ...]:
        """All that is visible."""
        return tuple(chain.from_iterable(self.by_tier()))

    def by_tier(self) -> list[tuple[BlockHash, ...]]:
        """All that is visible, by the fastest tier that has it."""
        above = self._arena.published()
        seen = set(above)
        tiers = [above]
        for part in self.tier.parts:
            tiers.append(tuple([block_hash for block_hash in part.held() if block_hash not in seen]))
            seen.update(tiers[-1])
        return tiers

    # --- up -----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def promoted(self, hashes: Sequence[BlockHash], timeout_s: float) -> AsyncGenerator[None, None]:
        """Inside, those of ``hashes`` that the tier has are in memory, as far as that was possible in time.

        They can be evicted as soon as the block is left: take a lease inside, without waiting.
        """
        kept = self._keep(hashes)
        joined = self._join(hashes)
        try:
            tasks = [promotion.task for promotion in joined if promotion.task is not None]
            if tasks:
                timeout_s = min(timeout_s, self._config.promote_timeout_s)
                _, late = await asyncio.wait(tasks, timeout=timeout_s)
                self.stats.promote_late += bool(late)
            yield
        finally:
            for promotion in joined:
                promotion.waiters -= 1
                self._let_go(promotion)
            if kept is not None:
                self._arena.release(kept, TIER_HOLDER)
                self._settle()

    def _keep(self, hashes: Sequence[BlockHash]) -> LeaseId | None:
        """Those of ``hashes`` that are in memory must not make room for the others that come up."""
        in_memory = self._arena.exists(hashes)
        rest = [block_hash for block_hash, there in zip(hashes, in_memory, strict=True) if not there]
        if 1 not in in_memory or not any(self.tier.find(block_hash) is not None for block_hash in rest):
            return None
        held = [block_hash for block_hash, there in zip(hashes, in_memory, strict=True) if there]
        kept, _ = self._arena.hold(held, TIER_HOLDER, HOLD_S, clock.now_s())
        return kept

    def _join(self, hashes: Sequence[BlockHash]) -> list[_Promotion]:
        """The promotions that bring ``hashes``, those under way and new ones, each with one waiter more."""
        joined: dict[_Promotion, None] = {}
        wanted: dict[BlockHash, TierBlock] = {}
        for block_hash, in_memory in zip(hashes, self._arena.exists(hashes), strict=True):
            if in_memory:
                continue
            if (promotion := self._coming.get(block_hash)) is not None:
                joined[promotion] = None
            elif (block := self.tier.find(block_hash)) is None:
                continue
            elif readable(self.tier, block_hash):
                wanted[block_hash] = block
            else:
                self.stats.promote_refused += 1
        joined.update(dict.fromkeys(self._start(list(wanted.values()))))
        for promotion in joined:
            promotion.waiters += 1
        return list(joined)

    def _start(self, blocks: Sequence[TierBlock]) -> Iterator[_Promotion]:
        room = 0 if self._closed else max(0, self._config.promotions_max - len(self._coming))
        self.stats.promote_refused += max(0, len(blocks) - room)
        blocks = blocks[:room]
        if not blocks:
            return
        specs = [BlockSpec(block.hash, block.parent, block.size_bytes) for block in blocks]
        outcomes = self._arena.readmit(specs, [block.tenant for block in blocks], TIER_HOLDER, clock.now_s())
        self._settle()
        granted = [(b, outcome) for b, outcome in zip(blocks, outcomes, strict=True) if isinstance(outcome, Slot)]
        self.stats.promote_refused += len(blocks) - len(granted)
        for start in range(0, len(granted), self._batch_blocks):
            batch = granted[start : start + self._batch_blocks]
            promotion = _Promotion()
            promotion.task = asyncio.get_running_loop().create_task(self._promote(promotion, batch))
            self._promotions.add(promotion)
            self._coming.update(dict.fromkeys([block.hash for block, _ in batch], promotion))
            yield promotion

    async def _promote(self, promotion: _Promotion, batch: Sequence[tuple[TierBlock, Slot]]) -> None:
        hashes = [block.hash for block, _ in batch]
        views = [self._slot_view(slot.offset, block.size_bytes) for block, slot in batch]
        deepest = max(part_of(self.tier, block_hash) or 0 for block_hash in hashes)
        self._meter.began(deepest, clock.now_s())
        loaded = 0
        try:
            outcomes = await self.tier.load(hashes, views)
            loaded = outcomes.count("loaded")
        finally:
            self._meter.ended(deepest, loaded, clock.now_s())
            for block_hash in hashes:
                del self._coming[block_hash]
            self._promotions.discard(promotion)
        now_s = clock.now_s()
        for (block, slot), outcome in zip(batch, outcomes, strict=True):
            published = False
            if outcome == "loaded":
                publication = Publication(block.hash, slot.generation, block.checksum)
                published = self._arena.publish([publication], TIER_HOLDER, now_s) == ["published"]
            else:
                self._arena.abandon([(block.hash, slot.generation)], TIER_HOLDER)
            self.stats.promoted += published
            self.stats.promote_failed += not published
        if promotion.waiters:
            promotion.hold, _ = self._arena.hold(hashes, TIER_HOLDER, HOLD_S, now_s)
        self._settle()

    def _let_go(self, promotion: _Promotion) -> None:
        if promotion.waiters == 0 and promotion.hold is not None:
            self._arena.release(promotion.hold, TIER_HOLDER)
            promotion.hold = None
            self._settle()

    def _slot_view(self, offset: int, size_bytes: int) -> memoryview:
        return self._buffer[offset : offset + pages_bytes(size_bytes)]

    # --- down, and around ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write behind, flush and scrub, for as long as the node serves."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.tier.run())
            for _ in range(self.tier.stores_max):
                group.create_task(self._write_behind())
            group.create_task(self._flush())
            group.create_task(self._scrub())

    async def drain(self) -> None:
        """Write what waits to be written, until the device refuses. Beside :meth:`run` or after it."""
        while self._behind and await self._write_batch():
            pass
        await self.tier.flush()

    async def discard(self, hashes: Sequence[BlockHash], tenant: TenantKey) -> None:
        """A tenant gives up these blocks. The arena's copies go last, and as the caller says."""
        for block_hash in self._arena.discardable(hashes, tenant):
            self._behind.pop(block_hash, None)
        for block_hash in hashes:
            block = self.tier.find(block_hash)
            if block is not None and block.tenant == tenant and self._arena.rank(block_hash) is None:
                await self.tier.drop(block_hash)

    async def close(self) -> None:
        """Let promotions under way end; start none."""
        self._closed = True
        while self._promotions:
            await asyncio.wait([promotion.task for promotion in self._promotions if promotion.task is not None])

    async def _write_behind(self) -> None:
        while True:
            await self._waiting.wait()
            if not await self._write_batch():
                await asyncio.sleep(RETRY_S)

    async def _write_batch(self) -> bool:
        """Write the oldest that wait; False if the device refused."""
        hashes = list(islice(self._behind, self._batch_blocks))
        for block_hash in hashes:
            del self._behind[block_hash]
        if not self._behind:
            self._waiting.clear()
        hold, found = self._arena.hold(hashes, TIER_HOLDER, HOLD_S, clock.now_s())
        blocks: list[TierBlock] = []
        views: list[memoryview] = []
        for block_hash, held in zip(hashes, found, strict=True):
            if held is not None:
                block, parent, tenant = held
                blocks.append(TierBlock(block_hash, parent, block.size_bytes, block.checksum, tenant))
                views.append(self._slot_view(block.offset, block.size_bytes))
        self._settle()
        self._writing += len(hashes)
        try:
            outcomes = await self.tier.store(blocks, views)
        finally:
            self._writing -= len(hashes)
            self._arena.release(hold, TIER_HOLDER)
            self._settle()
        for block, outcome in zip(blocks, outcomes, strict=True):
            if outcome == "failed" and self._arena.exists([block.hash])[0]:
                self._behind[block.hash] = None  # its turn comes again
                self._waiting.set()
            if outcome == "stored" and not self._arena.exists([block.hash])[0]:
                await self.tier.drop(block.hash)  # revoked or discarded meanwhile: nothing held gives way
        if "stored" in outcomes:
            self._unflushed.set()
        return "failed" not in outcomes

    async def _flush(self) -> None:
        while True:
            await self._unflushed.wait()
            await asyncio.sleep(FLUSH_S)
            self._unflushed.clear()
            await self.tier.flush()

    async def _scrub(self) -> None:
        """Round and round through what can be read for nothing: at most one part of the tier."""
        tier = next((part for part in self.tier.parts if not part.metered), None)
        if tier is None:
            return
        view = memoryview(mmap.mmap(-1, self._slot_bytes))
        at: int | None = None
        owed_s = 0.0
        while True:
            while not (rate := self._config.scrub_bytes_s):
                self._scrubbing.clear()
                await self._scrubbing.wait()
            at = await tier.scrub(at, view)
            owed_s += self._slot_bytes / rate
            if at is None:
                await asyncio.sleep(SCRUB_PAUSE_S)
            elif owed_s >= SCRUB_BURST_S:
                await asyncio.sleep(owed_s)
                owed_s = 0.0

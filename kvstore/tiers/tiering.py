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
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import msgspec

from kvstore.index.arena import Arena
from kvstore.index.tenants import TenantKey
from kvstore.tiers.base import Tier, TierBlock, told_above, told_below
from kvstore.tiers.promotions import HOLD_S, TIER_HOLDER, Promotions, PromotionStats
from kvstore.tiers.slot_tier import pages_bytes
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.blocks import Change, Stored
from tracehaul.wire.ids import BlockHash

seldom = Seldom(Log(__name__))

BATCH_BYTES = 4 << 20
BATCH_BLOCKS_MAX = 64
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


class TieringStats(PromotionStats):
    """Counts since the node's start."""

    demoted: int = 0
    """Blocks that left memory and stayed in the tier."""
    evicted_unwritten: int = 0
    """Blocks evicted before their turn to be written: gone."""


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
        self.promotions = Promotions(arena, buffer, tier, self._batch_blocks, self.stats, settle)
        """What is on its way up."""
        self._limit_promotions()
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
        self._limit_promotions()
        self._scrubbing.set()

    def _limit_promotions(self) -> None:
        self.promotions.blocks_max = self._config.promotions_max
        self.promotions.timeout_s = self._config.promote_timeout_s

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
                views.append(self._buffer[block.offset : block.offset + pages_bytes(block.size_bytes)])
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

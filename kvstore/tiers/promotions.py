"""Blocks on their way up: from the tier into a node's memory, while leases wait for them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import msgspec

from kvstore.index.arena import Arena
from kvstore.tiers.base import Tier, TierBlock, part_of, readable
from kvstore.tiers.meter import RaiseMeter
from kvstore.tiers.slot_tier import pages_bytes
from tracehaul.runtime import clock
from tracehaul.wire.blocks import BlockSpec, Publication, Slot
from tracehaul.wire.ids import BlockHash, LeaseId

TIER_HOLDER = "\0tier"
"""Holder of what is on its way up or down: no connection has this name."""
HOLD_S = 600.0
"""A copy on its way protects its slot as long as it takes; this bounds what a device that hangs can keep."""


class PromotionStats(msgspec.Struct):
    """Counts since the node's start."""

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


class Promotions:
    """Moves from one tier to one arena; all of one event loop. ``settle`` must follow every change of the arena."""

    def __init__(
        self,
        arena: Arena,
        buffer: memoryview,
        tier: Tier,
        batch_blocks: int,
        stats: PromotionStats,
        settle: Callable[[], None],
    ) -> None:
        self.stats = stats
        self.blocks_max = 0
        """Blocks on their way at once: none before somebody says how many."""
        self.timeout_s = 0.0
        """The longest that a lease waits."""
        self.coming: dict[BlockHash, _Promotion] = {}
        """To look at."""
        self._arena = arena
        self._buffer = buffer
        self._tier = tier
        self._batch_blocks = batch_blocks
        self._settle = settle
        self._under_way: set[_Promotion] = set()
        self._meter = RaiseMeter(len(tier.parts))
        self._closed = False

    @property
    def block_s(self) -> tuple[float, ...]:
        """How long a block of each part of the tier takes to come into memory."""
        return tuple(self._meter.block_s)

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
                timeout_s = min(timeout_s, self.timeout_s)
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
        if 1 not in in_memory or not any(self._tier.find(block_hash) is not None for block_hash in rest):
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
            if (promotion := self.coming.get(block_hash)) is not None:
                joined[promotion] = None
            elif (block := self._tier.find(block_hash)) is None:
                continue
            elif readable(self._tier, block_hash):
                wanted[block_hash] = block
            else:
                self.stats.promote_refused += 1
        joined.update(dict.fromkeys(self._start(list(wanted.values()))))
        for promotion in joined:
            promotion.waiters += 1
        return list(joined)

    def _start(self, blocks: Sequence[TierBlock]) -> Iterator[_Promotion]:
        room = 0 if self._closed else max(0, self.blocks_max - len(self.coming))
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
            self._under_way.add(promotion)
            self.coming.update(dict.fromkeys([block.hash for block, _ in batch], promotion))
            yield promotion

    async def _promote(self, promotion: _Promotion, batch: Sequence[tuple[TierBlock, Slot]]) -> None:
        hashes = [block.hash for block, _ in batch]
        views = [self._slot_view(slot.offset, block.size_bytes) for block, slot in batch]
        deepest = max(part_of(self._tier, block_hash) or 0 for block_hash in hashes)
        self._meter.began(deepest, clock.now_s())
        loaded = 0
        try:
            outcomes = await self._tier.load(hashes, views)
            loaded = outcomes.count("loaded")
        finally:
            self._meter.ended(deepest, loaded, clock.now_s())
            for block_hash in hashes:
                del self.coming[block_hash]
            self._under_way.discard(promotion)
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

    async def close(self) -> None:
        """Let those under way end; start none."""
        self._closed = True
        while self._under_way:
            await asyncio.wait([promotion.task for promotion in self._under_way if promotion.task is not None])

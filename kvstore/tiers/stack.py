"""Two tiers as one: a fast one, and a large one below it that gets a copy of everything.

Down: every block that the upper tier takes is copied to the lower one in the background, in the order of arrival, as
fast as that takes it. So a block that the upper tier evicts is below already, and what a lost machine takes with it
is what still waited. What waits is in the upper tier, so it is bounded by it; a block that is evicted before its turn
is gone, and counted.

Up: a block that only the lower tier has is read from there, and the upper tier gets it back in passing.

A block is visible as long as either has it. A tier that is not available costs the blocks that only it holds.
"""

import asyncio
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import msgspec

from kvstore.tiers.base import LoadOutcome, StoreOutcome, Tier, TierBlock, TierStats, told_above, told_below
from tracehaul.runtime.log import Log
from tracehaul.wire.blocks import Change, Removed, Stored
from tracehaul.wire.ids import BlockHash

log = Log(__name__)

BATCH_BYTES = 4 << 20
BATCH_BLOCKS_MAX = 64
RETRY_S = 1.0
"""Pause of one copier after the lower tier did not take a block."""


class StackStats(msgspec.Struct):
    """Counts since the node's start."""

    copied_down: int = 0
    copied_up: int = 0
    evicted_uncopied: int = 0
    """Blocks that left the upper tier before their turn to be copied: gone."""


class Stack:
    """The :class:`kvstore.tiers.base.Tier` of two; they have no other listener."""

    def __init__(self, upper: Tier, lower: Tier, slot_bytes: int) -> None:
        self.name = f"{upper.name}+{lower.name}"
        self.moves = StackStats()
        self.stores_max = upper.stores_max
        self.metered = upper.metered or lower.metered
        self._upper = upper
        self._lower = lower
        self._slot_bytes = slot_bytes
        self._listener: Callable[[Sequence[Change]], None] | None = None
        self._behind: OrderedDict[BlockHash, None] = OrderedDict()  # in the upper tier only, oldest first
        self._copying: set[BlockHash] = set()
        self._waiting = asyncio.Event()
        for block_hash in upper.held():
            self._fall_behind(block_hash)
        upper.listen(self._on_upper)
        lower.listen(self._on_lower)

    def __len__(self) -> int:
        return len(self.held())

    @property
    def bytes_used(self) -> int:
        return self._upper.bytes_used + self._lower.bytes_used

    @property
    def bytes_max(self) -> int:
        return self._upper.bytes_max + self._lower.bytes_max

    @property
    def stats(self) -> TierStats:
        """Of both together."""
        both = [msgspec.structs.astuple(part.stats)[: len(TierStats.__struct_fields__)] for part in self.parts]
        return TierStats(*map(sum, zip(*both, strict=True)))

    @property
    def available(self) -> bool:
        return self._upper.available or self._lower.available

    @property
    def parts(self) -> Sequence[Tier]:
        return (*self._upper.parts, *self._lower.parts)

    @property
    def behind(self) -> int:
        """Blocks that wait to be copied down, or are being copied."""
        return len(self._behind) + len(self._copying)

    # --- what is visible ----------------------------------------------------------------------------------

    def listen(self, listener: Callable[[Sequence[Change]], None]) -> None:
        assert self._listener is None
        self._listener = listener

    def protect(self, rank: Callable[[BlockHash], float | None], shares: Mapping[str, float]) -> None:
        self._upper.protect(rank, shares)
        self._lower.protect(rank, shares)

    def reshare(self, shares: Mapping[str, float]) -> None:
        self._upper.reshare(shares)
        self._lower.reshare(shares)

    def repinned(self, hashes: Iterable[BlockHash]) -> None:
        hashes = tuple(hashes)
        self._upper.repinned(hashes)
        self._lower.repinned(hashes)

    def find(self, block_hash: BlockHash) -> TierBlock | None:
        return self._upper.find(block_hash) or self._lower.find(block_hash)

    def held(self) -> tuple[BlockHash, ...]:
        below = [block_hash for block_hash in self._lower.held() if self._upper.find(block_hash) is None]
        return (*self._upper.held(), *below)

    def touch(self, block_hash: BlockHash) -> None:
        self._upper.touch(block_hash)
        self._lower.touch(block_hash)

    def _on_upper(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change, Stored):
                self._fall_behind(change.hash)
            elif isinstance(change, Removed) and change.hash in self._behind:
                del self._behind[change.hash]
                self.moves.evicted_uncopied += 1
        self._tell([told_above(change, self._lower, len(self._upper.parts)) for change in changes])

    def _on_lower(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change, Stored):
                self._behind.pop(change.hash, None)
        above = len(self._upper.parts)
        self._tell([told_below(change, above) for change in changes if self._upper.find(change.hash) is None])

    def _fall_behind(self, block_hash: BlockHash) -> None:
        if self._lower.find(block_hash) is None and block_hash not in self._copying:
            self._behind[block_hash] = None
            self._waiting.set()

    def _tell(self, changes: Sequence[Change]) -> None:
        if changes and self._listener is not None:
            self._listener(changes)

    # --- moves --------------------------------------------------------------------------------------------

    async def store(self, blocks: Sequence[TierBlock], views: Sequence[memoryview]) -> list[StoreOutcome]:
        outcomes = await self._upper.store(blocks, views)
        refused = [i for i, outcome in enumerate(outcomes) if outcome in ("full", "failed")]
        if refused and self._lower.available:
            below = await self._lower.store([blocks[i] for i in refused], [views[i] for i in refused])
            for i, outcome in zip(refused, below, strict=True):
                outcomes[i] = outcome
        return outcomes

    async def load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[LoadOutcome]:
        outcomes = await self._upper.load(hashes, views)
        missing = [i for i, outcome in enumerate(outcomes) if outcome != "loaded"]
        if not missing:
            return outcomes
        blocks = {i: self._lower.find(hashes[i]) for i in missing}
        found = await self._lower.load([hashes[i] for i in missing], [views[i] for i in missing])
        again: list[tuple[TierBlock, memoryview]] = []
        for i, outcome in zip(missing, found, strict=True):
            if outcome != "absent":
                outcomes[i] = outcome
            block = blocks[i]
            if outcome == "loaded" and block is not None:
                again.append((block, views[i]))
        if again and self._upper.available:
            taken = await self._upper.store([block for block, _ in again], [view for _, view in again])
            self.moves.copied_up += taken.count("stored")
        return outcomes

    async def drop(self, block_hash: BlockHash) -> None:
        await self._upper.drop(block_hash)
        await self._lower.drop(block_hash)

    async def scrub(self, after: int | None, view: memoryview) -> int | None:
        """Positions of the upper tier are even, of the lower one odd."""
        if after is None or after % 2 == 0:
            at = await self._upper.scrub(None if after is None else after // 2, view)
            if at is not None:
                return 2 * at
            after = None
        at = await self._lower.scrub(None if after is None else after // 2, view)
        return None if at is None else 2 * at + 1

    async def flush(self) -> None:
        await self._upper.flush()
        await self._lower.flush()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._upper.run())
            group.create_task(self._lower.run())
            for _ in range(self._lower.stores_max):
                group.create_task(self._copy_down())

    async def _copy_down(self) -> None:
        blocks_max = max(1, min(BATCH_BLOCKS_MAX, BATCH_BYTES // self._slot_bytes))
        memory = memoryview(mmap.mmap(-1, blocks_max * self._slot_bytes))
        views = [memory[i * self._slot_bytes : (i + 1) * self._slot_bytes] for i in range(blocks_max)]
        while True:
            await self._waiting.wait()
            if not self._lower.available or not await self._copy_batch(views):
                await asyncio.sleep(RETRY_S)

    async def _copy_batch(self, views: Sequence[memoryview]) -> bool:
        """Copy the oldest that wait; False if the lower tier failed."""
        hashes = list(islice(self._behind, len(views)))
        for block_hash in hashes:
            del self._behind[block_hash]
        if not self._behind:
            self._waiting.clear()
        self._copying.update(hashes)
        outcomes: list[StoreOutcome] = []
        whole: list[tuple[TierBlock, memoryview]] = []
        try:
            blocks = [self._upper.find(block_hash) for block_hash in hashes]
            loaded = await self._upper.load(hashes, views[: len(hashes)])
            for block, view, outcome in zip(blocks, views[: len(hashes)], loaded, strict=True):
                if block is not None and outcome == "loaded":
                    whole.append((block, view))
            if whole:
                outcomes = await self._lower.store([block for block, _ in whole], [view for _, view in whole])
        finally:
            self._copying.difference_update(hashes)
        self.moves.copied_down += outcomes.count("stored")
        refused = {block.hash for (block, _), outcome in zip(whole, outcomes, strict=True) if outcome == "full"}
        for block_hash in hashes:
            if self._upper.find(block_hash) is None:
                self.moves.evicted_uncopied += self._lower.find(block_hash) is None
            elif block_hash not in refused:
                self._fall_behind(block_hash)
        return "failed" not in outcomes

    # --- the rest -----------------------------------------------------------------------------------------

    def check(self) -> None:
        self._upper.check()
        self._lower.check()
        uncopied = {block_hash for block_hash in self._upper.held() if self._lower.find(block_hash) is None}
        assert set(self._behind) <= uncopied

    def close(self) -> None:
        self._upper.close()
        self._lower.close()

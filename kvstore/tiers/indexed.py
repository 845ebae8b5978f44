"""What a tier with a slot index of its own answers from it, whatever its device."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kvstore.tiers.base import LoadOutcome, TierBlock, TierStats
from kvstore.tiers.slots import SlotIndex
from tracehaul.runtime.finish import finish
from tracehaul.wire.blocks import Change
from tracehaul.wire.ids import BlockHash


class BlockRead(NamedTuple):
    """A block that is being read: its slot is kept until that has ended."""

    place: int
    """In what was asked for."""
    slot: int
    block: TierBlock
    view: memoryview


class IndexedTier(ABC):
    """Base of tiers: the part of :class:`kvstore.tiers.base.Tier` that needs no device."""

    def __init__(self, index: SlotIndex, counts: TierStats) -> None:
        self._index = index
        self._counts = counts
        self._listener: Callable[[Sequence[Change]], None] | None = None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def bytes_used(self) -> int:
        return self._index.bytes_used

    @property
    def bytes_max(self) -> int:
        return self._index.slots_max * self._index.slot_bytes

    @property
    @abstractmethod
    def available(self) -> bool:
        """As :class:`kvstore.tiers.base.Tier` has it."""

    def listen(self, listener: Callable[[Sequence[Change]], None]) -> None:
        assert self._listener is None
        self._listener = listener

    def protect(self, rank: Callable[[BlockHash], float | None], shares: Mapping[str, float]) -> None:
        self._index.protect(rank, shares)

    def reshare(self, shares: Mapping[str, float]) -> None:
        self._index.reshare(shares)

    def repinned(self, hashes: Iterable[BlockHash]) -> None:
        self._index.repinned(hashes)

    def find(self, block_hash: BlockHash) -> TierBlock | None:
        return self._index.find(block_hash)

    def held(self) -> tuple[BlockHash, ...]:
        return self._index.held()

    def touch(self, block_hash: BlockHash) -> None:
        self._index.touch(block_hash)

    def _tell(self) -> None:
        """After every change of the index."""
        changes = self._index.take_changes()
        if changes and self._listener is not None:
            self._listener(changes)

    # --- reading ------------------------------------------------------------------------------------------

    async def load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[LoadOutcome]:
        sizes = [self._index.size_of(block_hash) for block_hash in hashes]
        outcomes = await finish(self._load(hashes, views))
        for size, outcome in zip(sizes, outcomes, strict=True):
            if outcome == "loaded":
                self._counts.loaded += 1
                self._counts.loaded_bytes += size
        return outcomes

    @abstractmethod
    async def _load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[LoadOutcome]:
        """Read and verify, without counting what was loaded; nobody cancels it."""

    def _begin(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[BlockRead]:
        """Reads of those that are held."""
        reads: list[BlockRead] = []
        for i, (block_hash, view) in enumerate(zip(hashes, views, strict=True)):
            begun = self._index.begin_read(block_hash)
            if begun is not None:
                reads.append(BlockRead(i, *begun, view))
        return reads

    def _drop_read(self, block: TierBlock) -> None:
        """What was read of a block is bad."""
        # A newer write of the same block may have taken its place meanwhile.
        if self._index.find(block.hash) == block:
            self._index.drop(block.hash)
            self._tell()

    async def scrub(self, after: int | None, view: memoryview) -> int | None:
        slot = self._index.next_held(0 if after is None else after + 1) if self.available else None
        block_hash = None if slot is None else self._index.hash_at(slot)
        if block_hash is None:
            return None
        await finish(self._load([block_hash], [view]))
        self._counts.scrubbed += 1
        return slot

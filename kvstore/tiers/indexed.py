"""What a tier with a slot index of its own answers from it, whatever its device."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from kvstore.tiers.base import TierBlock
from kvstore.tiers.slots import SlotIndex
from tracehaul.wire.blocks import Change
from tracehaul.wire.ids import BlockHash


class IndexedTier:
    """Base of tiers: the part of :class:`kvstore.tiers.base.Tier` that needs no device."""

    def __init__(self, index: SlotIndex) -> None:
        self._index = index
        self._listener: Callable[[Sequence[Change]], None] | None = None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def bytes_used(self) -> int:
        return self._index.bytes_used

    @property
    def bytes_max(self) -> int:
        return self._index.slots_max * self._index.slot_bytes

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

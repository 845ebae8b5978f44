"""Who continues whom: parents and counted continuations of the blocks of an arena. Pure."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import eq

import numpy as np

from kvstore.index.columns import column
from tracehaul.wire.ids import BlockHash

CYCLE_STEPS_MAX = 65536
"""Parents followed for one block before its chain counts as forged: far more than a sequence has blocks."""


class Continuations:
    """Counts, per block, the continuations that are published or reserved here.

    ``published`` is the arena's own index from hash to slot, read only. Chains of honest hashes have no cycle; forged
    ones that had would keep each other for ever, so :meth:`closes_cycle` must be asked before a block is added.
    """

    def __init__(self, slots_max: int, published: Mapping[BlockHash, int]) -> None:
        self._published = published
        self._parent: list[BlockHash | None] = [None] * slots_max  # by slot, while it is published
        self._count = array("I", bytes(4 * slots_max))  # by slot
        self._counts = np.frombuffer(self._count, dtype=np.uint32)  # the same bytes, for runs
        self._count_absent: dict[BlockHash, int] = {}  # of parents that are not published here

    def is_parent(self, slot: int) -> bool:
        """Whether the block in a published slot has a continuation here."""
        return self._count[slot] > 0

    def parent(self, slot: int) -> BlockHash:
        """What the block in a published slot is chained to."""
        parent = self._parent[slot]
        assert parent is not None
        return parent

    def ancestry(self, block_hash: BlockHash) -> Iterator[BlockHash]:
        """The block and its parents, as far as they are published without a gap; the end of a sequence first."""
        slot = self._published.get(block_hash)
        while slot is not None:
            yield block_hash
            block_hash = self.parent(slot)
            slot = self._published.get(block_hash)

    def closes_cycle(
        self, block_hash: BlockHash, parent: BlockHash, reserved_parent: Callable[[BlockHash], BlockHash | None]
    ) -> bool:
        """Whether a new block would be its own ancestor. Looks only where it has continuations before it exists."""
        if block_hash not in self._count_absent:
            return block_hash == parent
        at: BlockHash | None = parent
        for _ in range(CYCLE_STEPS_MAX):
            if at is None:
                return False
            if at == block_hash:
                return True
            slot = self._published.get(at)
            at = reserved_parent(at) if slot is None else self._parent[slot]
        return True

    def starts_run(self, hashes: Sequence[BlockHash], parent: BlockHash) -> bool:
        """Whether none of these, which are not here and each continue the one before, ``parent`` the first, would be
        its own ancestor, as far as that shows without following any chain."""
        return parent not in hashes and self._count_absent.keys().isdisjoint(hashes)

    def expect_run(self, hashes: Sequence[BlockHash]) -> None:
        """As :meth:`expect` for each of these, none of which is here or has a continuation yet."""
        self._count_absent.update(zip(hashes, repeat(1)))

    def expect(self, parent: BlockHash) -> None:
        """A continuation of ``parent`` is reserved."""
        slot = self._published.get(parent)
        if slot is not None:
            self._count[slot] += 1
        else:
            self._count_absent[parent] = self._count_absent.get(parent, 0) + 1

    def publish(self, slot: int, block_hash: BlockHash, parent: BlockHash) -> None:
        """An expected block is now published in ``slot``."""
        self._parent[slot] = parent
        self._count[slot] = self._count_absent.pop(block_hash, 0)

    def publish_run(self, slots: Sequence[int], hashes: Sequence[BlockHash], parents: Sequence[BlockHash]) -> None:
        """As :meth:`publish` for each."""
        own = self._parent
        for slot, parent in zip(slots, parents, strict=True):
            own[slot] = parent
        counts = array("I", map(self._count_absent.pop, hashes, repeat(0)))
        self._counts[column(slots)] = np.frombuffer(counts, dtype=np.uint32)

    def restore(self, slots: Sequence[int], parents: Sequence[BlockHash]) -> None:
        """All published blocks at once, where there was none, and nothing was expected."""
        find, own, count, absent = self._published.get, self._parent, self._count, self._count_absent
        for slot, parent in zip(slots, parents, strict=True):
            own[slot] = parent
            parent_slot = find(parent)
            if parent_slot is not None:
                count[parent_slot] += 1
            else:
                absent[parent] = absent.get(parent, 0) + 1

    def loose(self, slots: Sequence[int]) -> int:
        """How many of these, from the first on, have no continuation but the one right before, if any."""
        if not slots:
            return 0
        continues = [False, *map(eq, self._parent_slots(slots[:-1]), slots[1:])]
        kept = np.flatnonzero(self._counts[column(slots)] > np.array(continues))
        return int(kept[0]) if kept.size else len(slots)

    def remove_run(self, slots: Sequence[int]) -> list[int]:
        """As :meth:`remove` for each of some that are :meth:`loose`: a parent among them comes right after its
        continuation. Returns slots of published parents that are not among them."""
        nexts = [*slots[1:], -1]
        parents = [
            self.parent(slot)
            for slot, parent_slot, after in zip(slots, self._parent_slots(slots), nexts, strict=True)
            if parent_slot != after or after < 0
        ]
        for slot in slots:
            self._parent[slot] = None
        self._counts[column(slots)] = 0
        return [slot for parent in parents if (slot := self.forget(parent)) is not None]

    def _parent_slots(self, slots: Sequence[int]) -> list[int]:
        """The slots of their parents; -1 where one is not published."""
        find, parents = self._published.get, self._parent
        return [find(parent, -1) for slot in slots if (parent := parents[slot]) is not None]

    def remove(self, slot: int, block_hash: BlockHash) -> int | None:
        """A block is no longer published; as :meth:`forget` for its parent."""
        parent = self.parent(slot)
        if self._count[slot]:
            self._count_absent[block_hash] = self._count[slot]
            self._count[slot] = 0
        self._parent[slot] = None
        return self.forget(parent)

    def forget(self, parent: BlockHash) -> int | None:
        """A continuation of ``parent`` is gone. Returns the parent's slot if it is published."""
        slot = self._published.get(parent)
        if slot is not None:
            self._count[slot] -= 1
            return slot
        count = self._count_absent.pop(parent) - 1
        if count:
            self._count_absent[parent] = count
        return None

    def check(self, reserved: Sequence[tuple[BlockHash, BlockHash]]) -> None:
        """Assert that counts and parents agree, given the reserved blocks with their parents, and find cycles."""
        children: dict[BlockHash, int] = {}
        parents = dict(reserved)
        for block_hash, slot in self._published.items():
            parents[block_hash] = self.parent(slot)
        for parent in parents.values():
            children[parent] = children.get(parent, 0) + 1
        slots = {slot: block_hash for block_hash, slot in self._published.items()}
        for slot, count in enumerate(self._count):
            assert count == (children.pop(slots[slot], 0) if slot in slots else 0)
            assert (self._parent[slot] is not None) == (slot in slots)
        assert self._count_absent == children
        rooted: set[BlockHash] = set()
        for block_hash in parents:
            path: dict[BlockHash, None] = {}
            at = block_hash
            while at in parents and at not in rooted:
                assert at not in path, "a cycle of parents"
                path[at] = None
                at = parents[at]
            rooted.update(path)

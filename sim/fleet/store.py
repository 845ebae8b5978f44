"""A store node: which blocks are in memory, which on disk. The least recently used gives way, from a sequence's end.

Pure.
"""

from collections import OrderedDict
from collections.abc import Sequence

from router.fleet.index import Index
from sim.fleet.shape import StoreKind
from tracehaul.wire.blocks import Change, Events, Moved, Removed, Snapshot, Stored
from tracehaul.wire.ids import BlockHash, Generation, NodeId

LIFE = Generation(1)


class Store:
    """One node; tells ``index`` what it holds, if that is shared."""

    def __init__(self, node: NodeId, kind: StoreKind, block_tokens: int, index: Index | None) -> None:
        self.node = node
        self.kind = kind
        self.link_free_s = 0.0
        """When its link has done what it was asked for."""
        self.disk_free_s = 0.0
        self.memory: OrderedDict[BlockHash, None] = OrderedDict()
        self.disk: OrderedDict[BlockHash, None] = OrderedDict()
        """Of these most are in memory, too: blocks are written there as they come."""
        self._memory_max = kind.memory_tokens // block_tokens
        self._disk_max = kind.disk_tokens // block_tokens
        self._index = index
        self._sequence = 0
        if index is not None:
            index.snapshot(node, Snapshot(LIFE, 0, (), True))

    def put(self, hashes: Sequence[BlockHash]) -> int:
        """A sequence's blocks are here now, all of them just used; returns how many were not in memory."""
        memory, disk = self.memory, self.disk
        changes: list[Change] = []
        new = 0
        for block in reversed(hashes):
            if block in memory:
                memory.move_to_end(block)
            else:
                new += 1
                changes.append(Moved(block, 0) if block in disk else Stored(block, 0))
                memory[block] = None
            if self._disk_max:
                disk[block] = None
                disk.move_to_end(block)
        self._give_way(changes)
        return new

    def _give_way(self, changes: list[Change]) -> None:
        memory, disk = self.memory, self.disk
        while len(disk) > self._disk_max:
            block, _ = disk.popitem(last=False)
            if block not in memory:
                changes.append(Removed(block))
        while len(memory) > self._memory_max:
            block, _ = memory.popitem(last=False)
            changes.append(Moved(block, 1) if block in disk else Removed(block))
        if changes and self._index is not None:
            self._index.events(self.node, Events(LIFE, self._sequence + 1, tuple(changes)))
            self._sequence += len(changes)

    def leading(self, hashes: Sequence[BlockHash]) -> tuple[int, int]:
        """How many leading blocks are here, and how many of those not in memory."""
        memory, disk = self.memory, self.disk
        below = 0
        for number, block in enumerate(hashes):
            if block not in memory:
                if block not in disk:
                    return number, below
                below += 1
        return len(hashes), below

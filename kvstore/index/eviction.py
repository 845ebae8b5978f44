"""Which block goes first. Pure.

:class:`kvstore.index.victims.Victims` asks a policy for candidates, per group of tenants, and decides whether one may
go. Those that may not are *parked* (taken out of the order) and put back when what kept them goes, so an eviction costs
O(1) amortized although a long-lived prefix may sit at the old end for ever.
"""

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.index.columns import column
from tracehaul.wire.ids import BlockHash


class Policy(Protocol):
    """The order in which a group's blocks are given up. A slot is unknown to it, in its order, or parked."""

    def __contains__(self, slot: int) -> bool:
        """Whether the slot is in the order."""
        ...

    def add(self, slot: int, group: int, block_hash: BlockHash) -> None:
        """A block became visible in an unknown slot."""
        ...

    def touch(self, slot: int, group: int) -> None:
        """A block was used. It is in the order from then on, even if it was parked."""
        ...

    def candidate(self, group: int) -> int | None:
        """The slot to give up next; it stays in the order until it is parked or removed."""
        ...

    def park(self, slot: int) -> None:
        """Take a candidate out of the order until :meth:`restore`."""
        ...

    def restore(self, slot: int, group: int) -> None:
        """Put a parked slot back where it was, or where it would be the next candidate."""
        ...

    def remove(self, slot: int) -> None:
        """The block is gone: the slot, in the order or parked, is unknown again."""
        ...

    def order(self, group: int) -> list[int]:
        """All slots of a group in the order, for checks and tests."""
        ...

    # Many at once: what follows may be done better than one by one.

    def add_run(self, slots: Sequence[int], group: int, hashes: Sequence[BlockHash]) -> None:
        """Blocks of one sequence became visible: as :meth:`add` for each, the last first, so that among equals the
        end of a sequence goes before its start."""
        for slot, block_hash in zip(reversed(slots), reversed(hashes), strict=True):
            self.add(slot, group, block_hash)

    def touch_run(self, slots: Sequence[int], group: int) -> None:
        """As :meth:`touch` for each; no two are the same."""
        for slot in slots:
            self.touch(slot, group)

    def oldest(self, group: int, count: int) -> list[int]:
        """Up to ``count`` slots that :meth:`candidate` would name one after the other, if each were removed or parked;
        none where only asking would tell."""
        return []

    def remove_run(self, slots: Sequence[int]) -> None:
        """As :meth:`remove` for each."""
        for slot in slots:
            self.remove(slot)


class LeastRecent(Policy):
    """Least recently used first: a doubly linked list per group in two flat arrays, 8 bytes per slot."""

    def __init__(self, slots_max: int, groups: int) -> None:
        # The sentinel of a group follows the slots: its successor is the oldest, its predecessor the newest.
        self._slots_max = slots_max
        self._newer = array("I", range(slots_max + groups))  # a slot linked to itself is not in a list
        self._older = array("I", range(slots_max + groups))
        self._newers = np.frombuffer(self._newer, dtype=np.uint32)  # the same bytes, for runs
        self._olders = np.frombuffer(self._older, dtype=np.uint32)

    def __contains__(self, slot: int) -> bool:
        return self._newer[slot] != slot

    def add(self, slot: int, group: int, block_hash: BlockHash) -> None:
        self.touch(slot, group)

    def touch(self, slot: int, group: int) -> None:
        self.remove(slot)
        end = self._slots_max + group
        self._link(self._older[end], slot, end)

    def candidate(self, group: int) -> int | None:
        slot = self._newer[self._slots_max + group]
        return None if slot >= self._slots_max else slot

    def park(self, slot: int) -> None:
        self.remove(slot)

    def restore(self, slot: int, group: int) -> None:
        """At the old end: everything that was older has gone since."""
        assert slot not in self
        end = self._slots_max + group
        self._link(end, slot, self._newer[end])

    def remove(self, slot: int) -> None:
        older, newer = self._older[slot], self._newer[slot]
        self._newer[older] = newer
        self._older[newer] = older
        self._newer[slot] = self._older[slot] = slot

    def add_run(self, slots: Sequence[int], group: int, hashes: Sequence[BlockHash]) -> None:
        self._append(column(slots)[::-1], group)

    def touch_run(self, slots: Sequence[int], group: int) -> None:
        at = column(slots)
        self._cut(at)
        self._append(at, group)

    def oldest(self, group: int, count: int) -> list[int]:
        slots: list[int] = []
        newer, slots_max = self._newer, self._slots_max
        at = newer[slots_max + group]
        while at < slots_max and len(slots) < count:
            slots.append(at)
            at = newer[at]
        return slots

    def remove_run(self, slots: Sequence[int]) -> None:
        at = column(slots)
        self._cut(at)
        self._newers[at] = at
        self._olders[at] = at

    def _append(self, at: NDArray[np.uint32], group: int) -> None:
        """Link slots that are in no list, in this order, at the new end."""
        end = self._slots_max + group
        newest, first, last = self._older[end], int(at[0]), int(at[-1])
        self._newers[at[:-1]] = at[1:]
        self._olders[at[1:]] = at[:-1]
        self._newer[newest], self._older[first] = first, newest
        self._newer[last], self._older[end] = end, last

    def _cut(self, at: NDArray[np.uint32]) -> None:
        """Take slots out of their list; their own links are of no use afterwards."""
        first, last = int(at[0]), int(at[-1])
        if last in self and bool((self._newers[at[:-1]] == at[1:]).all()):  # neighbours: published or used together
            older, newer = self._older[first], self._newer[last]
            self._newer[older], self._older[newer] = newer, older
            return
        for slot in at.tolist():
            self.remove(slot)

    def _link(self, older: int, slot: int, newer: int) -> None:
        self._newer[older] = self._older[newer] = slot
        self._older[slot] = older
        self._newer[slot] = newer

    def order(self, group: int) -> list[int]:
        """Oldest first, with both directions verified."""
        slots: list[int] = []
        at = end = self._slots_max + group
        while (newer := self._newer[at]) != end:
            assert self._older[newer] == at, "the list's directions disagree"
            slots.append(newer)
            assert len(slots) <= self._slots_max, "the list has a cycle"
            at = newer
        assert self._older[end] == at
        return slots


class Ranked:
    """Softly pinned slots that a search came across, per group, lowest rank first."""

    def __init__(self, groups: int) -> None:
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(groups)]  # may name slots that are not in
        self._in: dict[int, tuple[int, float]] = {}  # slot -> group, rank

    def __contains__(self, slot: int) -> bool:
        return slot in self._in

    def __len__(self) -> int:
        return len(self._in)

    def add(self, slot: int, group: int, rank: float) -> None:
        """Put a slot in."""
        assert slot not in self._in
        self._in[slot] = group, rank
        heap = self._heaps[group]
        heappush(heap, (rank, slot))
        if len(heap) > 2 * len(self._in) + 64:  # removed ones pile up; what is sorted is a heap
            self._heaps[group] = sorted({entry for entry in heap if self._in.get(entry[1]) == (group, entry[0])})

    def candidate(self, group: int) -> int | None:
        """The slot of the lowest rank; it stays in."""
        heap = self._heaps[group]
        while heap:
            rank, slot = heap[0]
            if self._in.get(slot) == (group, rank):
                return slot
            heappop(heap)
        return None

    def remove(self, slot: int) -> None:
        """Take a slot out; harmless if it is not in."""
        self._in.pop(slot, None)

    def check(self, rank_of: Callable[[int], float | None]) -> None:
        """Assert that every slot in is found, at its rank of today."""
        for slot, (group, rank) in self._in.items():
            assert rank_of(slot) == rank
            assert (rank, slot) in self._heaps[group]

"""Eviction policies that the store's own is compared with."""

from collections import OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from kvstore.index.eviction import LeastRecent, Policy
from tracehaul.wire.ids import BlockHash

FREQUENCY_MAX = 3
SMALL_SHARE = 0.1


class S3Fifo(Policy):
    """Two queues and a memory of what was evicted (Yang et al., SOSP 2023): new blocks enter a small queue; those used
    again move on to the main one, where a use is another round. One group."""

    def __init__(self, slots_max: int) -> None:
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghost: OrderedDict[BlockHash, None] = OrderedDict()
        self._frequency = bytearray(slots_max)
        self._hash: dict[int, BlockHash] = {}
        self._in_small: dict[int, bool] = {}
        self._slots_max = slots_max

    def __contains__(self, slot: int) -> bool:
        return slot in self._small or slot in self._main

    def add(self, slot: int, group: int, block_hash: BlockHash) -> None:
        self._frequency[slot] = 0
        self._hash[slot] = block_hash
        known = self._ghost.pop(block_hash, False) is None
        self._in_small[slot] = not known
        (self._main if known else self._small)[slot] = None

    def touch(self, slot: int, group: int) -> None:
        self._frequency[slot] = min(FREQUENCY_MAX, self._frequency[slot] + 1)
        if slot not in self:
            (self._small if self._in_small[slot] else self._main)[slot] = None

    def candidate(self, group: int) -> int | None:
        while self._small or self._main:
            if self._small and (not self._main or len(self._small) > SMALL_SHARE * self._slots_max):
                slot = next(iter(self._small))
                if self._frequency[slot] <= 1:
                    return slot
                del self._small[slot]
                self._in_small[slot] = False
                self._frequency[slot] = 0
                self._main[slot] = None
            else:
                slot = next(iter(self._main))
                if not self._frequency[slot]:
                    return slot
                self._frequency[slot] -= 1
                self._main.move_to_end(slot)
        return None

    def park(self, slot: int) -> None:
        self._small.pop(slot, None)
        self._main.pop(slot, None)

    def restore(self, slot: int, group: int) -> None:
        queue = self._small if self._in_small[slot] else self._main
        queue[slot] = None
        queue.move_to_end(slot, last=False)

    def remove(self, slot: int) -> None:
        self.park(slot)
        if self._in_small.pop(slot):
            self._ghost[self._hash[slot]] = None
            if len(self._ghost) > self._slots_max:
                self._ghost.popitem(last=False)
        del self._hash[slot]

    def order(self, group: int) -> list[int]:
        return [*self._small, *self._main]


class GreedyDual(Policy):
    """Lowest credit first (Cao and Irani, 1997): a use sets a block's credit to the credit last evicted plus its value,
    a function of its uses so far and its hash. One group."""

    def __init__(self, value: Callable[[int, BlockHash], float]) -> None:
        self._value = value
        self._clock = 0.0
        self._uses: dict[int, int] = {}
        self._hash: dict[int, BlockHash] = {}
        self._credit: dict[int, tuple[float, int]] = {}
        self._parked: dict[int, None] = {}
        self._heap: list[tuple[float, int, int]] = []
        self._touches = 0

    def __contains__(self, slot: int) -> bool:
        return slot in self._credit and slot not in self._parked

    def add(self, slot: int, group: int, block_hash: BlockHash) -> None:
        self._uses[slot] = 0
        self._hash[slot] = block_hash
        self.touch(slot, group)

    def touch(self, slot: int, group: int) -> None:
        self._parked.pop(slot, None)
        self._uses[slot] += 1
        self._touches += 1  # among equals the least recently used goes first
        credit = self._clock + self._value(self._uses[slot], self._hash[slot])
        self._credit[slot] = credit, self._touches
        self._push(slot)

    def _push(self, slot: int) -> None:
        credit, touch = self._credit[slot]
        heappush(self._heap, (credit, touch, slot))
        if len(self._heap) > 4 * len(self._credit) + 64:
            self._heap = [(*self._credit[s], s) for s in self._credit if s not in self._parked]
            heapify(self._heap)

    def candidate(self, group: int) -> int | None:
        while self._heap:
            credit, touch, slot = self._heap[0]
            if slot in self and self._credit[slot] == (credit, touch):
                return slot
            heappop(self._heap)
        return None

    def park(self, slot: int) -> None:
        self._parked[slot] = None

    def restore(self, slot: int, group: int) -> None:
        del self._parked[slot]
        self._push(slot)

    def remove(self, slot: int) -> None:
        if slot not in self._parked:
            self._clock = max(self._clock, self._credit[slot][0])
        self._parked.pop(slot, None)
        del self._credit[slot], self._uses[slot], self._hash[slot]

    def order(self, group: int) -> list[int]:
        return [slot for slot in self._credit if slot not in self._parked]


def lru(slots_max: int) -> LeastRecent:
    """The store's own, for a single group."""
    return LeastRecent(slots_max, 1)

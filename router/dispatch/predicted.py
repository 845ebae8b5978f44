"""What was dispatched a moment ago: blocks that no store has announced yet, and who is about to have them. Pure.

Children of a fork arrive at once. Without this each would be placed as if it were the first, and the prefix that they
share would be computed once by each worker.

Hashes are chained, so two prompts that agree on a block agree on all before it: how much they share is found by
bisection, and a prompt is remembered by its list of hashes as it is.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from tracehaul.wire.ids import BlockHash, NodeId

TTL_S = 5.0
"""By then it is announced, or it will not be."""
PROMPTS_MAX = 4096
SIBLINGS_MAX = 64
"""Prompts with one first block that are looked at, the last ones."""


class _Dispatched(NamedTuple):
    hashes: Sequence[BlockHash]
    nodes: tuple[NodeId, ...]
    until_s: float


class Predicted:
    """Prompts sent to nodes, or renewed, within the last :data:`TTL_S`; bounded, the oldest are forgotten first."""

    def __init__(self) -> None:
        self._by_first: OrderedDict[BlockHash, deque[_Dispatched]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        """Prompts remembered, outdated ones too until they are swept."""
        return self._count

    def add(self, hashes: Sequence[BlockHash], nodes: Sequence[NodeId], now_s: float) -> None:
        """A prompt of these full blocks was sent to these nodes."""
        self.sweep(now_s)
        if not hashes:
            return
        siblings = self._by_first.setdefault(hashes[0], deque())
        self._by_first.move_to_end(hashes[0])
        if len(siblings) == SIBLINGS_MAX:
            siblings.popleft()
            self._count -= 1
        siblings.append(_Dispatched(hashes, tuple(nodes), now_s + TTL_S))
        self._count += 1
        while self._count > PROMPTS_MAX:
            oldest = next(iter(self._by_first.values()))
            oldest.popleft()
            self._count -= 1
            self._drop_empty(next(iter(self._by_first)))

    def sweep(self, now_s: float) -> None:
        """Forget what is outdated, the oldest first, up to the first that is not."""
        while self._by_first:
            first, siblings = next(iter(self._by_first.items()))
            while siblings and siblings[0].until_s <= now_s:
                siblings.popleft()
                self._count -= 1
            if siblings:
                return
            del self._by_first[first]

    def renew(self, hashes: Sequence[BlockHash], now_s: float) -> None:
        """What was added as this very list is still waited for."""
        siblings = self._by_first.get(hashes[0]) if hashes else None
        for at, dispatched in enumerate(siblings or ()):
            if dispatched.hashes is hashes and siblings is not None:
                siblings[at] = dispatched._replace(until_s=now_s + TTL_S)

    def match(self, hashes: Sequence[BlockHash], now_s: float) -> dict[NodeId, int]:
        """Leading blocks of a prompt that each node is about to have for others; those with none are left out.

        What was added as this very list is left out, too: it is the prompt's own, from an earlier attempt.
        """
        siblings = self._by_first.get(hashes[0]) if hashes else None
        if siblings is None:
            return {}
        while siblings and siblings[0].until_s <= now_s:
            siblings.popleft()
            self._count -= 1
        found: dict[NodeId, int] = {}
        for dispatched in siblings:
            if dispatched.hashes is hashes or dispatched.until_s <= now_s:
                continue
            shared = shared_blocks(dispatched.hashes, hashes)
            for node in dispatched.nodes:
                found[node] = max(shared, found.get(node, 0))
        self._drop_empty(hashes[0])
        return found

    def _drop_empty(self, first: BlockHash) -> None:
        if not self._by_first[first]:
            del self._by_first[first]


def shared_blocks(one: Sequence[BlockHash], other: Sequence[BlockHash]) -> int:
    """Length of the common prefix of two chains of hashes."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high) // 2
        if one[middle] == other[middle]:
            low = middle + 1
        else:
            high = middle
    return low

"""Which store node holds which blocks: soft state built from the nodes' own numbered events. Pure.

A hole in a node's numbers, or another generation, means that what is known of it is stale: the shell subscribes
again and a snapshot replaces it. A stale entry costs a miss, never a wrong answer.

One dict from block to holders, a bit for each node's subscription, so that a prompt of thousands of blocks is matched
against all nodes in one pass; another such dict for each tier below memory, of those that have a block there at best.
What a node that is gone was known to hold is no longer seen at once, and swept away in slices later
(:meth:`Index.sweep`): a node's million blocks must not hold up the router.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from tracehaul.wire.blocks import Events, Removed, Snapshot
from tracehaul.wire.ids import BlockHash, Generation, NodeId


@dataclass
class _Node:
    generation: Generation
    sequence: int
    bit: int
    held: set[BlockHash] = field(default_factory=set[BlockHash])
    complete: bool = False


class TierRun(msgspec.Struct, frozen=True):
    """A stretch of a prompt whose blocks are all to be had from one tier at best."""

    end: int
    """In blocks from the prompt's beginning; the next stretch begins there."""
    tier: int
    """As in :class:`tracehaul.wire.blocks.Stored`."""


class Match(msgspec.Struct, frozen=True):
    """Who holds how much of a prompt, in leading blocks."""

    blocks: int
    """All nodes together: the run that can be pulled, a part of it from each."""
    by_node: dict[NodeId, int]
    """Each alone; nodes that lack the first block are left out."""
    runs: tuple[TierRun, ...] = ()
    """What the leading run is made of."""


class Index:
    """Block hash -> holders, fleet wide."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, _Node] = {}
        self._holders: dict[BlockHash, int] = {}
        """Bits of nodes, and of former ones until they are swept; never 0."""
        self._below: list[dict[BlockHash, int]] = []
        """The same of those nodes that have it in the first tier below memory, the second…, and none above that."""
        self._live = 0
        """Bits of the nodes."""
        self._gone: deque[_Node] = deque()

    def snapshot(self, node: NodeId, part: Snapshot) -> None:
        """Take in one part of a node's snapshot; parts of another one replace what was known."""
        known = self._nodes.get(node)
        if known is None or known.complete or known.generation != part.generation or known.sequence != part.sequence:
            self.forget(node)
            known = self._nodes[node] = _Node(part.generation, part.sequence, self._free_bit())
            self._live |= known.bit
        holders, bit = self._holders, known.bit
        below = self._tier(part.tier)
        for block in part.hashes:
            holders[block] = holders.get(block, 0) | bit
            if below is not None:
                below[block] = below.get(block, 0) | bit
        known.held.update(part.hashes)
        known.complete = part.last

    def events(self, node: NodeId, events: Events) -> bool:
        """Take in changes; False if numbers are missing: then subscribe again."""
        known = self._nodes.get(node)
        if (
            known is None
            or not known.complete
            or known.generation != events.generation
            or events.first > known.sequence + 1
        ):
            return False
        holders, held, bit = self._holders, known.held, known.bit
        for change in events.changes[known.sequence + 1 - events.first :]:  # what was before is in the snapshot
            block = change.hash
            if isinstance(change, Removed):
                if block in held:
                    held.remove(block)
                    self._clear(block, bit)
                continue
            held.add(block)
            holders[block] = holders.get(block, 0) | bit
            if change.tier or self._below:
                self._settle(block, bit, change.tier)
        known.sequence = max(known.sequence, events.first + len(events.changes) - 1)
        return True

    def forget(self, node: NodeId) -> None:
        """The node is gone, or its subscription broke."""
        known = self._nodes.pop(node, None)
        if known is not None:
            self._live &= ~known.bit
            self._gone.append(known)

    def sweep(self, blocks_max: int) -> bool:
        """Drop up to so many entries of nodes that are gone; whether some are left."""
        while self._gone and blocks_max > 0:
            gone = self._gone[0]
            for _ in range(min(blocks_max, len(gone.held))):
                self._clear(gone.held.pop(), gone.bit)
                blocks_max -= 1
            if not gone.held:
                self._gone.popleft()
        return bool(self._gone)

    def held(self, node: NodeId) -> dict[BlockHash, int]:
        """What the node is known to hold, and the fastest of its tiers that has it."""
        known = self._nodes.get(node)
        if known is None:
            return {}
        tiers = dict.fromkeys(known.held, 0)
        for number, holders in enumerate(self._below, 1):
            tiers.update((block, number) for block, nodes in holders.items() if nodes & known.bit)
        return tiers

    def blocks(self) -> dict[NodeId, int]:
        """Blocks known per node."""
        return {node: len(known.held) for node, known in self._nodes.items()}

    def match(self, hashes: Sequence[BlockHash]) -> Match:
        """The leading runs of ``hashes`` that live nodes hold, together and each, and where it is to be had."""
        live = self._live
        found = list(map(self._holders.get, hashes))
        blocks = len(found)
        ends: dict[int, int] = {}
        alone = live
        for place, holders in enumerate(found):
            here = (holders or 0) & live
            if not here:
                blocks = place
                break
            if alone & ~here:
                ends[alone & ~here] = place
                alone &= here
        ends[alone] = blocks
        by_node: dict[NodeId, int] = {}
        for bits, end in ends.items():
            if end:
                by_node.update((node, end) for node, known in self._nodes.items() if known.bit & bits)
        return Match(blocks, by_node, self._runs(hashes, found, blocks))

    def _runs(self, hashes: Sequence[BlockHash], found: Sequence[int | None], blocks: int) -> tuple[TierRun, ...]:
        if not any(self._below):
            return (TierRun(blocks, 0),) if blocks else ()
        live = self._live
        in_memory = (None,) * len(self._below)
        leading = hashes[:blocks]
        runs: list[TierRun] = []
        last = 0
        columns = zip(*(map(holders.get, leading) for holders in self._below), strict=True)
        for place, below in enumerate(columns):
            tier = 0
            if below != in_memory:
                tier = _fastest((found[place] or 0) & live, below)
            if tier != last:
                if place:
                    runs.append(TierRun(place, last))
                last = tier
        if blocks:
            runs.append(TierRun(blocks, last))
        return tuple(runs)

    def check(self) -> None:
        """Assert that both directions agree."""
        bits = [known.bit for known in (*self._nodes.values(), *self._gone)]
        assert len(set(bits)) == len(bits)
        assert self._live == sum(known.bit for known in self._nodes.values())
        told: dict[BlockHash, int] = {}
        for known in (*self._nodes.values(), *self._gone):
            for block in known.held:
                told[block] = told.get(block, 0) | known.bit
        assert told == self._holders
        for number, holders in enumerate(self._below):
            for block, nodes in holders.items():
                assert nodes
                assert nodes & ~self._holders.get(block, 0) == 0
                assert not any(nodes & other.get(block, 0) for other in self._below[number + 1 :])

    def _free_bit(self) -> int:
        """The lowest that no node has and none that is gone had: small integers are fast ones."""
        used = self._live | sum(gone.bit for gone in self._gone)
        return ~used & (used + 1)

    def _tier(self, number: int) -> dict[BlockHash, int] | None:
        """Who has what there; None for memory."""
        while len(self._below) < number:
            self._below.append({})
        return self._below[number - 1] if number else None

    def _settle(self, block: BlockHash, bit: int, tier: int) -> None:
        """A node has the block there now, and not above."""
        for holders in self._below:
            _drop(holders, block, bit)
        here = self._tier(tier)
        if here is not None:
            here[block] = here.get(block, 0) | bit

    def _clear(self, block: BlockHash, bit: int) -> None:
        _drop(self._holders, block, bit)
        for holders in self._below:
            _drop(holders, block, bit)


def _fastest(here: int, below: Sequence[int | None]) -> int:
    """The tier from which live holders have a block at best; ``below``: who has it in each tier below memory."""
    low = [(nodes or 0) & here for nodes in below]
    return 0 if here & ~sum(low) else next(number for number, nodes in enumerate(low, 1) if nodes)


def _drop(holders: dict[BlockHash, int], block: BlockHash, bit: int) -> None:
    left = holders.get(block)
    if left is None:
        return
    if left & ~bit:
        holders[block] = left & ~bit
    else:
        del holders[block]

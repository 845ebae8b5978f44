"""Copies of a node's own blocks on other nodes: the way that replicas and drains share.

A block leaves from its slot in the arena, held as long as its bytes can be read, by the same steps that a writer
takes: reserve, write, publish. It goes with the checksum that it has here, so bytes that went bad do not spread: the
receiver refuses them and this node looks at its own copy. A block that only the slower tier has comes up first.

A receiver that is dead, frozen or slow costs one part its timeout at most, and is then left alone for a moment; what it
may still read of that part stays held meanwhile.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from kvstore.client.nodes import StoreNodes, StoreNodeView
from kvstore.client.staging import StagingBuffer
from kvstore.client.writer import OutgoingBlock, PutOutcome, Writer
from kvstore.copies.rate import Rate
from kvstore.index.arena import Arena
from kvstore.index.tenants import TenantKey
from kvstore.tiers.tiering import Tiering
from tracehaul.runtime import clock
from tracehaul.wire.blocks import BlockSpec, Existing, Exists
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.ids import BlockHash, LeaseId, NodeId, SlotGeneration

PART_BYTES = 4 << 20
PART_BLOCKS_MAX = 64
PART_TIMEOUT_S = 3.0
"""For one part to be reserved, written and published."""
PROMOTE_TIMEOUT_S = 10.0
"""For one part to come up from the slower tier."""
EXISTS_TIMEOUT_S = 1.0
HOLD_S = 600.0
"""A hold ends when its bytes cannot be read any more; this bounds what a receiver that hangs can keep."""
HOLDER = "\0copies"
"""Of what is on its way to another node: no connection has this name."""

CopyOutcome = Literal["copied", "present", "gone", "full", "failed", "corrupt"]
"""``gone``: not here any more. ``full``: the receiver has no room for it. ``corrupt``: the bytes did not match."""


class CopyStats(msgspec.Struct):
    """Counts since the node's start."""

    blocks: int = 0
    """Blocks that were written to another node."""
    bytes: int = 0
    present: int = 0
    """Blocks that were to be written and that the other node had."""
    refused: int = 0
    """Blocks that the other node had no room for."""
    failed: int = 0
    """Blocks that did not get there: the other node was lost, late, or wrote them itself."""
    corrupt: int = 0
    """Blocks that the other node found bad."""


class Holdings(NamedTuple):
    """What a node has, as those see it who copy it."""

    arena: Arena
    buffer: memoryview
    slot_bytes: int
    tiering: Tiering | None
    settle: Callable[[], None]
    """After every change of the arena."""
    verify: Callable[[BlockHash, SlotGeneration], Awaitable[None]]
    """Look whether a block's bytes are good, and drop it if not."""

    def spec(self, block_hash: BlockHash) -> BlockSpec | None:
        """A visible block's size and parent."""
        found = self.arena.spec(block_hash)
        if found is None and self.tiering is not None:
            below = self.tiering.tier.find(block_hash)
            found = None if below is None else BlockSpec(below.hash, below.parent, below.size_bytes)
        return found

    def in_memory(self, block_hash: BlockHash) -> bool:
        """Whether it can be copied without bringing it up."""
        return self.arena.spec(block_hash) is not None

    def visible(self) -> tuple[BlockHash, ...]:
        """All blocks."""
        return (self.tiering or self.arena).published()


class Copier:
    """Copies parts of what a node has, no faster than ``rate``."""

    def __init__(self, holdings: Holdings, nodes: StoreNodes, writer: Writer, rate: Rate) -> None:
        self._holdings = holdings
        self._nodes = nodes
        self._writer = writer
        self._rate = rate
        slots = len(holdings.buffer) // holdings.slot_bytes
        # What is held cannot be evicted: in a small arena that must stay a small part.
        self._part_blocks = max(1, min(PART_BLOCKS_MAX, PART_BYTES // holdings.slot_bytes, slots // 8))
        self.stats = CopyStats()

    def view(self, node: NodeId) -> StoreNodeView | None:
        """The node, if it is a member and has not just failed."""
        return self._nodes.find(node)

    def parts(self, hashes: Sequence[BlockHash]) -> Iterator[Sequence[BlockHash]]:
        """``hashes`` in order, in lists that can be copied at once."""
        for start in range(0, len(hashes), self._part_blocks):
            yield hashes[start : start + self._part_blocks]

    async def lacks(self, view: StoreNodeView, hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """Those of ``hashes`` that the node does not have.

        Raises:
            ClusterError: it does not say.
        """
        if not hashes:
            return []
        held = (await self._nodes.call(view, Exists(tuple(hashes)), Existing, EXISTS_TIMEOUT_S)).held
        return [h for place, h in enumerate(hashes) if place >= len(held) or not held[place]]

    async def copy(self, view: StoreNodeView, part: Sequence[BlockHash]) -> list[CopyOutcome]:
        """Copy one of :meth:`parts`; raises nothing for the world."""
        nbytes = sum(spec.size_bytes for spec in map(self._holdings.spec, part) if spec is not None)
        await self._rate.take(nbytes)
        tiering = self._holdings.tiering
        if tiering is None or 0 not in self._holdings.arena.exists(part):
            outcomes = await self._copy(view, part, self._hold(part))
        else:
            async with tiering.promotions.promoted(part, PROMOTE_TIMEOUT_S):
                hold = self._hold(part)
            outcomes = await self._copy(view, part, hold)
        stats = self.stats
        stats.present += outcomes.count("present")
        stats.refused += outcomes.count("full")
        stats.failed += outcomes.count("failed")
        stats.corrupt += outcomes.count("corrupt")
        return outcomes

    def _hold(self, part: Sequence[BlockHash]) -> "_Hold":
        holdings = self._holdings
        lease, found = holdings.arena.hold(part, HOLDER, HOLD_S, clock.now_s())
        blocks: list[OutgoingBlock | None] = []
        generations: list[SlotGeneration | None] = []
        tenants: dict[BlockHash, TenantKey] = {}
        for block_hash, held in zip(part, found, strict=True):
            if held is None:
                blocks.append(None)
                generations.append(None)
                continue
            block, parent, tenant = held
            tenants[block_hash] = tenant
            buffer = StagingBuffer(holdings.buffer[block.offset : block.offset + block.size_bytes], block.offset)
            blocks.append(OutgoingBlock(block_hash, parent, buffer, block.size_bytes, block.checksum))
            generations.append(block.generation)
        holdings.settle()
        return _Hold(lease, blocks, generations, tenants)

    async def _copy(self, view: StoreNodeView, part: Sequence[BlockHash], hold: "_Hold") -> list[CopyOutcome]:
        outgoing = [block for block in hold.blocks if block is not None]
        try:
            puts = await self._put(view, outgoing, hold.tenants)
        finally:
            self._release_settled(hold.lease, [block.buffer for block in outgoing])
        outcomes: list[CopyOutcome] = []
        for block_hash, block, generation in zip(part, hold.blocks, hold.generations, strict=True):
            if block is None or generation is None:
                # It may be below, and have been too slow to come up.
                outcomes.append("gone" if self._holdings.spec(block_hash) is None else "failed")
                continue
            outcome = _outcome(puts[block_hash])
            outcomes.append(outcome)
            if outcome == "copied":
                self.stats.blocks += 1
                self.stats.bytes += block.nbytes
            elif outcome == "corrupt":
                await self._holdings.verify(block_hash, generation)
        return outcomes

    async def _put(
        self, view: StoreNodeView, blocks: Sequence[OutgoingBlock], tenants: Mapping[BlockHash, TenantKey]
    ) -> dict[BlockHash, PutOutcome]:
        """Put each tenant's blocks on its account."""
        outcomes: dict[BlockHash, PutOutcome] = {}
        for tenant in dict.fromkeys(tenants.values()):
            own = [block for block in blocks if tenants[block.hash] == tenant]
            puts: list[PutOutcome] = ["lost"] * len(own)
            with contextlib.suppress(ClusterError):
                puts = await self._writer.put_to(view, own, clock.now_s() + PART_TIMEOUT_S, tenant)
            outcomes.update(zip([block.hash for block in own], puts, strict=True))
        return outcomes

    def _release_settled(self, lease: LeaseId, buffers: Sequence[StagingBuffer]) -> None:
        """End the hold once no transfer can read these bytes any more."""
        unsettled = next((u for u in (buffer.unsettled() for buffer in buffers) if u is not None), None)
        if unsettled is not None:
            unsettled.add_done_callback(lambda _: self._release_settled(lease, buffers))
            return
        self._holdings.arena.release(lease, HOLDER)
        self._holdings.settle()


class _Hold(NamedTuple):
    lease: LeaseId
    blocks: list[OutgoingBlock | None]
    """By place; None where the block is not in memory."""
    generations: list[SlotGeneration | None]
    tenants: dict[BlockHash, TenantKey]
    """Of those in memory."""


def _outcome(put: PutOutcome) -> CopyOutcome:
    match put:
        case "published":
            return "copied"
        case "present":
            return "present"
        case "full" | "too_large":
            return "full"
        case "corrupt":
            return "corrupt"
        case "in_flight" | "fenced" | "lost":
            return "failed"

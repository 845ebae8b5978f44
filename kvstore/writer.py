"""Putting blocks: reserve, write, publish; on another node if the first does not see it through."""

import asyncio
from collections.abc import Sequence
from typing import Literal, NamedTuple

from kvstore.moves import checksums, left_s, transfer
from kvstore.nodes import StoreNodes, StoreNodeView
from kvstore.staging import StagingBuffer
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Copy, TransferTimedOut
from tracehaul.transfer.plane import Plane
from tracehaul.wire.errors import ClusterError, DeadlineExceeded, ProtocolError, TransferError
from tracehaul.wire.ids import BlockHash, Checksum, NodeId
from tracehaul.wire.messages import (
    Abandon,
    BlockSpec,
    Full,
    InFlight,
    Present,
    Publication,
    Publish,
    Published,
    RegionDescriptor,
    Reserve,
    Reserved,
    Slot,
    TooLarge,
)

ATTEMPTS = 2
"""Nodes tried for one put."""

PutOutcome = Literal["published", "present", "in_flight", "full", "too_large", "fenced", "corrupt", "lost"]

_Sums = asyncio.Task[list[Checksum]]


class OutgoingBlock(NamedTuple):
    """A block to put: its bytes are the buffer's first ``nbytes`` and must not change until the put ends."""

    hash: BlockHash
    parent: BlockHash
    buffer: StagingBuffer
    nbytes: int


class _Filled(NamedTuple):
    place: int
    block: OutgoingBlock
    slot: Slot


class Writer:
    """Writes blocks to one node, or to a second if that fails; raises nothing for the world."""

    def __init__(self, nodes: StoreNodes, offload: Offload) -> None:
        self._nodes = nodes
        self._offload = offload
        self.failovers = 0
        """Nodes that failed in the middle of a put."""

    async def put(self, home: NodeId | None, blocks: Sequence[OutgoingBlock], deadline_s: float) -> list[PutOutcome]:
        """One outcome per block; ``lost`` if no node could be found that saw it through."""
        views = [block.buffer.view(block.nbytes) for block in blocks]
        sums = asyncio.create_task(checksums(self._offload, views))  # beside reserving and writing
        try:
            view = self._nodes.find(home) if home is not None else None
            tried: list[NodeId] = []
            while len(tried) < ATTEMPTS:
                view = view or self._nodes.home_of(blocks[0].hash, tried)
                if view is None:
                    break
                try:
                    return await self._put_to(view, blocks, sums, deadline_s)
                except ClusterError:
                    tried.append(view.node)
                    view = None
                    self.failovers += 1
            return ["lost"] * len(blocks)
        finally:
            sums.cancel()

    async def _put_to(
        self, view: StoreNodeView, blocks: Sequence[OutgoingBlock], sums: _Sums, deadline_s: float
    ) -> list[PutOutcome]:
        """All of it on one node. Raises ClusterError if the node does not see it through."""
        # First: a slot that cannot be written is of no use.
        way = await self._nodes.attach(view, left_s(deadline_s))
        specs = tuple([BlockSpec(block.hash, block.parent, block.nbytes) for block in blocks])

        def undo(reserved: Reserved) -> Abandon:
            return _abandon(_fills(blocks, reserved))

        reserved = await self._nodes.acquire(view, Reserve(specs), Reserved, left_s(deadline_s), undo)
        if len(reserved.outcomes) != len(blocks):
            raise ProtocolError(f"{view.node} reserved {len(reserved.outcomes)} blocks of {len(blocks)}")
        outcomes: list[PutOutcome] = [_outcome(outcome) for outcome in reserved.outcomes]
        fills = _fills(blocks, reserved)
        if fills:
            await self._write(view, way, fills, deadline_s)
            published = await self._publish(view, fills, sums, deadline_s)
            for fill, outcome in zip(fills, published, strict=True):
                outcomes[fill.place] = outcome
        return outcomes

    async def _write(
        self, view: StoreNodeView, way: tuple[Plane, RegionDescriptor], fills: Sequence[_Filled], deadline_s: float
    ) -> None:
        plane, remote = way
        copies = [Copy(fill.block.buffer.offset, fill.slot.offset, fill.block.nbytes) for fill in fills]
        try:
            writing = plane.transfer.write(remote, plane.region, copies, timeout_s=left_s(deadline_s))
            await transfer(writing, [f.block.buffer for f in fills], on_late=lambda: self._abandon(view, fills))
        except TransferTimedOut as error:  # a late write may land: the reservation must run out and its slot rest
            self._nodes.failed(view, error.settled)
            raise
        except DeadlineExceeded:  # no time was left to write
            self._abandon(view, fills)
            raise
        except TransferError:
            self._abandon(view, fills)
            self._nodes.failed(view)
            raise

    async def _publish(
        self, view: StoreNodeView, fills: Sequence[_Filled], sums: _Sums, deadline_s: float
    ) -> Sequence[PutOutcome]:
        try:
            checks = await asyncio.shield(sums)
            request = Publish(tuple([Publication(f.block.hash, f.slot.generation, checks[f.place]) for f in fills]))
            published = await self._nodes.call(view, request, Published, left_s(deadline_s))
            if len(published.outcomes) != len(fills):
                raise ProtocolError(f"{view.node} published {len(published.outcomes)} blocks of {len(fills)}")
        except (ClusterError, asyncio.CancelledError):
            self._abandon(view, fills)
            raise
        if "corrupt" in published.outcomes:
            view.attached = None  # perhaps the bytes went to a former life's arena
        return published.outcomes

    def _abandon(self, view: StoreNodeView, fills: Sequence[_Filled]) -> None:
        self._nodes.notify(view, _abandon(fills))


def _fills(blocks: Sequence[OutgoingBlock], reserved: Reserved) -> list[_Filled]:
    places = enumerate(zip(blocks, reserved.outcomes, strict=False))
    return [_Filled(place, block, slot) for place, (block, slot) in places if isinstance(slot, Slot)]


def _abandon(fills: Sequence[_Filled]) -> Abandon:
    return Abandon(tuple([(fill.block.hash, fill.slot.generation) for fill in fills]))


def _outcome(outcome: Slot | Present | InFlight | Full | TooLarge) -> PutOutcome:
    match outcome:
        case Slot():
            return "lost"  # until it is published
        case Present():
            return "present"
        case InFlight():
            return "in_flight"
        case Full():
            return "full"
        case TooLarge():
            return "too_large"

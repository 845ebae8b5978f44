"""Getting blocks: lease, read, verify; a long list in parts that overlap."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from kvstore.client.moves import checksums, in_lanes, left_s, parts_of, transfer
from kvstore.client.nodes import StoreNodes, StoreNodeView
from kvstore.client.staging import StagingBuffer
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Copy, TransferTimedOut
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import Lease, Leased, LeasedBlock, RegionDescriptor, Release, Revoke
from tracehaul.wire.errors import ClusterError, Overloaded, ProtocolError, TimedOut, TransferError
from tracehaul.wire.ids import BlockHash, Checksum, NodeId

seldom = Seldom(Log(__name__))

READ_PART_BYTES = 64 << 20
READ_LANES = 2
"""Blocks are leased, read and verified in parts of this size, so many at a time: one is asked for, or verified,
while another lands."""

MissReason = Literal["absent", "lost", "timeout", "refused", "corrupt", "lease_expired", "too_large"]
GetResult = int | MissReason
"""A block's size in bytes, landed and verified; or why it is a miss."""


class Wanted(msgspec.Struct, frozen=True):
    """One block of a get: ``place`` is where in the result."""

    place: int
    hash: BlockHash
    buffer: StagingBuffer


class _Read(msgspec.Struct, frozen=True):
    wanted: Wanted
    block: LeasedBlock


class Reader:
    """Reads from one node at a time; raises nothing for the world."""

    def __init__(self, nodes: StoreNodes, offload: Offload) -> None:
        self._nodes = nodes
        self._offload = offload

    async def get_from(
        self, node: NodeId, wanted: Sequence[Wanted], results: list[GetResult], deadline_s: float
    ) -> None:
        """Set ``results`` at the wanted indices: what the node delivers in time, or why it does not."""
        for item in wanted:
            results[item.place] = "lost"
        view = self._nodes.find(node)
        if view is None:
            return
        try:
            await self.get(view, wanted, results, deadline_s)
        except ClusterError as error:
            reason = _reason(error)
            for item in wanted:
                if results[item.place] == "lost":
                    results[item.place] = reason

    async def get(
        self, view: StoreNodeView, wanted: Sequence[Wanted], results: list[GetResult], deadline_s: float
    ) -> None:
        """As :meth:`get_from`, from that node.

        Raises:
            ClusterError: it does not see it through. Some of the results may be set.
        """
        way = await self._nodes.attach(view, left_s(deadline_s))

        async def get(part: list[Wanted]) -> None:
            await self._get_part(view, way, part, results, deadline_s)

        await in_lanes(get, parts_of(wanted, lambda item: item.buffer.nbytes, READ_PART_BYTES), READ_LANES)

    async def _get_part(
        self,
        view: StoreNodeView,
        way: tuple[Plane, RegionDescriptor],
        part: Sequence[Wanted],
        results: list[GetResult],
        deadline_s: float,
    ) -> None:
        sent_s = clock.now_s()
        timeout_s = left_s(deadline_s)
        lease = Lease(tuple([item.hash for item in part]), timeout_s)
        leased = await self._nodes.acquire(view, lease, Leased, timeout_s, lambda leased: Release(leased.lease))
        try:
            if len(leased.blocks) != len(part):
                raise ProtocolError(f"{view.node} leased {len(leased.blocks)} blocks of {len(part)}")
            reads: list[_Read] = []
            for item, block in zip(part, leased.blocks, strict=True):
                if block is None:
                    results[item.place] = "absent"
                elif block.size_bytes > item.buffer.nbytes:
                    results[item.place] = "too_large"
                else:
                    reads.append(_Read(item, block))
            if reads:
                await self._land(view, way, reads, results, sent_s + leased.ttl_s)
        finally:
            self._nodes.notify(view, Release(leased.lease))

    async def _land(
        self,
        view: StoreNodeView,
        way: tuple[Plane, RegionDescriptor],
        reads: Sequence[_Read],
        results: list[GetResult],
        expires_s: float,
    ) -> None:
        sums = await self._read(view, way, reads, expires_s)
        if clock.now_s() >= expires_s:  # the slots may have been given to others before the bytes left
            for read in reads:
                results[read.wanted.place] = "lease_expired"
            return
        if sums is None:
            views = [read.wanted.buffer.view(read.block.size_bytes) for read in reads]
            sums = await checksums(self._offload, views)
        for read, actual in zip(reads, sums, strict=True):
            if actual == read.block.checksum:
                results[read.wanted.place] = read.block.size_bytes
            else:
                results[read.wanted.place] = "corrupt"
                seldom.warning("a block arrived wrong: its node looks at its own copy", about=view.node, node=view.node)
                self._nodes.notify(view, Revoke(read.wanted.hash, read.block.generation))

    async def _read(
        self, view: StoreNodeView, way: tuple[Plane, RegionDescriptor], reads: Sequence[_Read], expires_s: float
    ) -> Sequence[Checksum] | None:
        plane, remote = way
        timeout_s = expires_s - clock.now_s()
        if timeout_s <= 0:
            return None  # the caller finds the lease expired
        copies = [Copy(read.wanted.buffer.offset, read.block.offset, read.block.size_bytes) for read in reads]
        reading = plane.transfer.read(remote, plane.region, copies, timeout_s=timeout_s)
        try:
            return await transfer(reading, [read.wanted.buffer for read in reads])
        except TransferTimedOut as error:
            self._nodes.failed(view, error.settled)
            raise
        except TransferError:
            self._nodes.failed(view)
            raise


def _reason(error: ClusterError) -> MissReason:
    match error:
        case TimedOut() | TransferTimedOut():
            return "timeout"
        case Overloaded():
            return "refused"
        case _:
            return "lost"

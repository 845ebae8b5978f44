"""Putting blocks: reserve, write, publish; on another node if the first does not see it through."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Literal, NamedTuple

import msgspec

from kvstore.client.moves import checksums, in_lanes, left_s, parts_of, transfer
from kvstore.client.nodes import ANSWER_S, StoreNodes, StoreNodeView
from kvstore.client.staging import StagingBuffer
from kvstore.index.tenants import TenantKey
from tracehaul.runtime import clock
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Copy, TransferTimedOut
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import (
    Abandon,
    Await,
    Awaited,
    BlockSpec,
    Full,
    InFlight,
    Present,
    Publication,
    Publish,
    Published,
    RegionDescriptor,
    Renew,
    Reserve,
    Reserved,
    Slot,
    TooLarge,
)
from tracehaul.wire.errors import ClusterError, ProtocolError, TimedOut, TransferError
from tracehaul.wire.ids import BlockHash, Checksum, NodeId

ATTEMPTS = 2
"""Nodes tried for one put."""

PutOutcome = Literal["published", "present", "in_flight", "full", "too_large", "fenced", "corrupt", "lost"]

WRITE_PART_BYTES = 64 << 20
WRITE_LANES = 2
"""Blocks are reserved, written and published in parts of this size, so many at a time: the store publishes one and
reserves another while a third is written."""
RENEW_S = 0.3
"""How often a writer tells the store that it still writes. Only this counts as a sign of life: a connection that
lives may have forgotten the reservation (a put that was given up, a grant that came too late), and a copy over a thin
link says nothing for seconds. A writer that misses three is taken for dead: at worst its block is written twice."""
AWAIT_MAX = 4096
"""Blocks of others that one put waits for: what a store node allows."""
WAIT_SHARE = 0.5
"""Of the time left, what is spent waiting for others' writes; the rest is for writing what they left undone."""


_OUTCOMES: dict[type, PutOutcome] = {
    Slot: "lost",  # until it is published
    Present: "present",
    InFlight: "in_flight",
    Full: "full",
    TooLarge: "too_large",
}


class OutgoingBlock(NamedTuple):
    """A block to put: its bytes are the buffer's first ``nbytes`` and must not change until the put ends."""

    hash: BlockHash
    parent: BlockHash
    buffer: StagingBuffer
    nbytes: int
    checksum: Checksum | None = None
    """If it is known what the bytes must be; otherwise they are what they are."""


class _Placed(msgspec.Struct, frozen=True):
    place: int
    """Where in the put."""
    block: OutgoingBlock


class _Filled(msgspec.Struct, frozen=True):
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

    async def put(
        self, home: NodeId | None, blocks: Sequence[OutgoingBlock], deadline_s: float, tenant: str
    ) -> list[PutOutcome]:
        """One outcome per block; ``lost`` if no node could be found that saw it through."""
        view = self._nodes.find_home(home) if home is not None else None
        tried: list[NodeId] = []
        while len(tried) < ATTEMPTS:
            view = view or self._nodes.home_of(blocks[0].hash, tried)
            if view is None:
                break
            try:
                return await self.put_to(view, blocks, deadline_s, tenant)
            except ClusterError:
                tried.append(view.node)
                view = None
                self.failovers += 1
        return ["lost"] * len(blocks)

    async def put_to(
        self, view: StoreNodeView, blocks: Sequence[OutgoingBlock], deadline_s: float, tenant: str | TenantKey
    ) -> list[PutOutcome]:
        """As :meth:`put`, on that node or nowhere.

        Raises:
            ClusterError: the node does not see it through. Some of the blocks may be there.
        """
        # First: a slot that cannot be written is of no use.
        way = await self._nodes.attach(view, left_s(deadline_s))
        outcomes: list[PutOutcome] = ["lost"] * len(blocks)

        async def put(part: list[_Placed]) -> None:
            fills = await self._reserve(view, part, outcomes, deadline_s, tenant)
            if fills:
                async with self._renewing(view, fills):
                    sums = await self._write(view, way, fills, deadline_s)
                    fills, sums = self._unspoilt(view, fills, sums)
                    await self._publish(view, fills, sums, outcomes, deadline_s)

        async def put_all(placed: Sequence[_Placed]) -> None:
            await in_lanes(put, parts_of(placed, lambda item: item.block.nbytes, WRITE_PART_BYTES), WRITE_LANES)

        placed = list(map(_Placed, range(len(blocks)), blocks))
        await put_all(placed)
        again = await self._left_undone(view, placed, outcomes, deadline_s)
        if again:
            await put_all(again)
        return outcomes

    async def _left_undone(
        self, view: StoreNodeView, placed: Sequence[_Placed], outcomes: list[PutOutcome], deadline_s: float
    ) -> list[_Placed]:
        """What another writer was about to publish and did not, and what was taken from this one as it seemed dead.

        Waits for the others, with nothing reserved: two that wait for each other both go on. ``outcomes`` are set
        for what they did publish.
        """
        others = [item for item in placed if outcomes[item.place] in ("in_flight", "fenced")]
        time_s = (deadline_s - clock.now_s()) * WAIT_SHARE
        if not others or time_s <= 0:
            return []
        request = Await(tuple([item.block.hash for item in others[:AWAIT_MAX]]), time_s)
        try:
            states = (await self._nodes.call(view, request, Awaited, time_s + ANSWER_S)).states
        except ClusterError:  # what was written is written; these stay in flight
            return []
        again: list[_Placed] = []
        for item, state in zip(others, states, strict=False):
            if state == "published":
                outcomes[item.place] = "present"
            elif state == "absent":
                again.append(item)
        return again

    @contextlib.asynccontextmanager
    async def _renewing(self, view: StoreNodeView, fills: Sequence[_Filled]) -> AsyncGenerator[None, None]:
        """Inside, the store is told that these are still being written."""
        loop = asyncio.get_running_loop()
        renew = Renew(tuple([(fill.block.hash, fill.slot.generation) for fill in fills]))

        def tell() -> None:
            nonlocal timer
            self._nodes.notify(view, renew)
            timer = loop.call_later(RENEW_S, tell)

        timer = loop.call_later(RENEW_S, tell)
        try:
            yield
        finally:
            timer.cancel()

    async def _reserve(
        self,
        view: StoreNodeView,
        part: Sequence[_Placed],
        outcomes: list[PutOutcome],
        deadline_s: float,
        tenant: str | TenantKey,
    ) -> list[_Filled]:
        """What is to be written; ``outcomes`` are set for the rest."""
        specs = tuple([BlockSpec(item.block.hash, item.block.parent, item.block.nbytes) for item in part])

        def undo(reserved: Reserved) -> Abandon:
            return _abandon(_fills(part, reserved))

        request = Reserve(specs, tenant)
        reserved = await self._nodes.acquire(view, request, Reserved, left_s(deadline_s), undo)
        if len(reserved.outcomes) != len(part):
            raise ProtocolError(f"{view.node} reserved {len(reserved.outcomes)} blocks of {len(part)}")
        for item, outcome in zip(part, reserved.outcomes, strict=True):
            outcomes[item.place] = _OUTCOMES[type(outcome)]
        return _fills(part, reserved)

    async def _write(
        self, view: StoreNodeView, way: tuple[Plane, RegionDescriptor], fills: Sequence[_Filled], deadline_s: float
    ) -> Sequence[Checksum] | None:
        """The checksums of what was written, if the transport has verified it."""
        plane, remote = way
        copies = [Copy(fill.block.buffer.offset, fill.slot.offset, fill.block.nbytes) for fill in fills]
        try:
            writing = plane.transfer.write(remote, plane.region, copies, timeout_s=left_s(deadline_s))
            return await transfer(writing, [f.block.buffer for f in fills], on_late=lambda: self._abandon(view, fills))
        except TransferTimedOut as error:  # a late write may land: the reservation must run out and its slot rest
            self._nodes.failed(view, error.settled)
            raise
        except TimedOut:  # no time was left to write
            self._abandon(view, fills)
            raise
        except TransferError:
            self._abandon(view, fills)
            self._nodes.failed(view)
            raise

    def _unspoilt(
        self, view: StoreNodeView, fills: Sequence[_Filled], sums: Sequence[Checksum] | None
    ) -> tuple[Sequence[_Filled], Sequence[Checksum] | None]:
        """What was written of bytes that nobody changed meanwhile; the rest is given up."""
        good = [place for place, fill in enumerate(fills) if not fill.block.buffer.spoilt]
        if len(good) == len(fills):
            return fills, sums
        self._abandon(view, [fill for place, fill in enumerate(fills) if place not in set(good)])
        return [fills[place] for place in good], None if sums is None else [sums[place] for place in good]

    async def _publish(
        self,
        view: StoreNodeView,
        fills: Sequence[_Filled],
        sums: Sequence[Checksum] | None,
        outcomes: list[PutOutcome],
        deadline_s: float,
    ) -> None:
        if not fills:
            return
        try:
            verified = sums is not None
            known = [f.block.checksum for f in fills if f.block.checksum is not None]
            if len(known) == len(fills):
                verified = sums is not None and list(sums) == known  # if not, what the node finds there decides
                sums = known
            elif sums is None:
                sums = await checksums(self._offload, [f.block.buffer.view(f.block.nbytes) for f in fills])
            blocks = tuple([Publication(f.block.hash, f.slot.generation, s) for f, s in zip(fills, sums, strict=True)])
            published = await self._nodes.call(view, Publish(blocks, verified), Published, left_s(deadline_s))
            if len(published.outcomes) != len(fills):
                raise ProtocolError(f"{view.node} published {len(published.outcomes)} blocks of {len(fills)}")
        except (ClusterError, asyncio.CancelledError):
            self._abandon(view, fills)
            raise
        if "corrupt" in published.outcomes:
            view.attached = None  # perhaps the bytes went to a former life's arena
        for fill, outcome in zip(fills, published.outcomes, strict=True):
            outcomes[fill.place] = outcome

    def _abandon(self, view: StoreNodeView, fills: Sequence[_Filled]) -> None:
        self._nodes.notify(view, _abandon(fills))


def _fills(part: Sequence[_Placed], reserved: Reserved) -> list[_Filled]:
    outcomes = zip(part, reserved.outcomes, strict=False)
    return [_Filled(item.place, item.block, slot) for item, slot in outcomes if isinstance(slot, Slot)]


def _abandon(fills: Sequence[_Filled]) -> Abandon:
    return Abandon(tuple([(fill.block.hash, fill.slot.generation) for fill in fills]))

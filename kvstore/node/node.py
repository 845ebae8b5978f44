"""A store node: serves one arena to the cluster."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from operator import eq

import msgspec

from kvstore.copies.neighbours import Neighbours
from kvstore.index.tenants import tenant_key
from kvstore.index.writing import ReserveOutcome
from kvstore.node.checks import check_count, check_name
from kvstore.node.operations import Operations
from kvstore.node.parts import Parts
from kvstore.node.pin_journal import PinJournal
from kvstore.node.pinning import Pinning
from kvstore.node.verifier import Verifier
from kvstore.tiers.base import readable
from kvstore.tiers.stack import Stack
from tracehaul.rpc.base import CallContext
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import (
    Abandon,
    Attach,
    Attached,
    Await,
    Awaited,
    AwaitState,
    Drain,
    Existing,
    Exists,
    Full,
    InFlight,
    Lease,
    Leased,
    ListPins,
    Pin,
    Present,
    Publication,
    Publish,
    Published,
    PublishOutcome,
    Release,
    Renew,
    Reserve,
    Reserved,
    Revoke,
    Slot,
    Subscribe,
    Unpin,
)
from tracehaul.wire.cluster import Members, NodeLoad
from tracehaul.wire.errors import InvalidRequest, Overloaded
from tracehaul.wire.hashing import HASH_BYTES
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.operations import Discard

WAIT_HASHES_MAX = 4096
"""Blocks that one request waits for."""


class StoreNode:
    """Serves one arena: the rpc ``Service`` of a store node. It takes no part in copying bytes to and from clients.

    Made by :func:`kvstore.node.assemble.assemble_store`. With anything below its memory, or others to copy to,
    :meth:`run` must run beside it.
    """

    def __init__(
        self,
        parts: Parts,
        verifier: Verifier,
        pinning: Pinning,
        operations: Operations,
        journal: PinJournal | None,
        neighbours: Neighbours | None,
    ) -> None:
        self._parts = parts
        self._verifier = verifier
        self._pinning = pinning
        self._journal = journal
        self._settle = parts.settler.settle
        self._seldom = Seldom(Log(__name__))
        self.arena = parts.arena
        """The index, with the limits in force. For looking at: who changes it tells nobody."""
        self.feed = parts.feed
        self.waiters = parts.waiters
        self.stats = parts.stats
        self.tiering = parts.tiering
        self.operations = operations
        self.neighbours = neighbours
        """Copies to other nodes; None without any."""

    @property
    def counts(self) -> Mapping[str, msgspec.Struct]:
        """All of its counts, by what they count."""
        counts: dict[str, msgspec.Struct] = {"store": self.stats}
        if self.tiering is not None:
            tier = self.tiering.tier
            counts.update({part.name: part.stats for part in tier.parts})
            if isinstance(tier, Stack):
                counts["stack"] = tier.moves
        if self.neighbours is not None:
            counts.update(self.neighbours.stats)
        if self.tiering is not None:
            counts["tiering"] = self.tiering.stats
        if self._journal is not None:
            counts["pins"] = self._journal.stats
        return counts

    def load(self) -> NodeLoad:
        """What goes into a heartbeat."""
        load = NodeLoad(
            blocks=len(self.arena),
            bytes_used=self.arena.bytes_published,
            bytes_max=self.arena.config.slots_max * self.arena.config.slot_bytes,
        )
        if self.neighbours is not None:
            load = self.neighbours.fill_in(load)
        if self.tiering is None:
            return load
        below: dict[str, float] = {}
        for tier, block_s in zip(self.tiering.tier.parts, self.tiering.promotions.block_s, strict=True):
            below[f"{tier.name}_blocks"] = len(tier)
            below[f"{tier.name}_bytes_used"] = tier.bytes_used
            below[f"{tier.name}_bytes_max"] = tier.bytes_max
            below[f"{tier.name}_block_s"] = block_s
        return msgspec.structs.replace(load, **below)

    async def run(self) -> None:
        """What a tier, a journal and copies need done in the background, for as long as the node serves."""
        async with asyncio.TaskGroup() as group:
            for part in (self.tiering, self.neighbours, self._journal):
                if part is not None:
                    group.create_task(part.run())

    def set_members(self, members: Members) -> None:
        """Who else is there."""
        if self.neighbours is not None:
            self.neighbours.set_members(members)

    async def call(self, request: Request, context: CallContext) -> Reply:
        match request:
            case Exists(hashes=hashes):
                check_count(hashes)
                return Existing((self.tiering or self.arena).exists(hashes), self.arena.leases)
            case Lease():
                if self.tiering is None:
                    return self._lease(request, context.peer)
                check_count(request.hashes)
                # Half of what the reader has: it must still copy.
                async with self.tiering.promotions.promoted(request.hashes, request.ttl_s / 2):
                    return self._lease(request, context.peer)
            case Release(lease=lease):
                self.arena.release(lease, context.peer)
                self._settle()
                return Ok()
            case Reserve():
                return self._reserve(request, context.peer)
            case Publish(blocks=blocks, verified=verified):
                check_count(blocks)
                return Published(tuple(await self._publish(blocks, verified, context.peer)))
            case Abandon(blocks=blocks):
                self.arena.abandon(blocks, context.peer)
                self._settle()
                return Ok()
            case Renew(blocks=blocks):
                check_count(blocks)
                self.arena.renew(blocks, context.peer, clock.now_s())
                self._settle()
                return Ok()
            case Revoke(hash=block_hash, generation=generation):
                await self._verifier.look(block_hash, generation)
                return Ok()
            case Await():
                return await self._await(request)
            case Pin():
                return await self._pinning.pin(request)
            case Unpin():
                return await self._pinning.unpin(request)
            case ListPins():
                return self._pinning.listed(request)
            case Drain():
                if self.neighbours is None:
                    raise InvalidRequest("this node is on its own: there is nowhere to drain to")
                return self.neighbours.drain(request)
            case Attach():
                return Attached(self._parts.generation, tuple(plane.region.descriptor for plane in self._parts.planes))
            case Discard():
                await self._discard(request)
                return Ok()
            case Ping():
                return Ok()
            case _:
                return self.operations.answer(request, context.peer)

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, Subscribe):
            raise InvalidRequest(f"a store node does not stream {type(request).__name__}")
        follower = self.feed.follow([self.arena.published()] if self.tiering is None else self.tiering.by_tier())
        try:
            async for part in follower:
                yield part
        finally:
            await follower.aclose()

    def disconnected(self, peer: str) -> None:
        self.arena.disconnected(peer, clock.now_s())
        self._settle()

    async def aclose(self) -> None:
        """Write to the tier what waits for it, and close what is below. Requests and :meth:`run` must have ended."""
        async with AsyncExitStack() as stack:
            if self.tiering is not None:
                stack.callback(self.tiering.tier.close)
            stack.callback(self.close)
            if self.neighbours is not None:
                stack.push_async_callback(self.neighbours.aclose)
            if self._journal is not None:
                stack.push_async_callback(self._journal.aclose)
            await self.operations.aclose()
            if self.tiering is not None:
                await self.tiering.promotions.close()
                await self.tiering.drain()

    def close(self) -> None:
        """Stop what runs by itself. Requests must have ended."""
        self.operations.close()
        self._parts.settler.close()

    # --- requests -----------------------------------------------------------------------------------------

    def _lease(self, request: Lease, peer: str) -> Leased:
        check_count(request.hashes)
        leased = self.arena.lease(request.hashes, peer, request.ttl_s, clock.now_s())
        self._settle()
        if leased is None:
            self.stats.leases_refused += 1
            self._seldom.warning(
                "refused a lease: too many on one connection", peer=peer, leases=self.arena.config.leases_max
            )
            raise Overloaded(f"{self.arena.config.leases_max} leases are open on this connection")
        missed = leased.blocks.count(None)
        self.stats.missed_blocks += missed
        self.stats.leased_blocks += len(leased.blocks) - missed
        return leased

    def _reserve(self, request: Reserve, peer: str) -> Reserved:
        if self.neighbours is not None and self.neighbours.draining:
            raise Overloaded("this node is draining: write elsewhere")  # it is well, and still to be read from
        check_count(request.blocks)
        if isinstance(request.tenant, str):
            check_name(request.tenant)
        elif not 0 <= request.tenant < 1 << 64:
            raise InvalidRequest("not a tenant's key")
        hashes, parents = [block.hash for block in request.blocks], [block.parent for block in request.blocks]
        if {*map(len, hashes), *map(len, parents)} - {HASH_BYTES} or any(map(eq, hashes, parents)):
            raise InvalidRequest("not a block hash and its parent's")
        outcomes = self._reserve_missing(request, peer)
        kinds = Counter(map(type, outcomes))
        self.stats.reserved += kinds[Slot]
        full = kinds[Full]
        self.stats.full += full
        self.stats.in_flight += kinds[InFlight]
        self.stats.passed_on = self.arena.passed_on
        self._settle()
        if full:
            self._tell_full(request.tenant)
        return Reserved(tuple(outcomes))

    def _tell_full(self, tenant: str | int) -> None:
        arena = self.arena
        self._seldom.warning(
            "no slot could be freed for a writer",
            tenant=tenant,
            slots=self.arena.config.slots_max,
            blocks=len(arena),
            reserved=arena.reservations,
            quarantined=arena.slots_quarantined,
            hard_pinned=arena.hard_pinned,
            leases=arena.leases,
        )

    def _reserve_missing(self, request: Reserve, peer: str) -> list[ReserveOutcome]:
        """What a tier can give needs no slot: it comes up when somebody reads it."""
        blocks, tenant = request.blocks, request.tenant
        if self.tiering is None:
            return self.arena.reserve(blocks, peer, clock.now_s(), tenant)
        tier = self.tiering.tier
        below = [readable(tier, block.hash) for block in blocks]
        missing = [block for block, there in zip(blocks, below, strict=True) if not there]
        answers = iter(self.arena.reserve(missing, peer, clock.now_s(), tenant))
        return [Present() if there else next(answers) for there in below]

    async def _publish(self, blocks: Sequence[Publication], verified: bool, peer: str) -> list[PublishOutcome]:
        if verified:
            outcomes = self.arena.publish(blocks, peer, clock.now_s())
        else:
            outcomes = await self._verifier.publish(blocks, peer)
        self.stats.published += outcomes.count("published")
        self.stats.fenced += outcomes.count("fenced")
        self.stats.corrupt_writes += outcomes.count("corrupt")
        self._settle()
        return outcomes

    async def _discard(self, request: Discard) -> None:
        check_count(request.hashes)
        check_name(request.tenant)
        key = tenant_key(request.tenant)
        if self.tiering is not None:
            await self.tiering.discard(request.hashes, key)
        self.arena.discard(request.hashes, key)
        self._settle()
        if self.tiering is not None:  # what was written while others were erased
            await self.tiering.discard(request.hashes, key)

    async def _await(self, request: Await) -> Awaited:
        if len(request.hashes) > WAIT_HASHES_MAX:
            raise InvalidRequest(f"a wait for {len(request.hashes)} blocks; at most {WAIT_HASHES_MAX}")
        self.stats.waits += 1
        now_s = clock.now_s()
        until_s = now_s + min(request.timeout_s, self.arena.config.wait_max_s) if request.timeout_s > 0 else now_s
        self.arena.expire(now_s)
        self._settle()
        while True:
            quiet_s = {block_hash: self.arena.quiet_at_s(block_hash) for block_hash in request.hashes}
            in_flight = {block_hash: at_s for block_hash, at_s in quiet_s.items() if at_s is not None and at_s > now_s}
            if not in_flight or now_s >= until_s:
                return Awaited(tuple([self._state(block_hash, now_s) for block_hash in request.hashes]))
            # A silent owner ends nothing: whoever waits looks again when the last of them could have gone quiet.
            await self.waiters.wait(in_flight, min(until_s, max(in_flight.values())) - now_s)
            now_s = clock.now_s()

    def _state(self, block_hash: BlockHash, now_s: float) -> AwaitState:
        quiet_s = self.arena.quiet_at_s(block_hash)
        if quiet_s is not None and quiet_s > now_s:
            return "in_flight"
        below = self.tiering is not None and readable(self.tiering.tier, block_hash)
        return "published" if below or self.arena.exists((block_hash,))[0] else "absent"

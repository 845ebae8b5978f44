"""A store node: serves one arena to the cluster."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from operator import eq

import msgspec

from kvstore.client.moves import checksums
from kvstore.config import StoreConfig
from kvstore.copies.copier import Holdings
from kvstore.copies.neighbours import Neighbours, Others
from kvstore.index.arena import Arena, ReserveOutcome
from kvstore.index.pins import PRIORITY_MAX
from kvstore.node.checks import check_count, check_name
from kvstore.node.events import Feed
from kvstore.node.operations import Operations
from kvstore.node.pin_journal import PinJournal
from kvstore.node.pin_keeper import PinKeeper
from kvstore.node.waiting import Waiters
from kvstore.tiers.base import Tier, readable
from kvstore.tiers.tiering import Tiering, TieringConfig
from tracehaul.rpc.base import CallContext
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Memory
from tracehaul.transfer.plane import Plane
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import (
    REPLICAS_MAX,
    Abandon,
    Attach,
    Attached,
    Await,
    Awaited,
    AwaitState,
    Change,
    Drain,
    Existing,
    Exists,
    Full,
    InFlight,
    Lease,
    Leased,
    ListPins,
    Pin,
    PinList,
    Pinned,
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
from tracehaul.wire.ids import BlockHash, Checksum, Generation, SlotGeneration
from tracehaul.wire.messages import Reply, Request

log = Log(__name__)

WAIT_HASHES_MAX = 4096
"""Blocks that one request waits for."""
HOLDERS_MAX = 64
"""Nodes that one pin names."""
SELF = ""
"""Holder of the node's own leases: no connection has this name."""


class StoreStats(msgspec.Struct):
    """Counts since the node's start."""

    reserved: int = 0
    full: int = 0
    published: int = 0
    fenced: int = 0
    corrupt_writes: int = 0
    """Publishes refused because the landed bytes did not match."""
    corrupt_held: int = 0
    """Published blocks dropped because their bytes had changed."""
    leased_blocks: int = 0
    missed_blocks: int = 0
    """Blocks asked for by a lease and not held."""
    waits: int = 0
    passed_on: int = 0
    """Reservations that a second writer took over from a silent first one."""
    pins_refused: int = 0
    in_flight: int = 0
    """Blocks not given to a writer because another was writing them."""
    leases_refused: int = 0


class StoreNode:
    """Serves one arena: the rpc ``Service`` of a store node. It takes no part in copying bytes to and from clients.

    ``memory`` is the arena's bytes, at least ``config.arena_bytes``, registered with every plane. With a ``tier``,
    a ``journal`` or ``others``, :meth:`run` must run beside it; pins are kept in the journal, and those found there are
    in force from the start. Without ``others`` it makes no copies elsewhere. Costs nothing while idle: one timer,
    armed only if something can expire.
    """

    def __init__(
        self,
        config: StoreConfig,
        generation: Generation,
        planes: Sequence[Plane],
        memory: Memory,
        offload: Offload,
        tier: Tier | None = None,
        tiering: TieringConfig | None = None,
        journal: PinJournal | None = None,
        others: Others | None = None,
    ) -> None:
        assert memory.buffer.nbytes >= config.arena_bytes
        self.config = config
        """The limits in force."""
        self._generation = generation
        self._planes = tuple(planes)
        self._buffer = memory.buffer
        self._offload = offload
        self.arena = Arena(config)
        """The index: whoever changes it calls :meth:`changed`."""
        self.feed = Feed(generation, changes_max=config.changes_max, subscribers_max=config.subscribers_max)
        self.waiters = Waiters(config.waiters_max)
        self._timer: asyncio.TimerHandle | None = None
        self.stats = StoreStats()
        self._seldom = Seldom(log)
        self.tiering: Tiering | None = None
        """Moves to and from ``tier``; None without one."""
        if tier is not None:
            self.tiering = Tiering(
                self.arena,
                self._buffer,
                config.slot_bytes,
                tier,
                tiering or TieringConfig(),
                self._announce,
                self.changed,
            )
        self.operations = Operations(self, generation, planes, self._buffer, offload)
        self._keeper = None if journal is None else PinKeeper(self.arena, journal, config.pin_half_life_s)
        self.neighbours: Neighbours | None = None
        """Copies to other nodes; None without any."""
        if others is not None:
            holdings = Holdings(
                self.arena, self._buffer, config.slot_bytes, self.tiering, self.changed, self._verify_held
            )
            self.neighbours = Neighbours(others, planes, offload, holdings, config.pin_half_life_s)
            self.neighbours.restore(self.arena.open_pins(clock.now_s()))
        self.changed()  # pins of a former life have ends

    def load(self) -> NodeLoad:
        """What goes into a heartbeat."""
        load = NodeLoad(
            blocks=len(self.arena),
            bytes_used=self.arena.bytes_published,
            bytes_max=self.config.slots_max * self.config.slot_bytes,
        )
        if self.neighbours is not None:
            load = self.neighbours.fill_in(load)
        if self.tiering is None:
            return load
        below: dict[str, float] = {}
        for tier, block_s in zip(self.tiering.tier.parts, self.tiering.raise_block_s, strict=True):
            below[f"{tier.name}_blocks"] = len(tier)
            below[f"{tier.name}_bytes_used"] = tier.bytes_used
            below[f"{tier.name}_bytes_max"] = tier.bytes_max
            below[f"{tier.name}_block_s"] = block_s
        return msgspec.structs.replace(load, **below)

    async def run(self) -> None:
        """What a tier, a journal and copies need done in the background, for as long as the node serves."""
        async with asyncio.TaskGroup() as group:
            for part in (self.tiering, self.neighbours, self._keeper and self._keeper.journal):
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
                async with self.tiering.promoted(request.hashes, request.ttl_s / 2):
                    return self._lease(request, context.peer)
            case Release(lease=lease):
                self.arena.release(lease, context.peer)
                self.changed()
                return Ok()
            case Reserve():
                return self._reserve(request, context.peer)
            case Publish(blocks=blocks, verified=verified):
                check_count(blocks)
                return Published(tuple(await self._publish(blocks, verified, context.peer)))
            case Abandon(blocks=blocks):
                self.arena.abandon(blocks, context.peer)
                self.changed()
                return Ok()
            case Renew(blocks=blocks):
                check_count(blocks)
                self.arena.renew(blocks, context.peer, clock.now_s())
                self.changed()
                return Ok()
            case Revoke(hash=block_hash, generation=generation):
                await self._verify_own(block_hash, generation)
                return Ok()
            case Await():
                return await self._await(request)
            case Pin():
                pinned = self._pin(request)
                if self._keeper is not None:
                    await self._keeper.keep((request.tenant, request.trace))
                return pinned
            case Unpin(trace=trace, tenant=tenant):
                self.arena.unpin(tenant, trace)
                self.changed()
                if self._keeper is not None:
                    await self._keeper.keep((tenant, trace))
                if self.neighbours is not None:
                    self.neighbours.unpinned((tenant, trace))
                return Ok()
            case ListPins(tenant=tenant):
                pins = self.arena.list_pins(tenant, clock.now_s())
                self.changed()
                return PinList(tuple(pins if self.neighbours is None else map(self.neighbours.describe, pins)))
            case Drain():
                if self.neighbours is None:
                    raise InvalidRequest("this node is on its own: there is nowhere to drain to")
                return self.neighbours.drain(request)
            case Attach():
                return Attached(self._generation, tuple(plane.region.descriptor for plane in self._planes))
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
        self.changed()

    async def aclose(self) -> None:
        """Write to the tier what waits for it, and leave the tier alone. Requests and :meth:`run` must have ended."""
        await self.operations.aclose()
        if self.tiering is not None:
            await self.tiering.close()
            await self.tiering.drain()
        if self._keeper is not None:
            await self._keeper.journal.aclose()
        if self.neighbours is not None:
            await self.neighbours.aclose()
        self.close()

    def close(self) -> None:
        """Stop the timer. Requests must have ended."""
        self.operations.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- requests -----------------------------------------------------------------------------------------

    def _lease(self, request: Lease, peer: str) -> Leased:
        check_count(request.hashes)
        leased = self.arena.lease(request.hashes, peer, request.ttl_s, clock.now_s())
        self.changed()
        if leased is None:
            self.stats.leases_refused += 1
            self._seldom.warning(
                "refused a lease: too many on one connection", peer=peer, leases=self.config.leases_max
            )
            raise Overloaded(f"{self.config.leases_max} leases are open on this connection")
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
        self.changed()
        if full and not request.scratch:
            self._tell_full(request.tenant)
        return Reserved(tuple(outcomes))

    def _tell_full(self, tenant: str | int) -> None:
        arena = self.arena
        self._seldom.warning(
            "no slot could be freed for a writer",
            tenant=tenant,
            slots=self.config.slots_max,
            blocks=len(arena),
            reserved=arena.reservations,
            quarantined=arena.slots_quarantined,
            hard_pinned=arena.hard_pinned,
            leases=arena.leases,
        )

    def _reserve_missing(self, request: Reserve, peer: str) -> list[ReserveOutcome]:
        """What a tier can give needs no slot: it comes up when somebody reads it."""
        blocks, tenant, scratch = request.blocks, request.tenant, request.scratch
        if self.tiering is None:
            return self.arena.reserve(blocks, peer, clock.now_s(), tenant, scratch=scratch)
        tier = self.tiering.tier
        below = [readable(tier, block.hash) for block in blocks]
        missing = [block for block, there in zip(blocks, below, strict=True) if not there]
        answers = iter(self.arena.reserve(missing, peer, clock.now_s(), tenant, scratch=scratch))
        return [Present() if there else next(answers) for there in below]

    async def _publish(self, blocks: Sequence[Publication], verified: bool, peer: str) -> list[PublishOutcome]:
        if verified:
            outcomes = self.arena.publish(blocks, peer, clock.now_s())
        else:
            outcomes = await self._verify_and_publish(blocks, peer)
        self.stats.published += outcomes.count("published")
        self.stats.fenced += outcomes.count("fenced")
        self.stats.corrupt_writes += outcomes.count("corrupt")
        self.changed()
        return outcomes

    async def _verify_and_publish(self, blocks: Sequence[Publication], peer: str) -> list[PublishOutcome]:
        landings = [self.arena.landing(block, peer) for block in blocks]
        sums = await self._checksums([landing for landing in landings if landing is not None])
        landed = iter(sums)
        # Where nothing is reserved the arena answers; a reservation that ended meanwhile is fenced there.
        matches = [
            landing is None or next(landed) == block.checksum for landing, block in zip(landings, blocks, strict=True)
        ]
        now_s = clock.now_s()
        good = [block for block, matching in zip(blocks, matches, strict=True) if matching]
        published = iter(self.arena.publish(good, peer, now_s))
        outcomes: list[PublishOutcome] = []
        for block, matching in zip(blocks, matches, strict=True):
            if matching:
                outcomes.append(next(published))
            else:
                self.arena.withdraw(block.hash, block.generation, peer, now_s)
                self._seldom.warning("refused a block whose bytes arrived wrong", block=block.hash.hex(), peer=peer)
                outcomes.append("corrupt")
        return outcomes

    async def _verify_own(self, block_hash: BlockHash, generation: SlotGeneration) -> None:
        """Somebody's copy of a block was bad: drop ours only if it is bad too."""
        leased = self.arena.lease([block_hash], SELF, self.config.lease_ttl_max_s, clock.now_s())
        self.changed()
        if leased is None:
            raise Overloaded("too many blocks are being verified")
        block = leased.blocks[0]
        try:
            if block is None or block.generation != generation:
                return
            (actual,) = await self._checksums([(block.offset, block.size_bytes)])
            if actual != block.checksum and self.arena.revoke(block_hash, generation):
                self.found_bad(block_hash)
        finally:
            self.arena.release(leased.lease, SELF)
            self.changed()

    async def _verify_held(self, block_hash: BlockHash, generation: SlotGeneration) -> None:
        with contextlib.suppress(Overloaded):  # it will be found bad again
            await self._verify_own(block_hash, generation)

    async def _await(self, request: Await) -> Awaited:
        if len(request.hashes) > WAIT_HASHES_MAX:
            raise InvalidRequest(f"a wait for {len(request.hashes)} blocks; at most {WAIT_HASHES_MAX}")
        self.stats.waits += 1
        now_s = clock.now_s()
        until_s = now_s + min(request.timeout_s, self.config.wait_max_s) if request.timeout_s > 0 else now_s
        self.arena.expire(now_s)
        self.changed()
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

    def _pin(self, request: Pin) -> Pinned:
        check_count(request.hashes)
        check_name(request.tenant)
        check_name(request.trace)
        if any(len(block_hash) != HASH_BYTES for block_hash in request.hashes):
            raise InvalidRequest("not a block hash")
        if not (request.ttl_s > 0 and 1 <= request.priority <= PRIORITY_MAX):
            raise InvalidRequest(f"a pin lasts more than 0 s, at a priority from 1 to {PRIORITY_MAX:.0f}")
        if not 1 <= request.replicas <= REPLICAS_MAX:
            raise InvalidRequest(f"a pin asks for 1 to {REPLICAS_MAX} copies")
        if len(request.holders) > HOLDERS_MAX:
            raise InvalidRequest(f"a pin names {len(request.holders)} holders; at most {HOLDERS_MAX}")
        for node in request.holders:
            check_name(node)
        pinned = self.arena.pin(request, clock.now_s())
        self.changed()
        if isinstance(pinned, str):
            self.stats.pins_refused += 1
            self._seldom.warning(
                "refused a pin", trace=request.trace, tenant=request.tenant, kind=request.kind, why=pinned
            )
            raise Overloaded(pinned)
        if self.neighbours is not None:
            self.neighbours.pinned(request)
        return pinned

    def found_bad(self, block_hash: BlockHash) -> None:
        """A block in memory was dropped as its bytes had changed."""
        self.stats.corrupt_held += 1
        log.warning("dropped a bad block", tier="memory", block=block_hash.hex())

    # --- helpers ------------------------------------------------------------------------------------------

    async def _checksums(self, ranges: Sequence[tuple[int, int]]) -> list[Checksum]:
        return await checksums(self._offload, [self._buffer[offset : offset + size] for offset, size in ranges])

    def changed(self) -> None:
        """After anything that touched the arena: tell the subscribers, wake who waits, arm the timer."""
        changes = self.arena.take_changes()
        if self.tiering is not None and changes:
            changes = self.tiering.merge(changes)
        if changes:
            self._announce(changes)
        self.waiters.ended(self.arena.take_ended())
        self._arm()

    def _announce(self, changes: Sequence[Change]) -> None:
        self.feed.append(changes)
        if self.neighbours is not None:
            self.neighbours.changed(changes)

    def _arm(self) -> None:
        deadline_s = self.arena.next_deadline_s()
        if deadline_s is None or (self._timer is not None and self._timer.when() <= deadline_s):
            return  # a timer that fires too early arms the next one
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.arena.expire(clock.now_s())
        self.changed()

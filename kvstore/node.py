"""A store node: serves one arena to the cluster."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import msgspec

from kvstore.arena import Arena, ReserveOutcome
from kvstore.config import StoreConfig
from kvstore.copies import Holdings
from kvstore.events import Feed
from kvstore.limits import changed, limits_of, live_of
from kvstore.moves import checksums
from kvstore.neighbours import Neighbours, Others
from kvstore.pin_journal import PinJournal
from kvstore.pin_keeper import PinKeeper
from kvstore.pins import PRIORITY_MAX
from kvstore.scrub import Scrubber
from kvstore.tiers.base import Change, Tier, readable
from kvstore.tiers.prefetch import PrefetchJobs
from kvstore.tiers.stack import Stack
from kvstore.tiers.tiering import Tiering, TieringConfig
from kvstore.waiting import Waiters
from tracehaul import __version__
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
    Prefetch,
    PrefetchCancel,
    PrefetchPoll,
    PrefetchState,
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
    TierInfo,
    TierList,
    Tiers,
    Unpin,
)
from tracehaul.wire.cluster import Members, NodeLoad
from tracehaul.wire.errors import InvalidRequest, Overloaded
from tracehaul.wire.hashing import HASH_BYTES
from tracehaul.wire.ids import BlockHash, Checksum, Generation, SlotGeneration
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.operations import (
    Describe,
    Description,
    Limits,
    Locate,
    Located,
    Scrub,
    ScrubCancel,
    ScrubPoll,
    SetLimits,
)

log = Log(__name__)

HASHES_MAX = 65536
"""Blocks in one request."""
WAIT_HASHES_MAX = 4096
"""Blocks that one request waits for."""
NAME_CHARS_MAX = 256
"""Of a tenant's or a trace's name."""
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
        self._config = config
        self._generation = generation
        self._planes = tuple(planes)
        self._buffer = memory.buffer
        self._offload = offload
        self._arena = Arena(config)
        self._feed = Feed(generation, changes_max=config.changes_max, subscribers_max=config.subscribers_max)
        self._waiters = Waiters(config.waiters_max)
        self._timer: asyncio.TimerHandle | None = None
        self.stats = StoreStats()
        self._seldom = Seldom(log)
        self.tiering: Tiering | None = None
        """Moves to and from ``tier``; None without one."""
        self._prefetch: PrefetchJobs | None = None
        if tier is not None:
            self.tiering = Tiering(
                self._arena,
                self._buffer,
                config.slot_bytes,
                tier,
                tiering or TieringConfig(),
                self._announce,
                self._changed,
            )
            self._prefetch = PrefetchJobs(self.tiering)
        self._born_s = clock.perf_s()
        self._below: tuple[Tier, ...] = () if tier is None else tuple(tier.parts)
        self._scrubber = Scrubber(
            self._arena,
            self._buffer,
            config.slot_bytes,
            offload,
            [part for part in self._below if not part.metered],
            self._changed,
            self._found_bad,
        )
        self._keeper = None if journal is None else PinKeeper(self._arena, journal, config.pin_half_life_s)
        self.neighbours: Neighbours | None = None
        """Copies to other nodes; None without any."""
        if others is not None:
            holdings = Holdings(
                self._arena, self._buffer, config.slot_bytes, self.tiering, self._changed, self._verify_held
            )
            self.neighbours = Neighbours(others, planes, offload, holdings, config.pin_half_life_s)
            self.neighbours.restore(self._arena.open_pins(clock.now_s()))
        self._changed()  # pins of a former life have ends

    @property
    def arena(self) -> Arena:
        """The index, to be read only."""
        return self._arena

    @property
    def feed(self) -> Feed:
        """The subscribers' feed, to be read only."""
        return self._feed

    @property
    def scrubbed_blocks(self) -> int:
        """Blocks in memory verified on demand since the node's start."""
        return self._scrubber.checked

    def load(self) -> NodeLoad:
        """What goes into a heartbeat."""
        load = NodeLoad(
            blocks=len(self._arena),
            bytes_used=self._arena.bytes_published,
            bytes_max=self._config.slots_max * self._config.slot_bytes,
        )
        if self.neighbours is not None:
            load = self.neighbours.fill_in(load)
        if self.tiering is None:
            return load
        below: dict[str, int] = {}
        for tier in self.tiering.tier.parts:
            below[f"{tier.name}_blocks"] = len(tier)
            below[f"{tier.name}_bytes_used"] = tier.bytes_used
            below[f"{tier.name}_bytes_max"] = tier.bytes_max
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
                _check_count(hashes)
                return Existing((self.tiering or self._arena).exists(hashes))
            case Lease():
                if self.tiering is None:
                    return self._lease(request, context.peer)
                _check_count(request.hashes)
                # Half of what the reader has: it must still copy.
                async with self.tiering.promoted(request.hashes, request.ttl_s / 2):
                    return self._lease(request, context.peer)
            case Release(lease=lease):
                self._arena.release(lease, context.peer)
                self._changed()
                return Ok()
            case Reserve():
                return self._reserve(request, context.peer)
            case Publish(blocks=blocks, verified=verified):
                _check_count(blocks)
                return Published(tuple(await self._publish(blocks, verified, context.peer)))
            case Abandon(blocks=blocks):
                self._arena.abandon(blocks, context.peer)
                self._changed()
                return Ok()
            case Renew(blocks=blocks):
                _check_count(blocks)
                self._arena.renew(blocks, context.peer, clock.now_s())
                self._changed()
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
                self._arena.unpin(tenant, trace)
                self._changed()
                if self._keeper is not None:
                    await self._keeper.keep((tenant, trace))
                if self.neighbours is not None:
                    self.neighbours.unpinned((tenant, trace))
                return Ok()
            case ListPins(tenant=tenant):
                pins = self._arena.list_pins(tenant, clock.now_s())
                self._changed()
                return PinList(tuple(pins if self.neighbours is None else map(self.neighbours.describe, pins)))
            case Drain():
                if self.neighbours is None:
                    raise InvalidRequest("this node is on its own: there is nowhere to drain to")
                return self.neighbours.drain(request)
            case Attach():
                return Attached(self._generation, tuple(plane.region.descriptor for plane in self._planes))
            case Ping():
                return Ok()
            case Tiers():
                return TierList(tuple(self._tiers()))
            case Prefetch() | PrefetchPoll() | PrefetchCancel():
                return self._prefetched(request)
            case Describe():
                return self.describe()
            case Locate(hashes=hashes):
                return self._locate(hashes)
            case SetLimits(changes=changes):
                return self._set_limits(changes, context.peer)
            case Scrub():
                return self._scrubber.start()
            case ScrubPoll(job=job):
                return self._scrubber.poll(job)
            case ScrubCancel(job=job):
                return self._scrubber.cancel(job)
            case _:
                raise InvalidRequest(f"a store node does not answer {type(request).__name__}")

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, Subscribe):
            raise InvalidRequest(f"a store node does not stream {type(request).__name__}")
        follower = self._feed.follow((self.tiering or self._arena).published())
        try:
            async for part in follower:
                yield part
        finally:
            await follower.aclose()

    def disconnected(self, peer: str) -> None:
        self._arena.disconnected(peer, clock.now_s())
        self._changed()

    async def aclose(self) -> None:
        """Write to the tier what waits for it, and leave the tier alone. Requests and :meth:`run` must have ended."""
        if self._prefetch is not None:
            await self._prefetch.close()
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
        self._scrubber.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- requests -----------------------------------------------------------------------------------------

    def _lease(self, request: Lease, peer: str) -> Leased:
        _check_count(request.hashes)
        leased = self._arena.lease(request.hashes, peer, request.ttl_s, clock.now_s())
        self._changed()
        if leased is None:
            self.stats.leases_refused += 1
            self._seldom.warning(
                "refused a lease: too many on one connection", peer=peer, leases=self._config.leases_max
            )
            raise Overloaded(f"{self._config.leases_max} leases are open on this connection")
        missed = sum(block is None for block in leased.blocks)
        self.stats.missed_blocks += missed
        self.stats.leased_blocks += len(leased.blocks) - missed
        return leased

    def _reserve(self, request: Reserve, peer: str) -> Reserved:
        if self.neighbours is not None and self.neighbours.draining:
            raise Overloaded("this node is draining: write elsewhere")  # it is well, and still to be read from
        _check_count(request.blocks)
        if isinstance(request.tenant, str):
            _check_name(request.tenant)
        elif not 0 <= request.tenant < 1 << 64:
            raise InvalidRequest("not a tenant's key")
        for block in request.blocks:
            if len(block.hash) != HASH_BYTES or len(block.parent) != HASH_BYTES or block.hash == block.parent:
                raise InvalidRequest("not a block hash and its parent's")
        outcomes = self._reserve_missing(request, peer)
        self.stats.reserved += sum(isinstance(outcome, Slot) for outcome in outcomes)
        self.stats.full += sum(isinstance(outcome, Full) for outcome in outcomes)
        self.stats.in_flight += sum(isinstance(outcome, InFlight) for outcome in outcomes)
        self.stats.passed_on = self._arena.passed_on
        self._changed()
        if not request.scratch and any(isinstance(outcome, Full) for outcome in outcomes):
            self._tell_full(request.tenant)
        return Reserved(tuple(outcomes))

    def _tell_full(self, tenant: str | int) -> None:
        arena = self._arena
        self._seldom.warning(
            "no slot could be freed for a writer",
            tenant=tenant,
            slots=self._config.slots_max,
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
            return self._arena.reserve(blocks, peer, clock.now_s(), tenant, scratch=scratch)
        tier = self.tiering.tier
        below = [readable(tier, block.hash) for block in blocks]
        missing = [block for block, there in zip(blocks, below, strict=True) if not there]
        answers = iter(self._arena.reserve(missing, peer, clock.now_s(), tenant, scratch=scratch))
        return [Present() if there else next(answers) for there in below]

    def _tiers(self) -> Iterator[TierInfo]:
        arena = self._arena
        load = self.load()
        counters = {"evicted": arena.evicted, "corrupt": self.stats.corrupt_held}
        yield TierInfo("memory", len(arena), load.bytes_used, load.bytes_max, counters)
        if self.tiering is not None:
            moves: dict[str, int] = {**msgspec.structs.asdict(self.tiering.stats), "waiting": self.tiering.behind}
            for tier in self.tiering.tier.parts:
                counters = {**msgspec.structs.asdict(tier.stats), **moves}
                yield TierInfo(tier.name, len(tier), tier.bytes_used, tier.bytes_max, counters)
                # Each tier shows what comes to it from the one above.
                if isinstance(self.tiering.tier, Stack):
                    moves = {**msgspec.structs.asdict(self.tiering.tier.moves), "waiting": self.tiering.tier.behind}

    def _prefetched(self, request: Prefetch | PrefetchPoll | PrefetchCancel) -> PrefetchState:
        if self._prefetch is None:
            raise InvalidRequest("this node has one tier: there is nothing to prefetch from")
        match request:
            case Prefetch(hashes=hashes):
                _check_count(hashes)
                return self._prefetch.start(hashes)
            case PrefetchPoll(job=job):
                return self._prefetch.poll(job)
            case PrefetchCancel(job=job):
                return self._prefetch.cancel(job)

    async def _publish(self, blocks: Sequence[Publication], verified: bool, peer: str) -> list[PublishOutcome]:
        landings = [None if verified else self._arena.landing(block, peer) for block in blocks]
        sums = await self._checksums([landing for landing in landings if landing is not None])
        landed = iter(sums)
        # Where nothing is reserved the arena answers; a reservation that ended meanwhile is fenced there.
        matches = [
            landing is None or next(landed) == block.checksum for landing, block in zip(landings, blocks, strict=True)
        ]
        now_s = clock.now_s()
        good = [block for block, matching in zip(blocks, matches, strict=True) if matching]
        published = iter(self._arena.publish(good, peer, now_s))
        outcomes: list[PublishOutcome] = []
        for block, matching in zip(blocks, matches, strict=True):
            if matching:
                outcomes.append(next(published))
            else:
                self._arena.withdraw(block.hash, block.generation, peer, now_s)
                self._seldom.warning("refused a block whose bytes arrived wrong", block=block.hash.hex(), peer=peer)
                outcomes.append("corrupt")
        self.stats.published += outcomes.count("published")
        self.stats.fenced += outcomes.count("fenced")
        self.stats.corrupt_writes += outcomes.count("corrupt")
        self._changed()
        return outcomes

    async def _verify_own(self, block_hash: BlockHash, generation: SlotGeneration) -> None:
        """Somebody's copy of a block was bad: drop ours only if it is bad too."""
        leased = self._arena.lease([block_hash], SELF, self._config.lease_ttl_max_s, clock.now_s())
        self._changed()
        if leased is None:
            raise Overloaded("too many blocks are being verified")
        block = leased.blocks[0]
        try:
            if block is None or block.generation != generation:
                return
            (actual,) = await self._checksums([(block.offset, block.size_bytes)])
            if actual != block.checksum and self._arena.revoke(block_hash, generation):
                self._found_bad(block_hash)
        finally:
            self._arena.release(leased.lease, SELF)
            self._changed()

    async def _verify_held(self, block_hash: BlockHash, generation: SlotGeneration) -> None:
        with contextlib.suppress(Overloaded):  # it will be found bad again
            await self._verify_own(block_hash, generation)

    async def _await(self, request: Await) -> Awaited:
        if len(request.hashes) > WAIT_HASHES_MAX:
            raise InvalidRequest(f"a wait for {len(request.hashes)} blocks; at most {WAIT_HASHES_MAX}")
        self.stats.waits += 1
        now_s = clock.now_s()
        until_s = now_s + min(request.timeout_s, self._config.wait_max_s) if request.timeout_s > 0 else now_s
        self._arena.expire(now_s)
        self._changed()
        while True:
            quiet_s = {block_hash: self._arena.quiet_at_s(block_hash) for block_hash in request.hashes}
            in_flight = {block_hash: at_s for block_hash, at_s in quiet_s.items() if at_s is not None and at_s > now_s}
            if not in_flight or now_s >= until_s:
                return Awaited(tuple([self._state(block_hash, now_s) for block_hash in request.hashes]))
            # A silent owner ends nothing: whoever waits looks again when the last of them could have gone quiet.
            await self._waiters.wait(in_flight, min(until_s, max(in_flight.values())) - now_s)
            now_s = clock.now_s()

    def _state(self, block_hash: BlockHash, now_s: float) -> AwaitState:
        quiet_s = self._arena.quiet_at_s(block_hash)
        if quiet_s is not None and quiet_s > now_s:
            return "in_flight"
        below = self.tiering is not None and readable(self.tiering.tier, block_hash)
        return "published" if below or self._arena.exists((block_hash,))[0] else "absent"

    def _pin(self, request: Pin) -> Pinned:
        _check_count(request.hashes)
        _check_name(request.tenant)
        _check_name(request.trace)
        if any(len(block_hash) != HASH_BYTES for block_hash in request.hashes):
            raise InvalidRequest("not a block hash")
        if not (request.ttl_s > 0 and 1 <= request.priority <= PRIORITY_MAX):
            raise InvalidRequest(f"a pin lasts more than 0 s, at a priority from 1 to {PRIORITY_MAX:.0f}")
        if not 1 <= request.replicas <= REPLICAS_MAX:
            raise InvalidRequest(f"a pin asks for 1 to {REPLICAS_MAX} copies")
        if len(request.holders) > HOLDERS_MAX:
            raise InvalidRequest(f"a pin names {len(request.holders)} holders; at most {HOLDERS_MAX}")
        for node in request.holders:
            _check_name(node)
        pinned = self._arena.pin(request, clock.now_s())
        self._changed()
        if isinstance(pinned, str):
            self.stats.pins_refused += 1
            self._seldom.warning(
                "refused a pin", trace=request.trace, tenant=request.tenant, kind=request.kind, why=pinned
            )
            raise Overloaded(pinned)
        if self.neighbours is not None:
            self.neighbours.pinned(request)
        return pinned

    # --- for operators ------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """The node as it is now."""
        arena, tiering = self._arena, self.tiering.config if self.tiering is not None else None
        return Description(
            version=__version__,
            generation=self._generation,
            uptime_s=clock.perf_s() - self._born_s,
            transports=tuple([plane.region.descriptor.kind for plane in self._planes]),
            slot_bytes=self._config.slot_bytes,
            slots=self._config.slots_max,
            slots_free=arena.slots_free,
            slots_quarantined=arena.slots_quarantined,
            blocks=len(arena),
            bytes_used=arena.bytes_published,
            leases=arena.leases,
            reservations=arena.reservations,
            pins=arena.pins,
            waiters=len(self._waiters),
            subscribers=len(self._feed),
            limits=limits_of(self._config, tiering),
            live=live_of(tiering),
            tenants=tuple(arena.usage()),
            tiers=tuple(self._tiers()),
            counters=msgspec.structs.asdict(self.stats),
        )

    def _locate(self, hashes: Sequence[BlockHash]) -> Located:
        _check_count(hashes)
        held = {"memory": self._arena.exists(hashes)}
        for tier in self._below:
            held[tier.name] = bytes([tier.find(block_hash) is not None for block_hash in hashes])
        return Located(held)

    def _set_limits(self, changes: dict[str, Any], peer: str) -> Limits:
        """All or none, in one turn of the event loop."""
        before = limits_of(self._config, self.tiering.config if self.tiering is not None else None)
        store, tiering = changed(self._config, self.tiering.config if self.tiering is not None else None, changes)
        refusal = self._arena.reconfigure(store, clock.now_s())
        self._changed()
        if refusal is not None:
            raise InvalidRequest(f"{refusal}: end some first, or choose a higher limit")
        self._config = store
        self._feed.changes_max, self._feed.subscribers_max = store.changes_max, store.subscribers_max
        self._waiters.waiters_max = store.waiters_max
        if self.tiering is not None and tiering is not None:
            self.tiering.reconfigure(tiering)
            if "quota_bytes" in changes:
                self.tiering.tier.reshare(self._arena.quota_shares())
        after = limits_of(store, tiering)
        for name in changes:
            if before[name] != after[name]:
                log.info(
                    "limit changed, until this node restarts", limit=name, old=before[name], new=after[name], by=peer
                )
        return Limits(after)

    def _found_bad(self, block_hash: BlockHash) -> None:
        self.stats.corrupt_held += 1
        log.warning("dropped a bad block", tier="memory", block=block_hash.hex())

    # --- helpers ------------------------------------------------------------------------------------------

    async def _checksums(self, ranges: Sequence[tuple[int, int]]) -> list[Checksum]:
        return await checksums(self._offload, [self._buffer[offset : offset + size] for offset, size in ranges])

    def _changed(self) -> None:
        """After anything that touched the arena: tell the subscribers, wake who waits, arm the timer."""
        changes = self._arena.take_changes()
        if self.tiering is not None and changes:
            changes = self.tiering.merge(changes)
        if changes:
            self._announce(changes)
        self._waiters.ended(self._arena.take_ended())
        self._arm()

    def _announce(self, changes: Sequence[Change]) -> None:
        self._feed.append(changes)
        if self.neighbours is not None:
            self.neighbours.changed(changes)

    def _arm(self) -> None:
        deadline_s = self._arena.next_deadline_s()
        if deadline_s is None or (self._timer is not None and self._timer.when() <= deadline_s):
            return  # a timer that fires too early arms the next one
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._arena.expire(clock.now_s())
        self._changed()


def _check_count(items: Sequence[object]) -> None:
    if len(items) > HASHES_MAX:
        raise InvalidRequest(f"{len(items)} blocks in one request; at most {HASHES_MAX}")


def _check_name(name: str) -> None:
    if len(name) > NAME_CHARS_MAX:
        raise InvalidRequest(f"a name of {len(name)} characters; at most {NAME_CHARS_MAX}")

"""What operators ask of a store node and tell it: :mod:`tracehaul.wire.operations`, tiers and prefetch jobs."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from kvstore.node.checks import check_count
from kvstore.node.limits import changed, limits_of, live_of
from kvstore.node.parts import Parts
from kvstore.node.scrub import Scrubber
from kvstore.tiers.base import Tier
from kvstore.tiers.prefetch import PrefetchJobs
from kvstore.tiers.stack import Stack
from tracehaul import __version__
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.blocks import Prefetch, PrefetchCancel, PrefetchPoll, PrefetchState, TierInfo, TierList, Tiers
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.ids import BlockHash
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


class Operations:
    """The operators' side of one node, whose parts it reads and whose limits it changes."""

    def __init__(self, parts: Parts, scrubber: Scrubber) -> None:
        self._parts = parts
        self._born_s = clock.perf_s()
        self._tiers: tuple[Tier, ...] = () if parts.tiering is None else tuple(parts.tiering.tier.parts)
        self._prefetch = None if parts.tiering is None else PrefetchJobs(parts.tiering)
        self._scrubber = scrubber

    @property
    def scrubbed_blocks(self) -> int:
        """Blocks in memory verified on demand since the node's start."""
        return self._scrubber.checked

    def answer(self, request: Request, peer: str) -> Reply:
        """The reply to an operator's request.

        Raises:
            InvalidRequest: it is none, or makes no sense here.
        """
        match request:
            case Tiers():
                return TierList(tuple(self._list_tiers()))
            case Prefetch() | PrefetchPoll() | PrefetchCancel():
                return self._prefetched(request)
            case Describe():
                return self.describe()
            case Locate(hashes=hashes):
                return self._locate(hashes)
            case SetLimits(changes=changes):
                return self._set_limits(changes, peer)
            case Scrub():
                return self._scrubber.start()
            case ScrubPoll(job=job):
                return self._scrubber.poll(job)
            case ScrubCancel(job=job):
                return self._scrubber.cancel(job)
            case _:
                raise InvalidRequest(f"a store node does not answer {type(request).__name__}")

    async def aclose(self) -> None:
        """Let prefetches under way end."""
        if self._prefetch is not None:
            await self._prefetch.close()

    def close(self) -> None:
        """End a scrub."""
        self._scrubber.close()

    def _list_tiers(self) -> Iterator[TierInfo]:
        arena, tiering = self._parts.arena, self._parts.tiering
        counters = {"evicted": arena.evicted, "corrupt": self._parts.stats.corrupt_held}
        bytes_max = arena.config.slots_max * arena.config.slot_bytes
        yield TierInfo("memory", len(arena), arena.bytes_published, bytes_max, counters)
        if tiering is None:
            return
        moves: dict[str, int] = {**msgspec.structs.asdict(tiering.stats), "waiting": tiering.behind}
        for tier in self._tiers:
            counters = {**msgspec.structs.asdict(tier.stats), **moves}
            yield TierInfo(tier.name, len(tier), tier.bytes_used, tier.bytes_max, counters)
            # Each tier shows what comes to it from the one above.
            if isinstance(tiering.tier, Stack):
                moves = {**msgspec.structs.asdict(tiering.tier.moves), "waiting": tiering.tier.behind}

    def _prefetched(self, request: Prefetch | PrefetchPoll | PrefetchCancel) -> PrefetchState:
        if self._prefetch is None:
            raise InvalidRequest("this node has one tier: there is nothing to prefetch from")
        match request:
            case Prefetch(hashes=hashes):
                check_count(hashes)
                return self._prefetch.start(hashes)
            case PrefetchPoll(job=job):
                return self._prefetch.poll(job)
            case PrefetchCancel(job=job):
                return self._prefetch.cancel(job)

    def describe(self) -> Description:
        """The node as it is now."""
        parts, arena = self._parts, self._parts.arena
        tiering = None if parts.tiering is None else parts.tiering.config
        return Description(
            version=__version__,
            generation=parts.generation,
            uptime_s=clock.perf_s() - self._born_s,
            transports=tuple([plane.region.descriptor.kind for plane in parts.planes]),
            slot_bytes=arena.config.slot_bytes,
            slots=arena.config.slots_max,
            slots_free=arena.slots_free,
            slots_quarantined=arena.slots_quarantined,
            blocks=len(arena),
            bytes_used=arena.bytes_published,
            leases=arena.leases,
            reservations=arena.reservations,
            pins=arena.pins,
            waiters=len(parts.waiters),
            subscribers=len(parts.feed),
            limits=limits_of(arena.config, tiering),
            live=live_of(tiering),
            tenants=tuple(arena.usage()),
            tiers=tuple(self._list_tiers()),
            counters=msgspec.structs.asdict(parts.stats),
        )

    def _locate(self, hashes: Sequence[BlockHash]) -> Located:
        check_count(hashes)
        held = {"memory": self._parts.arena.exists(hashes)}
        for tier in self._tiers:
            held[tier.name] = bytes([tier.find(block_hash) is not None for block_hash in hashes])
        return Located(held)

    def _set_limits(self, changes: dict[str, Any], peer: str) -> Limits:
        """All or none, in one turn of the event loop."""
        arena, feed, waiters, tiering_now = (
            self._parts.arena,
            self._parts.feed,
            self._parts.waiters,
            self._parts.tiering,
        )
        config_now = None if tiering_now is None else tiering_now.config
        before = limits_of(arena.config, config_now)
        store, tiering = changed(arena.config, config_now, changes)
        refusal = arena.reconfigure(store, clock.now_s())
        self._parts.settler.settle()
        if refusal is not None:
            raise InvalidRequest(f"{refusal}: end some first, or choose a higher limit")
        feed.changes_max, feed.subscribers_max = store.changes_max, store.subscribers_max
        waiters.waiters_max = store.waiters_max
        if tiering_now is not None and tiering is not None:
            tiering_now.reconfigure(tiering)
            if "quota_bytes" in changes:
                tiering_now.tier.reshare(arena.quota_shares())
        after = limits_of(store, tiering)
        for name in changes:
            if before[name] != after[name]:
                log.info(
                    "limit changed, until this node restarts", limit=name, old=before[name], new=after[name], by=peer
                )
        return Limits(after)

"""What operators ask of a store node and tell it: :mod:`tracehaul.wire.operations`, tiers and prefetch jobs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kvstore.node.checks import check_count
from kvstore.node.limits import changed, limits_of, live_of
from kvstore.node.scrub import Scrubber
from kvstore.tiers.base import Tier
from kvstore.tiers.prefetch import PrefetchJobs
from kvstore.tiers.stack import Stack
from tracehaul import __version__
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import Prefetch, PrefetchCancel, PrefetchPoll, PrefetchState, TierInfo, TierList, Tiers
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.ids import BlockHash, Generation
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

if TYPE_CHECKING:
    from kvstore.node.node import StoreNode

log = Log(__name__)


class Operations:
    """The operators' side of one node, whose parts it reads and whose limits it changes."""

    def __init__(
        self,
        node: "StoreNode",
        generation: Generation,
        planes: Sequence[Plane],
        buffer: memoryview,
        offload: Offload,
    ) -> None:
        self._node = node
        self._generation = generation
        self._planes = tuple(planes)
        self._born_s = clock.perf_s()
        self._below: tuple[Tier, ...] = () if node.tiering is None else tuple(node.tiering.tier.parts)
        self._prefetch = None if node.tiering is None else PrefetchJobs(node.tiering)
        self._scrubber = Scrubber(
            node.arena,
            buffer,
            node.config.slot_bytes,
            offload,
            [part for part in self._below if not part.metered],
            node.changed,
            node.found_bad,
        )

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
                return TierList(tuple(self._tiers()))
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

    def _tiers(self) -> Iterator[TierInfo]:
        arena, tiering, load = self._node.arena, self._node.tiering, self._node.load()
        counters = {"evicted": arena.evicted, "corrupt": self._node.stats.corrupt_held}
        yield TierInfo("memory", len(arena), load.bytes_used, load.bytes_max, counters)
        if tiering is None:
            return
        moves: dict[str, int] = {**msgspec.structs.asdict(tiering.stats), "waiting": tiering.behind}
        for tier in tiering.tier.parts:
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
        arena, tiering = self._node.arena, self._node.tiering.config if self._node.tiering is not None else None
        return Description(
            version=__version__,
            generation=self._generation,
            uptime_s=clock.perf_s() - self._born_s,
            transports=tuple([plane.region.descriptor.kind for plane in self._planes]),
            slot_bytes=self._node.config.slot_bytes,
            slots=self._node.config.slots_max,
            slots_free=arena.slots_free,
            slots_quarantined=arena.slots_quarantined,
            blocks=len(arena),
            bytes_used=arena.bytes_published,
            leases=arena.leases,
            reservations=arena.reservations,
            pins=arena.pins,
            waiters=len(self._node.waiters),
            subscribers=len(self._node.feed),
            limits=limits_of(self._node.config, tiering),
            live=live_of(tiering),
            tenants=tuple(arena.usage()),
            tiers=tuple(self._tiers()),
            counters=msgspec.structs.asdict(self._node.stats),
        )

    def _locate(self, hashes: Sequence[BlockHash]) -> Located:
        check_count(hashes)
        held = {"memory": self._node.arena.exists(hashes)}
        for tier in self._below:
            held[tier.name] = bytes([tier.find(block_hash) is not None for block_hash in hashes])
        return Located(held)

    def _set_limits(self, changes: dict[str, Any], peer: str) -> Limits:
        """All or none, in one turn of the event loop."""
        node = self._node
        tiering_now = None if node.tiering is None else node.tiering.config
        before = limits_of(node.config, tiering_now)
        store, tiering = changed(node.config, tiering_now, changes)
        refusal = node.arena.reconfigure(store, clock.now_s())
        node.changed()
        if refusal is not None:
            raise InvalidRequest(f"{refusal}: end some first, or choose a higher limit")
        node.config = store
        node.feed.changes_max, node.feed.subscribers_max = store.changes_max, store.subscribers_max
        node.waiters.waiters_max = store.waiters_max
        if node.tiering is not None and tiering is not None:
            node.tiering.reconfigure(tiering)
            if "quota_bytes" in changes:
                node.tiering.tier.reshare(node.arena.quota_shares())
        after = limits_of(store, tiering)
        for name in changes:
            if before[name] != after[name]:
                log.info(
                    "limit changed, until this node restarts", limit=name, old=before[name], new=after[name], by=peer
                )
        return Limits(after)

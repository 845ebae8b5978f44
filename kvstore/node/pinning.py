"""What clients tell a store node of pins: checked, taken, written down, and passed on to those who make copies."""

from kvstore.copies.neighbours import Neighbours
from kvstore.index.pins import PRIORITY_MAX
from kvstore.node.checks import check_count, check_name
from kvstore.node.parts import Parts
from kvstore.node.pin_keeper import PinKeeper
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import REPLICAS_MAX, ListPins, Pin, PinList, Pinned, Unpin
from tracehaul.wire.errors import InvalidRequest, Overloaded
from tracehaul.wire.hashing import HASH_BYTES

HOLDERS_MAX = 64
"""Nodes that one pin names."""


class Pinning:
    """Answers the requests that are of pins. Without ``keeper`` a restart forgets them."""

    def __init__(self, parts: Parts, keeper: PinKeeper | None, neighbours: Neighbours | None) -> None:
        self._arena = parts.arena
        self._stats = parts.stats
        self._settle = parts.settler.settle
        self._keeper = keeper
        self._neighbours = neighbours
        self._seldom = Seldom(Log(__name__))

    async def pin(self, request: Pin) -> Pinned:
        """Take a pin, and return when a restart will know of it."""
        _check(request)
        pinned = self._arena.pin(request, clock.now_s())
        self._settle()
        if isinstance(pinned, str):
            self._stats.pins_refused += 1
            self._seldom.warning(
                "refused a pin", trace=request.trace, tenant=request.tenant, kind=request.kind, why=pinned
            )
            raise Overloaded(pinned)
        if self._neighbours is not None:
            self._neighbours.pinned(request)
        if self._keeper is not None:
            await self._keeper.keep((request.tenant, request.trace))
        return pinned

    async def unpin(self, request: Unpin) -> Ok:
        """End a pin, and return when a restart will know of that."""
        key = request.tenant, request.trace
        self._arena.unpin(*key)
        self._settle()
        if self._keeper is not None:
            await self._keeper.keep(key)
        if self._neighbours is not None:
            self._neighbours.unpinned(key)
        return Ok()

    def listed(self, request: ListPins) -> PinList:
        """Open pins, the first to end first."""
        pins = self._arena.list_pins(request.tenant, clock.now_s())
        self._settle()
        return PinList(tuple(pins if self._neighbours is None else map(self._neighbours.describe, pins)))


def _check(request: Pin) -> None:
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

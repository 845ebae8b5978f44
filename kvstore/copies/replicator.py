"""Sees to it that pins that want several copies have them: the shell around :class:`kvstore.copies.replicas.Replicas`.

One set is looked at at a time, in the order in which something happened to them; nothing happens while nothing does.
A target that is dead or frozen costs one call's timeout, then others are tried first and it again after a pause that
doubles. One that has no room is no holder: another takes its place if there is one.
"""

import asyncio
from collections.abc import Iterable, Sequence

import msgspec

from kvstore.client.nodes import StoreNodes, StoreNodeView
from kvstore.copies.copier import Copier, Holdings
from kvstore.copies.replicas import CopyPlan, Replicas, prefix_first
from kvstore.index.pins import HARD, PRIORITY_MAX, HeldPin, PinKey
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.blocks import Pin, PinInfo, Pinned, Unpin
from tracehaul.wire.cluster import Members
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.ids import BlockHash, NodeId

log = Log(__name__)

PIN_TIMEOUT_S = 1.0
PRUNE_SLACK = 256
"""Sets whose pins have ended that may be remembered."""


class ReplicaStats(msgspec.Struct):
    """Counts since the node's start."""

    made: int = 0
    """Times that another node took a pin and all that is here of its blocks."""
    refused: int = 0
    """Times that one did not."""
    pins_refused: int = 0
    """Of these, because it did not take the pin."""


class Replicator:
    """Of one node. :meth:`run` must run beside it; ``half_life_s`` is that of the node's soft pins."""

    def __init__(
        self,
        node: NodeId,
        holdings: Holdings,
        copier: Copier,
        nodes: StoreNodes,
        grace_s: float,
        half_life_s: float,
    ) -> None:
        self._holdings = holdings
        self._copier = copier
        self._nodes = nodes
        self._half_life_s = half_life_s
        self._node = node
        self._wake = asyncio.Event()
        self._left = 0
        self._rebuilding = False
        self._complained: set[NodeId] = set()
        self.sets = Replicas(node, grace_s)
        """To be read only."""
        self.stats = ReplicaStats()

    @property
    def waiting(self) -> int:
        """Blocks on their way, and pins that are to be looked at."""
        return self._left + self.sets.waiting

    # --- what happens -------------------------------------------------------------------------------------

    def set_members(self, members: Members) -> None:
        """The membership changed."""
        self.sets.members(members.nodes, members.draining, clock.now_s())
        self._wake.set()

    def pinned(self, pin: Pin) -> None:
        """The node has taken a pin."""
        key = pin.tenant, pin.trace
        if pin.replicas > 1 or pin.holders or key in self.sets:
            self.sets.pinned(key, pin.replicas, pin.holders, clock.now_s())
            self._wake.set()
            self._prune()

    def restore(self, pins: Iterable[tuple[PinKey, HeldPin]]) -> None:
        """The node came back with these pins, and does not know who else has them: it looks at its neighbours anew."""
        for key, held in pins:
            if held.replicas > 1:
                self.sets.pinned(key, held.replicas, (), clock.now_s())

    def unpinned(self, key: PinKey) -> None:
        """The node was told to end a pin."""
        for node in self.sets.ended(key):
            view = self._nodes.find(node)
            if view is not None:
                self._nodes.notify(view, Unpin(key[1], key[0]))

    def published(self, hashes: Sequence[BlockHash]) -> None:
        """Blocks have arrived."""
        if not len(self.sets):
            return
        for block_hash in hashes:
            for key in self._holdings.arena.pins_of(block_hash):
                self.sets.published(key, block_hash)
        if self.sets.waiting:
            self._wake.set()

    def describe(self, info: PinInfo) -> PinInfo:
        """A pin's line, with what is known of its copies."""
        known = self.sets.get((info.tenant, info.trace))
        if known is None:
            return info
        return msgspec.structs.replace(info, replicas=known.replicas, holders=known.holders)

    # --- what is done about it ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Act whenever there is something to do, for as long as the node serves."""
        while True:
            self._wake.clear()
            now_s = clock.now_s()
            for node, pins in self.sets.tick(now_s).items():
                if pins:
                    log.warning("copies lost with a node: making them anew", node=node, pins=pins)
                    self._rebuilding = True
            found = self.sets.next(now_s)
            if found is not None:
                await self._act(*found)
                continue
            if self._rebuilding:
                log.info("all copies that can be made are made", pins_short=self.sets.short)
                self._rebuilding = False
            deadline_s = self.sets.deadline_s(now_s)
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _act(self, key: PinKey, plan: CopyPlan) -> None:
        held = self._holdings.arena.pin_of(key)
        if held is None:
            self.sets.ended(key)
            return
        known = self.sets.get(key)
        replicas = known.replicas if known is not None else 1
        for node in plan.targets:
            outcome = await self._bring(key, held, plan, node, replicas)
            if outcome == "taken":
                self.stats.made += 1
                self.sets.taken(key, node)
                self._complained.discard(node)
            else:
                self.stats.refused += 1
                self.sets.refused(key, node, clock.now_s(), full=outcome == "full")
                if node not in self._complained:  # once, until it takes one again
                    self._complained.add(node)
                    log.warning("a node does not take copies", node=node, reason=outcome, trace=key[1])

    async def _bring(self, key: PinKey, held: HeldPin, plan: CopyPlan, node: NodeId, replicas: int) -> str:
        """``taken`` if the node has the pin and all that is here of its blocks; else why not."""
        view = self._copier.view(node)
        if view is None:
            return "left alone"
        try:
            if plan.everything:
                pin = travelling(key, held, replicas, plan.holders, clock.now_s(), self._half_life_s)
                if pin is None:
                    return "taken"  # it is about to end
                await self._nodes.call(view, pin, Pinned, PIN_TIMEOUT_S)
                here = [h for h in held.hashes if self._holdings.spec(h) is not None]
                lacking = await self._copier.lacks(view, here)
            else:
                lacking = list(plan.fresh)
        except ClusterError as error:
            self.stats.pins_refused += 1
            return error.code
        return await self._copy(view, self.in_order(lacking))

    async def _copy(self, view: StoreNodeView, hashes: Sequence[BlockHash]) -> str:
        self._left += len(hashes)
        try:
            for part in self._copier.parts(hashes):
                outcomes = await self._copier.copy(view, part)
                self._left -= len(part)
                hashes = hashes[len(part) :]
                for outcome in ("full", "failed", "corrupt"):
                    if outcome in outcomes:
                        return outcome
        finally:
            self._left -= len(hashes)
        return "taken"

    def in_order(self, hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """Prefix before continuation."""
        specs = [spec for spec in map(self._holdings.spec, hashes) if spec is not None]
        return prefix_first([spec.hash for spec in specs], {spec.hash: spec.parent for spec in specs})

    def _prune(self) -> None:
        """Forget the sets of pins that have ended by themselves."""
        if len(self.sets) > 2 * self._holdings.arena.pins + PRUNE_SLACK:
            for key in list(self.sets):
                if self._holdings.arena.pin_of(key) is None:
                    self.sets.ended(key)


def travelling(
    key: PinKey, held: HeldPin, replicas: int, holders: Sequence[NodeId], now_s: float, half_life_s: float
) -> Pin | None:
    """A pin as it is now, for another node to take: with the time and the priority that it has left; None if none."""
    ttl_s = held.until_s - now_s
    priority = 1024.0
    if held.kind == "soft":
        assert held.rank != HARD
        priority = min(2 ** (held.rank - now_s / half_life_s), PRIORITY_MAX)
    if ttl_s <= 0 or priority <= 1:
        return None
    hashes = tuple(held.hashes)
    return Pin(key[1], hashes, ttl_s, held.kind, priority, key[0], replicas, tuple(holders))

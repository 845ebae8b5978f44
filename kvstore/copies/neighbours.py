"""What a store node does with the other store nodes: copies for pins, drains. All that it needs for it in one place."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from kvstore.client.nodes import StoreNodes
from kvstore.client.writer import Writer
from kvstore.copies.config import ReplicationConfig
from kvstore.copies.copier import Copier, Holdings
from kvstore.copies.drain import Drainer
from kvstore.copies.rate import Rate
from kvstore.copies.replicator import Replicator
from kvstore.index.pins import HeldPin, PinKey
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import Change, Drain, DrainState, Pin, PinInfo, Removed, Stored
from tracehaul.wire.cluster import Members, NodeLoad
from tracehaul.wire.ids import NodeId

BREAK_S = 1.0
"""How long a node that failed is left alone."""


class Others(NamedTuple):
    """A store node's way to the others."""

    node: NodeId
    """Its own name."""
    peers: Peers
    config: ReplicationConfig


class Neighbours:
    """Of one node, which tells it of everything that happens. :meth:`run` must run beside it."""

    def __init__(
        self, others: Others, planes: Sequence[Plane], offload: Offload, holdings: Holdings, half_life_s: float
    ) -> None:
        self._nodes = StoreNodes(others.peers, planes, BREAK_S)
        copier = Copier(holdings, self._nodes, Writer(self._nodes, offload), Rate(others.config.copy_bytes_s))
        self._node = others.node
        self._replicator = Replicator(others.node, holdings, copier, self._nodes, others.config.grace_s, half_life_s)
        known_nodes = self._replicator.sets.known_nodes
        self._drainer = Drainer(known_nodes, holdings, copier, self._nodes, self._replicator, half_life_s)
        self.stats: Mapping[str, msgspec.Struct] = {"copies": copier.stats, "replicas": self._replicator.stats}
        """Counts by what they count."""

    @property
    def draining(self) -> bool:
        """Whether the node takes nothing new."""
        return self._drainer.draining

    def fill_in(self, load: NodeLoad) -> NodeLoad:
        """A heartbeat's load, with what is known here."""
        return msgspec.structs.replace(
            load,
            draining=self.draining,
            copies_waiting=self._replicator.waiting + self._drainer.left,
            pins_short=self._replicator.sets.short,
        )

    def set_members(self, members: Members) -> None:
        """The membership changed."""
        self._nodes.set([info for info in members.nodes if info.node != self._node], members.draining)
        self._replicator.set_members(members)
        self._drainer.set_members()

    def changed(self, changes: Sequence[Change]) -> None:
        """Blocks became visible, or are gone."""
        self._replicator.published([change.hash for change in changes if isinstance(change, Stored)])
        self._drainer.changed([change.hash for change in changes if isinstance(change, Removed)])

    def restore(self, pins: Iterable[tuple[PinKey, HeldPin]]) -> None:
        """The node came back with these pins."""
        self._replicator.restore(pins)

    def pinned(self, pin: Pin) -> None:
        """The node has taken a pin."""
        self._replicator.pinned(pin)
        self._drainer.changed()

    def unpinned(self, key: PinKey) -> None:
        """The node was told to end a pin."""
        self._replicator.unpinned(key)

    def describe(self, info: PinInfo) -> PinInfo:
        """A pin's line, with what is known of its copies."""
        return self._replicator.describe(info)

    def drain(self, request: Drain) -> DrainState:
        """See :class:`~tracehaul.wire.blocks.Drain`."""
        return self._drainer.call(request)

    async def run(self) -> None:
        """Copy what there is to copy, for as long as the node serves."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._replicator.run())
            group.create_task(self._drainer.run())

    async def aclose(self) -> None:
        """Let notices under way end. :meth:`run` must have ended."""
        await self._nodes.aclose()

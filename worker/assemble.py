"""The one place that puts a worker together: its engine, its way to the store, and the service of its role.

What differs between a cluster, the simulator and a test is an argument: the engine, the memory, the transports, where
copies run. Services are above this room, so which one a role has is said by the caller.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from kvstore.client.client import StoreClient
from kvstore.client.probe import StoreProbe
from kvstore.client.staging import Staging
from tracehaul.engine.base import Engine
from tracehaul.rpc.base import Service
from tracehaul.rpc.member import Member
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Memory
from tracehaul.transfer.plane import Plane
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad
from worker.announce import announced
from worker.config import WorkerConfig
from worker.flights import Flights
from worker.host import WorkerHost
from worker.seat import member_of


class StepService(Service, Protocol):
    """What a role makes of a host."""

    @property
    def flights(self) -> Flights:
        """Who computes which blocks now."""
        ...

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        ...


@dataclass(frozen=True)
class Worker:
    """Our own engine's :class:`worker.seat.Seat`."""

    node: NodeInfo
    """Who it is, and where it listens."""
    host: WorkerHost
    service: StepService
    planes: Sequence[Plane]
    probe: StoreProbe

    @property
    def member(self) -> Member:
        """What it brings into the fleet, with its rates as they are now: so after calibration."""
        return member_of(self)

    @property
    def info(self) -> NodeInfo:
        return announced(self.node, self.host)

    @property
    def background(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        return self.host.run, self.probe.run, *(plane.transfer.broken for plane in self.planes)

    @property
    def stats(self) -> Mapping[str, msgspec.Struct]:
        return {"worker": self.host.stats, "store_client": self.host.client.stats}

    def load(self) -> NodeLoad:
        return msgspec.structs.replace(self.host.load(), serving=self.probe.serving, fault=self.probe.fault)

    def set_members(self, members: Members) -> None:
        self.service.set_members(members)
        self.probe.set_nodes(members.nodes if self.host.config.use_store else (), members.draining)

    async def served(self) -> None:
        await self.probe.served()

    async def aclose(self) -> None:
        await self.host.client.aclose()


def assemble_worker(
    info: NodeInfo,
    engine: Engine,
    memory: Memory,
    planes: Sequence[Plane],
    peers: Peers,
    offload: Offload,
    config: WorkerConfig,
    serve: Callable[[WorkerHost], StepService],
    *,
    buffer_bytes: int,
    shared: float = 0.0,
) -> Worker:
    """A worker of ``config`` around ``engine``.

    Args:
        info: who it is and where it listens; what its engine says of itself is added.
        engine: belongs to this worker alone.
        memory: for blocks between the stores and the engine, ``buffer_bytes`` for each.
        planes: that memory, over one or more transports; the worker ends when one of them breaks.
        peers: connections to the other nodes.
        offload: where long copies run.
        config: limits.
        serve: the service of its role.
        buffer_bytes: at least a block; aligned as the stores' slots are, a copy moves whole pages.
        shared: as in :class:`tracehaul.wire.cluster.NodeLoad`.
    """
    assert engine.info.layout.block_bytes <= buffer_bytes, "a buffer holds a block"
    engine.attach(memory.buffer)
    client = StoreClient(peers, planes, Staging(memory, buffer_bytes), offload)
    host = WorkerHost(engine, client, config, shared)
    return Worker(info, host, serve(host), planes, client.probe(info.node))

"""The one place that puts a worker together: its engine, its way to the store, and the service of each role.

What differs between a cluster, the simulator and a test is an argument: the engine, the memory, the transports, where
copies run. Services are above this room, so which one a role has is said by the caller; see :mod:`worker.roles`.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvstore.client.client import StoreClient
from kvstore.client.probe import StoreProbe
from kvstore.client.staging import Staging
from tracehaul.engine.base import Engine
from tracehaul.rpc.member import Member
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Memory
from tracehaul.transfer.plane import Plane
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad, WorkerRole
from tracehaul.wire.spent import Charge
from worker.announce import announced
from worker.config import WorkerConfig
from worker.host import WorkerHost
from worker.roles import Roles, StepService
from worker.seat import member_of


@dataclass(frozen=True)
class Worker:
    """Our own engine's :class:`worker.seat.Seat`."""

    host: WorkerHost
    service: Roles
    planes: Sequence[Plane]
    probe: StoreProbe

    @property
    def member(self) -> Member:
        """What it brings into the fleet, with its rates as they are now: so after calibration."""
        return member_of(self)._replace(joins=self.service.joins)

    @property
    def info(self) -> NodeInfo:
        return announced(self.service.node, self.host)

    @property
    def background(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        return self.host.run, self.probe.run, *(plane.transfer.broken for plane in self.planes)

    @property
    def stats(self) -> Mapping[str, msgspec.Struct]:
        return {"worker": self.host.stats, "store_client": self.host.client.stats}

    def load(self) -> NodeLoad:
        left = self.service.taking_over
        orphans = () if left is None else left.names()
        load = msgspec.structs.replace(
            self.host.load(), serving=self.probe.serving, fault=self.probe.fault, orphans=orphans
        )
        return self.service.load(load)

    def history(self) -> tuple[Charge, ...]:
        return self.host.meter.history(clock.now_s())

    async def news(self) -> None:
        left = self.service.taking_over
        await (asyncio.Event().wait() if left is None else left.news())

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
    serve: Mapping[WorkerRole, Callable[[WorkerHost], StepService]],
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
        serve: the service of each role; the first that it has is in ``info``.
        buffer_bytes: at least a block; aligned as the stores' slots are, a copy moves whole pages.
        shared: as in :class:`tracehaul.wire.cluster.NodeLoad`.
    """
    assert engine.info.layout.block_bytes <= buffer_bytes, "a buffer holds a block"
    engine.attach(memory.buffer)
    client = StoreClient(peers, planes, Staging(memory, buffer_bytes), offload)
    host = WorkerHost(engine, client, config, shared)
    roles = Roles(info, host, {role: make(host) for role, make in serve.items()})
    return Worker(host, roles, planes, client.probe(info.node))

"""The host process of one node: assembles its room's service, joins the cluster, serves, drains, ends.

A node ends with code 0 when it is told to stop, with :data:`cluster.rundir.FAULT_EXIT` and one line when it cannot
run for a reason that an operator can mend, and with a traceback in its log when it is our mistake.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
import uvloop
from prometheus_client.metrics_core import Metric

from cluster.config import NodeSpec, Plan, disk_path, load_plan, nodes_of, shared_cores, usable_cores
from cluster.metrics import NodeMetrics
from cluster.rundir import FAULT_EXIT, ClusterFault, NodeState, RunDir
from cluster.tiers import open_tiers
from cluster.transports import HOST, open_transport
from kvstore.tiers.disk import NoDisk
from kvstore.tiers.s3 import NoBucket
from tracehaul.engine.base import Engine
from tracehaul.model.source import SourceError, user_cache_dir
from tracehaul.rpc.base import Service
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, setup
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.base import Memory, Transfer
from tracehaul.transfer.memory import NoMemory, allocate
from tracehaul.transfer.plane import Plane
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad, Role
from tracehaul.wire.errors import TransferError
from tracehaul.wire.ids import Generation, NodeId

log = Log(__name__)

DRAIN_POLL_S = 0.05
LISTEN = f"{HOST}:0"
COPY_THREADS = 2


def run_node(name: str, run: RunDir) -> int:
    """Be that node of the plan in ``run`` until SIGTERM or SIGINT; returns the exit code."""
    setup(name)
    try:
        plan = load_plan(run)
        spec = next((spec for spec in nodes_of(plan.config) if spec.name == name), None)
        if spec is None:
            raise ClusterFault(f"the plan has no node {name}")
        run.enter(name)
        uvloop.run(_Node(spec, plan, run).run())
    except (ClusterFault, SourceError, NoMemory, NoDisk, NoBucket, TransferError, OSError) as fault:
        log.error("cannot run", error=fault)
        print(fault, file=sys.stderr, flush=True)  # noqa: T201 - the line that the launcher shows
        return FAULT_EXIT
    return 0


class Room(NamedTuple):
    """What a role puts into a node."""

    service: Service
    stats: Mapping[str, msgspec.Struct]
    load: Callable[[], NodeLoad]
    on_members: Callable[[Members], None]
    announced: Callable[[NodeInfo], NodeInfo] = lambda info: info
    """Adds what a worker says of itself."""
    background: tuple[Coroutine[Any, Any, None], ...] = ()
    """Runs for as long as the node serves; its failure is the node's."""
    metrics: tuple[Callable[[], Iterable[Metric]], ...] = ()
    """Beside those of ``stats`` and ``load``."""
    heartbeat: Callable[[], NodeLoad] | None = None
    """What the router is told instead of ``load``, which metrics read from their own thread."""


class _Node:
    """One life of one node."""

    def __init__(self, spec: NodeSpec, plan: Plan, run: RunDir) -> None:
        self._spec = spec
        self._plan = plan
        self._run = run
        self._state = NodeState("starting")
        self._generation = Generation(clock.wall_ns())
        self._stopping = asyncio.Event()
        self._transfers: list[Transfer] = []
        """Whose failure is the node's: what it offers to peers is out of their reach."""

    async def run(self) -> None:
        """Until told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        network = TcpNetwork()
        peers = Peers(network)
        try:
            if self._spec.role == "router":
                await self._route(network, peers)
            else:
                async with AsyncExitStack() as stack:
                    room = await self._room(self._spec.role, stack, peers)
                    await self._serve(self._spec.role, room, network, peers)
        finally:
            await peers.close()
        log.info("ended")

    def _tell(self, **changes: str) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        self._run.write_state(self._spec.name, self._state)
        log.info("state", **changes)

    # --- store, prefill, decode ---------------------------------------------------------------------------

    async def _serve(self, role: Role, room: Room, network: TcpNetwork, peers: Peers) -> None:
        """Listen, join, serve until told to stop; then leave, so that no work comes, and end what runs."""
        async with AsyncExitStack() as stack:
            server = await network.listen(LISTEN, room.service)
            stack.push_async_callback(server.close)
            metrics, close_metrics = NodeMetrics(room.stats, room.load, room.metrics).serve()
            stack.callback(close_metrics)
            self._tell(phase="joining", address=server.address, metrics=metrics)
            info = NodeInfo(NodeId(self._spec.name), self._generation, role, server.address, pool=self._spec.pool)
            info = room.announced(info)
            membership = Membership(
                peers, self._plan.router_address, info, room.heartbeat or room.load, room.on_members
            )
            async with asyncio.TaskGroup() as group:
                watches = [transfer.broken() for transfer in self._transfers]
                background = [group.create_task(work) for work in (*room.background, *watches)]
                member = group.create_task(membership.run(), name="membership")
                stopping = group.create_task(self._stopping.wait())
                joined = group.create_task(membership.joined.wait())
                await asyncio.wait([stopping, joined], return_when=asyncio.FIRST_COMPLETED)
                joined.cancel()
                if not stopping.done():
                    self._tell(phase="ready")
                await stopping
                self._tell(phase="stopping")
                member.cancel()
                await self._drain(room.load)
                for task in background:
                    task.cancel()

    async def _drain(self, load: Callable[[], NodeLoad]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._plan.config.drain_timeout_s):
                while (now := load()).running or now.waiting:  # noqa: ASYNC110 - once in a life, not worth an event
                    await asyncio.sleep(DRAIN_POLL_S)
            return
        log.warning("steps were cut off", running=load().running, waiting=load().waiting)

    async def _room(self, role: Role, stack: AsyncExitStack, peers: Peers) -> Room:
        """Everything it opens is closed by ``stack``."""
        offload = ThreadOffload("copy", COPY_THREADS)
        stack.callback(offload.close)
        match role:
            case "store":
                return await self._store(stack, offload, peers)
            case "prefill" | "decode":
                return await self._worker(role, stack, offload, peers)

    async def _planes(self, stack: AsyncExitStack, memory: Memory, offload: ThreadOffload) -> list[Plane]:
        """This process's memory on the transport that was asked for."""
        owner = f"{self._spec.name}#{self._generation}"
        transfer = open_transport(self._plan.config.transport, owner, offload)
        stack.push_async_callback(transfer.close)
        self._transfers.append(transfer)
        return [Plane(transfer, transfer.register(memory))]

    def _memory(self, stack: AsyncExitStack, nbytes: int) -> Memory:
        memory = allocate(nbytes, self._spec.name)
        stack.callback(memory.close)
        return memory

    async def _store(self, stack: AsyncExitStack, offload: ThreadOffload, peers: Peers) -> Room:
        from cluster.store_metrics import store_metrics, transfer_metrics
        from kvstore.copies.neighbours import Others
        from kvstore.node.node import StoreNode
        from kvstore.node.pin_journal import PinJournal, open_journal

        config = self._plan.store
        memory = self._memory(stack, config.arena_bytes)
        planes = await self._planes(stack, memory, offload)
        chosen = self._plan.config
        tier, tier_stats = await open_tiers(chosen, self._run, self._spec.name, config.slot_bytes)
        if tier is not None:
            stack.callback(tier.close)
        journal: PinJournal | None = None
        if tier is not None:  # the lock on the disk's file is on it too, or else the run directory's
            pins = disk_path(chosen, self._run, self._spec.name).with_suffix(".pins")
            pins.parent.mkdir(parents=True, exist_ok=True)
            journal = await open_journal(pins)
        others = Others(NodeId(self._spec.name), peers, chosen.replication)
        store = StoreNode(config, self._generation, planes, memory, offload, tier, chosen.tiering, journal, others)
        stack.push_async_callback(store.aclose)
        stats: dict[str, msgspec.Struct] = {"store": store.stats, **tier_stats}
        if store.neighbours is not None:
            stats.update(store.neighbours.stats)
        if store.tiering is not None:
            stats.update(tiering=store.tiering.stats)
        if journal is not None:
            stats.update(pins=journal.stats)
        metrics = (store_metrics(store), transfer_metrics(planes))
        return Room(store, stats, store.load, store.set_members, background=(store.run(),), metrics=metrics)

    async def _worker(
        self, role: Literal["prefill", "decode"], stack: AsyncExitStack, offload: ThreadOffload, peers: Peers
    ) -> Room:
        from cluster.store_metrics import client_metrics, transfer_metrics
        from decode.worker import DecodeService
        from kvstore.client.client import StoreClient
        from kvstore.client.staging import Staging
        from prefill.worker import PrefillService
        from worker.announce import announced
        from worker.calibration import calibrate
        from worker.host import WorkerHost

        config = self._plan.config
        self._tell(phase="loading model")
        engine = await self._engine()
        stack.push_async_callback(engine.aclose)
        # Aligned as the store's slots are, so that a copy moves whole pages.
        buffer_bytes = self._plan.store.slot_bytes
        if engine.info.layout.block_bytes > buffer_bytes:
            raise ClusterFault(f"{config.model} is not the model that this cluster was launched with: start it anew")
        memory = self._memory(stack, config.worker.staging_blocks * buffer_bytes)
        engine.attach(memory.buffer)
        planes = await self._planes(stack, memory, offload)
        client = StoreClient(peers, planes, Staging(memory, buffer_bytes), offload)
        stack.push_async_callback(client.aclose)
        host = WorkerHost(engine, client, config.worker, shared_cores(config, self._plan.threads, usable_cores()))
        await calibrate(host, user_cache_dir() / "rates", offload)
        stats = {"worker": host.stats, "store_client": client.stats}
        metrics = (client_metrics(client.staging, buffer_bytes), transfer_metrics(planes))
        says = partial(announced, host=host)
        match role:
            case "prefill":
                prefill = PrefillService(host)

                def on_members(members: Members) -> None:
                    host.set_nodes(members.nodes, members.draining)

                return Room(prefill, stats, host.load, on_members, says, (host.run(),), metrics, host.heartbeat)
            case "decode":
                decode = DecodeService(host, peers)
                return Room(decode, stats, host.load, decode.set_members, says, (host.run(),), metrics, host.heartbeat)

    async def _engine(self) -> Engine:
        from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig

        config, pool = self._plan.config, self._plan.pool(self._spec.pool)
        return await TorchEngine.load(
            TorchEngineConfig(
                model=pool.config.model,
                name=pool.model.name,
                pool=pool.name,
                dtype=pool.config.dtype or config.dtype,
                weights=pool.config.weights,
                device=config.device,
                threads=self._plan.threads,
                kv_tokens_max=pool.config.kv_tokens or config.kv_tokens,
            )
        )

    # --- router -------------------------------------------------------------------------------------------

    async def _route(self, network: TcpNetwork, peers: Peers) -> None:
        """The control plane for those who join, and the HTTP API for everybody."""
        from cluster.decision_file import DecisionFile
        from router.dispatch.dispatch import Dispatch
        from router.http.app import create_app
        from router.http.server import serve
        from tracehaul.model.text import Text

        config = self._plan.config
        async with AsyncExitStack() as stack:
            offload = ThreadOffload("tokenize")
            stack.callback(offload.close)
            dispatch = Dispatch(peers, config.dispatch)
            stack.push_async_callback(dispatch.close)
            decisions = DecisionFile(self._run.log(self._spec.name).with_name("decisions.jsonl"))
            stack.callback(decisions.close)
            dispatch.retainer.told = decisions.write
            server = await network.listen(self._plan.router_address, dispatch.members)
            stack.push_async_callback(server.close)
            self._tell(phase="loading model", address=server.address)
            text = await offload.run(lambda: Text.load(self._plan.pools[0].model))
            metrics = NodeMetrics({"router": dispatch.stats, "retention": dispatch.retainer.stats}, None)
            app = create_app(dispatch, text, metrics.render, config.api, offload)
            grace_s = max(1, int(config.drain_timeout_s))
            api = await serve(app, config.host, config.port, grace_s=grace_s)
            stack.push_async_callback(api.close)
            self._tell(phase="ready", metrics=f"{api.host}:{api.port}")
            ended = asyncio.ensure_future(api.wait())
            stopping = asyncio.ensure_future(self._stopping.wait())
            await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
            self._tell(phase="stopping")
            ended.cancel()
            stopping.cancel()

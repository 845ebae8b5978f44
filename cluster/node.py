"""The host process of one node: assembles its room's service, joins the cluster, serves, drains, ends.

A node ends with code 0 when it is told to stop, with :data:`cluster.rundir.FAULT_EXIT` and one line when it cannot
run for a reason that an operator can mend, with :data:`cluster.rundir.FENCED_EXIT` and one line when another has its
name, and with a traceback in its log when it is our mistake.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import uvloop
from prometheus_client.metrics_core import Metric

from cluster.config import authority
from cluster.directory.opening import open_directory
from cluster.metrics import NodeMetrics, workers
from cluster.plan import NodeSpec, Plan, load_plan, shared_cores, threads_of, usable_cores, with_engine
from cluster.rundir import FAULT_EXIT, FENCED_EXIT, ClusterFault, NodeState, Notes, RunDir
from cluster.security.secrets import FOLDER, networks_of
from cluster.tiers import open_backing
from kvstore.tiers.disk import NoDisk
from kvstore.tiers.s3 import NoBucket
from router.fleet.members import Terms
from router.http.keys import BadKeys
from router.http.server import ROOM, serve
from tracehaul import __version__
from tracehaul.engine.base import Engine
from tracehaul.model.source import SourceError, user_cache_dir
from tracehaul.rpc.member import Member, new_generation, serving
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.accepting import AcceptStats, raise_nofile
from tracehaul.runtime.files import refreshing
from tracehaul.runtime.log import Log, setup
from tracehaul.runtime.memory import keep_little, settle
from tracehaul.runtime.offload import Offload, ThreadOffload
from tracehaul.runtime.output import OutputStats, forgiving
from tracehaul.runtime.tasks import Tasks
from tracehaul.transfer.base import Memory
from tracehaul.transfer.memory import NoMemory, allocate
from tracehaul.transfer.opening import Planes, open_planes
from tracehaul.transfer.tcp_serving import CONNECTIONS_MAX as TCP_CONNECTIONS_MAX
from tracehaul.wire.cluster import NodeInfo, NodeLoad, Role
from tracehaul.wire.errors import Fenced, JoinRefused, TransferError, Untrusted
from tracehaul.wire.ids import NodeId

if TYPE_CHECKING:  # it takes time to import, and only a router does
    from router.assemble import Router

log = Log(__name__)

COPY_THREADS = 2
OTHER_FILES = 512
"""Connections to others, files, pipes, memory."""
RETURN_S = 5.0
"""Nodes that have lost a router join it again within two seconds of its return."""
RETURN_POLL_S = 0.05
MENDABLE = (
    ClusterFault, JoinRefused, Untrusted, SourceError, BadKeys, NoMemory, NoDisk, NoBucket, TransferError, OSError,
)  # fmt: skip
"""What an operator can do something about."""


def run_node(name: str, run: RunDir, engine: str | None = None, attach: str = "") -> int:
    """Be that node of the plan in ``run`` until SIGTERM or SIGINT; returns the exit code.

    ``engine``, ``attach``: as in :class:`cluster.config.PoolConfig`, where they are not what the plan says.
    """
    output = forgiving()
    setup(name)
    try:
        plan = with_engine(load_plan(run), name, engine, attach)
        spec = plan.node(name)
        notes = Notes(run, name)
        notes.enter()
        uvloop.run(_Node(spec, plan, run, notes, output).run())
    except Fenced as fenced:
        log.error("fenced", error=fenced)
        print(fenced, file=sys.stderr, flush=True)  # noqa: T201 - the line that the launcher shows
        return FENCED_EXIT
    except MENDABLE as fault:
        log.error("cannot run", error=fault)
        print(fault, file=sys.stderr, flush=True)  # noqa: T201 - the line that the launcher shows
        return FAULT_EXIT
    return 0


def noted(load: NodeLoad, note: str) -> NodeLoad:
    """With that note for operators."""
    return msgspec.structs.replace(load, note=note) if note else load


class Room(NamedTuple):
    """What a role puts into a node."""

    member: Member
    metrics: tuple[Callable[[], Iterable[Metric]], ...] = ()
    """Beside those of the member's counts and load."""


class _Node:
    """One life of one node."""

    def __init__(self, spec: NodeSpec, plan: Plan, run: RunDir, notes: Notes, output: OutputStats) -> None:
        self._spec = spec
        self._plan = plan
        self._run = run
        self._notes = notes
        self._stats: dict[str, msgspec.Struct] = {"notes": notes.stats, "output": output}
        """Counts of every node, whatever its role."""
        self._state = NodeState("starting")
        self._generation = new_generation()
        self._started_s = clock.wall_s()
        self._networks = networks_of(plan, run)
        self._stopping = asyncio.Event()
        self._known: set[NodeId] = set()

    async def run(self) -> None:
        """Until told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        raise_nofile(self._files())
        self._stats["control"] = self._networks.control.accepts
        peers = Peers(self._networks.control)
        async with Tasks("node") as tasks:
            if self._networks.credentials is not None:
                from cluster.security.expiry import watching

                self._networks.credentials.told = lambda mark: self._tell(certificates=mark)
                self._tell(certificates=self._networks.credentials.now.mark)
                tasks.start(refreshing(self._networks.credentials), "certificates")
                tasks.start(watching(self._run.path / FOLDER), "expiry")
            try:
                if self._spec.role == "router":
                    await self._route(peers)
                else:
                    async with AsyncExitStack() as stack:
                        room = await self._room(self._spec.role, stack, peers)
                        await self._serve(room, peers)
            finally:
                await peers.close()
        log.info("ended")

    def _files(self) -> list[tuple[str, int]]:
        """What this node may have to hold open at once."""
        config = self._plan.config
        files = [("connections_max", config.connections_max), ("other files", OTHER_FILES)]
        if self._spec.role == "router":
            files.append(("api.connections_max", config.api.connections_max + ROOM))
        elif {"tcp", "auto"} & set(self._plan.transports):
            files.append(("the tcp transport", TCP_CONNECTIONS_MAX))
        return files

    def _info(self, role: Role, transports: tuple[str, ...]) -> NodeInfo:
        listen = authority(self._spec.listen, self._spec.control_port)
        return NodeInfo(
            NodeId(self._spec.name),
            self._generation,
            role,
            listen,
            pool=self._spec.pool,
            started_s=self._started_s,
            version=__version__,
            host=self._spec.host or socket.gethostname(),
            log=str(self._run.log(self._spec.name)),
            transports=transports,
        )

    def _tell(self, **changes: str) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        self._notes.tell(self._state)
        log.info("state", **changes)

    # --- store, prefill, decode ---------------------------------------------------------------------------

    async def _serve(self, room: Room, peers: Peers) -> None:
        """Listen, join, serve until told to stop."""
        member, plan = room.member._replace(announce=self._spec.address), self._plan
        async with AsyncExitStack() as stack:
            counts = NodeMetrics({**member.stats, **self._stats}, member.load, room.metrics)
            page = await counts.serve(plan.config.metrics_host, self._spec.metrics_port)
            stack.push_async_callback(page.close)
            metrics = authority(page.host, page.port)
            member = member._replace(info=msgspec.structs.replace(member.info, metrics=metrics))
            token = next(iter(self._networks.tokens), "")
            directory = open_directory(plan, self._run)
            load = member.load
            member = member._replace(load=lambda: noted(load(), directory.fault))
            life = serving(member, self._networks.control, peers, directory.routers, cluster=plan.name, token=token)
            node = await stack.enter_async_context(life)
            tasks = await stack.enter_async_context(Tasks("directory"))
            tasks.start(directory.follow(node.membership.set_routers), "follow")
            self._tell(phase="joining", address=node.info.address, metrics=metrics)
            drain_timeout_s = self._plan.config.drain_timeout_s
            await node.run(self._stopping, drain_timeout_s=drain_timeout_s, told=lambda phase: self._tell(phase=phase))

    async def _room(self, role: Role, stack: AsyncExitStack, peers: Peers) -> Room:
        """Everything it opens is closed by ``stack``."""
        offload = ThreadOffload("copy", COPY_THREADS)
        stack.callback(offload.close)
        match role:
            case "store":
                return await self._store(stack, offload, peers)
            case "prefill" | "decode" if self._plan.pool(self._spec.pool).config.engine != "native":
                from cluster.engines import stock_seat

                info = self._info(role, ())
                return Room(await stock_seat(stack, info, self._plan, self._spec, self._run, peers, self._tell))
            case "prefill" | "decode":
                return await self._worker(role, stack, offload, peers)

    async def _planes(self, stack: AsyncExitStack, offload: ThreadOffload, memory: Memory) -> Planes:
        """The transports that were asked for."""
        owner = f"{self._spec.name}#{self._generation}"
        planes = await open_planes(self._plan.transports, owner, self._spec.data, memory, offload, self._networks.data)
        stack.push_async_callback(planes.close)
        return planes

    def _memory(self, stack: AsyncExitStack, nbytes: int) -> Memory:
        memory = allocate(nbytes, self._spec.name)
        stack.callback(memory.close)
        return memory

    async def _store(self, stack: AsyncExitStack, offload: ThreadOffload, peers: Peers) -> Room:
        from cluster.store_metrics import store_metrics, transfer_metrics
        from kvstore.copies.neighbours import Others
        from kvstore.node.assemble import assemble_store

        chosen, config = self._plan.config, self._plan.store
        memory = self._memory(stack, config.arena_bytes)
        planes, how = await self._planes(stack, offload, memory)
        backing = await open_backing(chosen, self._run, self._spec.name, config.slot_bytes)
        others = Others(NodeId(self._spec.name), peers, chosen.replication)
        store = assemble_store(config, self._generation, planes, memory, offload, backing, others)
        stack.push_async_callback(store.aclose)
        metrics = (store_metrics(store), transfer_metrics(planes))
        background = (store.run, *(plane.transfer.broken for plane in planes))
        member = Member(self._info("store", how), store, store.load, store.set_members, background, store.counts)
        return Room(member, metrics)

    async def _worker(
        self, role: Literal["prefill", "decode"], stack: AsyncExitStack, offload: ThreadOffload, peers: Peers
    ) -> Room:
        from cluster.store_metrics import client_metrics, transfer_metrics
        from decode.worker import DecodeService
        from prefill.worker import PrefillService
        from worker.assemble import assemble_worker
        from worker.calibration import calibrate

        config, pool = self._plan.config, self._plan.pool(self._spec.pool).config
        limits, buffer_bytes = pool.worker or config.worker, self._plan.store.slot_bytes
        workers = self._plan.workers_on(self._spec.host)
        self._tell(phase="loading model")
        engine = await self._engine()
        stack.push_async_callback(engine.aclose)
        if engine.info.layout.block_bytes > buffer_bytes:
            raise ClusterFault(f"{pool.model} is not the model that this cluster was launched with: start it anew")
        memory = self._memory(stack, limits.staging_blocks * buffer_bytes)
        planes, how = await self._planes(stack, offload, memory)
        worker = assemble_worker(
            self._info(role, how),
            engine,
            memory,
            planes,
            peers,
            offload,
            limits,
            {"prefill": PrefillService, "decode": lambda host: DecodeService(host, peers)},
            buffer_bytes=buffer_bytes,
            shared=shared_cores(workers, self._threads(), usable_cores()),
        )
        stack.push_async_callback(worker.aclose)
        await calibrate(worker.host, user_cache_dir() / "rates", offload)
        return Room(
            worker.member,
            (client_metrics(worker.host.client.staging, buffer_bytes), transfer_metrics(worker.planes)),
        )

    def _threads(self) -> int:
        return threads_of(self._plan.config, self._plan.workers_on(self._spec.host), usable_cores())

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
                threads=self._threads(),
                kv_tokens_max=pool.config.kv_tokens or config.kv_tokens,
            )
        )

    # --- router -------------------------------------------------------------------------------------------

    def _terms(self, stack: AsyncExitStack, offload: Offload) -> Terms:
        """What nodes must fit, with the epochs that the router's last life kept."""
        from cluster.epoch_file import EpochFile

        file = EpochFile(self._run.epochs(self._spec.name), offload)
        stack.push_async_callback(file.close)
        self._known = {mark.node for mark in file.epochs.marks()}
        models = {pool.name: pool.model.name for pool in self._plan.pools}
        return Terms(models, self._plan.name, file.epochs, file.changed)

    async def _returned(self, router: "Router") -> None:
        """Wait for a worker of each pool that this router's last life knew, for a while: clients that come before would
        be turned away although the fleet is well."""
        pools = {spec.pool for spec in self._plan.nodes if spec.role == "decode" and spec.name in self._known}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURN_S):
                while any(not router.dispatch.members.live("decode", pool) for pool in pools):  # noqa: ASYNC110
                    await asyncio.sleep(RETURN_POLL_S)

    async def _route(self, peers: Peers) -> None:
        """The control plane for those who join, and the HTTP API for everybody."""
        from cluster.answer_file import opened_answers
        from cluster.api import operator_key
        from cluster.decision_file import DecisionFile
        from cluster.journal import Whose, remember
        from cluster.kept import opened_kept
        from cluster.prices import prices_of
        from router.assemble import Router
        from router.fleet.gate import Gate
        from router.http.access import KeysOnDisk
        from router.http.tls import certificate_of
        from tracehaul.model.text import Text

        config, name = self._plan.config, self._spec.name
        keep_little()
        async with AsyncExitStack() as stack:
            offload = ThreadOffload("tokenize")
            stack.callback(offload.close)
            router = Router(peers, self._plan.dispatch(name), self._terms(stack, offload), prices_of(self._plan))
            stack.push_async_callback(router.close)
            dispatch, decisions = router.dispatch, DecisionFile(self._run.decisions())
            stack.callback(decisions.close)
            dispatch.retainer.told, dispatch.pricing.told = decisions.write, decisions.write_priced
            dispatch.adapting.told = decisions.write_noted
            answers = opened_answers(self._run.answers(name), config.dispatch)
            dispatch.book.answers = await stack.enter_async_context(answers)
            gate = Gate(router.service, self._networks.tokens)
            listen = authority(self._spec.listen, self._spec.control_port)
            server = await self._networks.control.listen(listen, gate, self._spec.address)
            stack.push_async_callback(server.close)
            self._tell(phase="loading model", address=server.address)
            texts = {pool.model.name: await offload.run(partial(Text.load, pool.model)) for pool in self._plan.pools}
            certificate = certificate_of(config.api)
            keys = KeysOnDisk(Path(config.api.keys_file), operator_key(self._run)) if config.api.keys_file else None
            settle()  # else what the journal brings is looked through again and again while it comes
            journal = await remember(router, config, self._run, Whose(name, server.address), offload, texts)
            await self._returned(router)
            accepts = self._stats["api"] = AcceptStats()
            kept = await stack.enter_async_context(opened_kept(config, self._run, name, offload, dispatch.bills))
            shown_now = (journal, kept.metrics, partial(workers, dispatch.members))
            shown = NodeMetrics({**router.stats, **self._stats, **kept.stats}, None, shown_now).render
            app = kept.app(router, texts, config.api, offload, shown, keys.keyring if keys else None)
            api = await serve(
                app,
                config.host,
                config.port,
                grace_s=max(1, int(config.drain_timeout_s)),
                config=config.api,
                certificate=certificate,
                accepts=accepts,
            )
            stack.push_async_callback(api.close)
            tasks = await stack.enter_async_context(Tasks("router"))
            tasks.start(refreshing(*filter(None, (keys, certificate))), "files")
            tasks.start(open_directory(self._plan, self._run).announce(name, server.address), "announce")
            settle()
            self._tell(phase="ready", metrics=authority(api.host, api.port))
            ended = asyncio.ensure_future(api.wait())
            stopping = asyncio.ensure_future(self._stopping.wait())
            await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
            self._tell(phase="stopping")
            ended.cancel()
            stopping.cancel()

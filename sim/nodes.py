"""The real shells as simulated processes: one object for each life of each node."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import msgspec
from starlette.types import ASGIApp

from decode.worker import DecodeService
from kvstore.config import StoreConfig
from kvstore.copies.neighbours import Others
from kvstore.index.pin_records import Moment
from kvstore.node.assemble import Backing, assemble_store
from kvstore.node.node import StoreNode
from kvstore.node.pin_journal import PinJournal
from kvstore.tiers.base import Tier
from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.slot_tier import SlotTier
from kvstore.tiers.stack import Stack
from prefill.worker import PrefillService
from records.fakes import MemoryDocuments
from router.assemble import Router
from router.dispatch.bill_keeper import BillKeeper
from router.dispatch.config import DispatchConfig
from router.dispatch.dispatch import Dispatch
from router.fleet.members import Terms
from router.http.config import ApiConfig
from sim.bills import Timed
from sim.checker import AbortChecker, Findings, SampledChecker, TerminalChecker, is_terminal
from sim.lifespan import living
from sim.links import SimMemory, WatchedTransfer
from sim.loop import PROCESS
from sim.records import Database, SimRecords
from sim.slot_checker import SlotChecker
from sim.storage import Below, SimDevice
from sim.store_checker import PinChecker, TierChecker, excuses, offset_in
from sim.text import SimText
from tracehaul.engine.base import EngineInfo
from tracehaul.engine.fake import EngineCost, FakeEngine
from tracehaul.rpc.base import NO_CONTEXT, CallContext, Replies, Service
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.member import Member, serving
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import InlineOffload
from tracehaul.runtime.tasks import Tasks
from tracehaul.transfer.local import LocalHub, LocalTransfer
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import Lease, Leased, Publish, Published, Release, Reserve, Reserved
from tracehaul.wire.cluster import NodeInfo, Role
from tracehaul.wire.errors import ClusterError, Fenced, NameTaken
from tracehaul.wire.hashing import token_count
from tracehaul.wire.ids import Generation, NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import DecodeStep, PrefillStep
from worker.assemble import Worker, assemble_worker
from worker.config import WorkerConfig
from worker.flights import Flights
from worker.host import WorkerHost

OFFLOAD = InlineOffload()
CLUSTER = "simulated"
KEEP_S = 86400.0
"""For so long a trace that rests is in the database."""
FENCE_GRACE_S = 15.0
"""After which nobody believes in a life that another has replaced: requests under way have ended."""


class Shape(msgspec.Struct, frozen=True):
    """Sizes and limits of a simulated cluster."""

    engine: EngineInfo
    cost: EngineCost
    store: StoreConfig
    worker: WorkerConfig
    dispatch: DispatchConfig
    api: ApiConfig = ApiConfig()
    below: Below | None = None
    """What the stores have below memory, and who keeps blocks there; None: nothing, nobody."""


class Surroundings(Protocol):
    """What a process is given by the world it runs in."""

    shape: Shape
    network: LocalNetwork
    hub: LocalHub
    findings: Findings
    terminal: TerminalChecker
    aborts: AbortChecker
    sampled: SampledChecker
    ledgers: dict[str, SlotChecker]
    router_addresses: tuple[str, ...]
    tiers: TierChecker
    pins: PinChecker
    devices: dict[NodeId, SimDevice]
    """What is below each store's memory; it outlives its node's lives."""
    healed_s: float | None
    database: Database
    documents: MemoryDocuments
    """What routers write beside: no fault hits that."""

    def ended(self, life: "Life", why: ClusterError) -> None:
        """Its process exits: another life has its name."""
        ...


@dataclass
class Life:
    """One life of one node. What a role does not have is None."""

    node: NodeId
    generation: Generation
    address: str
    alive: bool = True
    fenced_s: float | None = None
    """Since when another life is a member in its place, and this one may serve nobody that listens."""
    freezes: int = 0
    """Freezes in force; they may overlap."""
    store: StoreNode | None = None
    device: SimDevice | None = None
    memory: SimMemory | None = None
    ledger: SlotChecker | None = None
    host: WorkerHost | None = None
    engine: FakeEngine | None = None
    router: Router | None = None
    dispatch: Dispatch | None = None
    app: ASGIApp | None = None
    """The router's, for clients; once it is ready."""
    worker: Worker | None = None
    flights: Flights | None = None
    keeper: BillKeeper | None = None
    timed: Timed | None = None
    """How long its engine was at work."""
    membership: Membership | None = None
    tasks: Tasks = field(default_factory=lambda: Tasks("life"))
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def process(self) -> str:
        """Its name among processes, and as the owner of its memory."""
        return f"{self.node}#{self.generation}"

    def context(self) -> Context:
        """A context in which code belongs to this process."""
        context = copy_context()
        context.run(PROCESS.set, self.process)
        return context


class WatchedService:
    """A node's service: runs as its process, and enters what it answers in the checkers' books."""

    def __init__(self, life: Life, inner: Service, around: Surroundings) -> None:
        self._life = life
        self._inner = inner
        self._around = around
        self._streams = 0

    async def call(self, request: Request, context: CallContext) -> Reply:
        PROCESS.set(self._life.process)
        store = self._life.store
        before = excuses(store) if store is not None else None
        reply = await self._inner.call(request, context)
        if self._life.ledger is not None:
            _enter(self._life.ledger, context.peer, request, reply)
        if store is not None and before is not None:
            if isinstance(request, Lease) and isinstance(reply, Leased):
                self._around.tiers.missed(self._life.process, store, request, reply, before)
            self._check_fence(request)
        return reply

    def _check_fence(self, request: Request) -> None:
        fenced_s, healed_s = self._life.fenced_s, self._around.healed_s
        if fenced_s is None or healed_s is None or not isinstance(request, Lease | Reserve | Publish):
            return
        if clock.now_s() > max(fenced_s, healed_s) + FENCE_GRACE_S:
            text = f"{self._life.process} is asked for {type(request).__name__} although another life is the member"
            self._around.findings.add("fenced", text)

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        PROCESS.set(self._life.process)
        if not isinstance(request, DecodeStep | PrefillStep):
            async with aclosing(self._inner.stream(request, context)) as replies:
                async for reply in replies:
                    yield reply
            return
        self._streams += 1
        began_s = clock.now_s()
        key = f"{self._life.process} {type(request).__name__} {request.step} {self._streams}"
        self._around.terminal.began(key)
        cut_off = True
        try:
            async with aclosing(self._inner.stream(request, context)) as replies:
                async for reply in replies:
                    self._around.terminal.message(key, terminal=is_terminal(reply))
                    yield reply
            cut_off = False
        finally:
            self._around.terminal.ended(key, cut_off=cut_off)
            self._around.aborts.handler_ended(self._life.process, request.trace, began_s)

    def disconnected(self, peer: str) -> None:
        asyncio.get_running_loop().call_soon(self._disconnected, peer, context=self._life.context())

    def _disconnected(self, peer: str) -> None:
        self._inner.disconnected(peer)
        if self._life.ledger is not None:
            self._life.ledger.disconnected(peer)


def _enter(ledger: SlotChecker, peer: str, request: Request, reply: Reply) -> None:
    match request, reply:
        case _, Reserved():
            ledger.reserved(peer, reply)
        case Publish(), Published():
            ledger.publishing(peer, request, reply)
        case Lease(hashes=hashes), Leased():
            ledger.leased(peer, hashes, reply)
        case Release(lease=lease), _:
            ledger.released(peer, lease)
        case _:
            pass


class AskingPeers(Peers):
    """A router's: what it asks of workers counts when it is asked, as it may reach them long after."""

    def __init__(self, life: Life, around: Surroundings) -> None:
        super().__init__(around.network.at(life.address))
        self._process = life.process
        self._sampled = around.sampled

    def stream(
        self, address: str, request: Request, *, idle_timeout_s: float, context: CallContext = NO_CONTEXT
    ) -> Replies:
        if isinstance(request, DecodeStep):
            self._sampled.asked(request.step, self._process, token_count(request.emitted))
        return super().stream(address, request, idle_timeout_s=idle_timeout_s, context=context)


def start(life: Life, role: Role | None, around: Surroundings) -> None:
    """Begin a life, in its own context; ``role`` None is the router. ``life.ready`` is set when it serves."""
    work = _run_router(life, around) if role is None else _run_node(life, role, around)
    life.context().run(life.tasks.start, work, "node")


async def _run_router(life: Life, around: Surroundings) -> None:
    # The simulated world has one clock, and a router forgets its epochs with its life.
    terms = Terms(cluster=CLUSTER, wall_s=clock.now_s)
    router = Router(AskingPeers(life, around), around.shape.dispatch, terms)
    life.router, life.dispatch = router, router.dispatch
    await around.network.listen(life.address, WatchedService(life, router.service, around))
    records = SimRecords(around.database, life.node, life.process, life.address)
    await router.remember(records, KEEP_S, {}, OFFLOAD, life.node)
    dice = random.Random(life.process)  # noqa: S311 - reproducible is the point
    life.app = router.app({around.shape.engine.model: SimText()}, around.shape.api, OFFLOAD, lambda: b"", dice)
    keeper = life.keeper = BillKeeper(router.dispatch.bills, around.documents, life.process, KEEP_S, clock.now_s)
    async with living(life.app), keeper:
        life.ready.set()
        await asyncio.Event().wait()  # simulated routers crash


async def _run_node(life: Life, role: Role, around: Surroundings) -> None:
    network = around.network.at(life.address)
    peers = Peers(network)
    transfer = WatchedTransfer(LocalTransfer(life.process, around.hub), life.address, around.ledgers)
    info = NodeInfo(life.node, life.generation, role, life.address)
    if role == "store":
        store = life.store = _store(life, transfer, peers, around)
        member = Member(info, store, store.load, store.set_members, (transfer.broken,))
    else:
        member = _worker(life, info, transfer, peers, around).member
    member = member._replace(service=WatchedService(life, member.service, around))
    async with serving(member, network, peers, around.router_addresses, cluster=CLUSTER) as node:
        assert node.info.address == life.address
        life.membership = node.membership
        try:
            # It is never told to stop: simulated nodes crash.
            await node.run(asyncio.Event(), drain_timeout_s=0.0, told=lambda _: life.ready.set())
        except (Fenced, NameTaken) as error:
            around.ended(life, error)
            await asyncio.Event().wait()  # as a process that has exited


def _store(life: Life, transfer: WatchedTransfer, peers: Peers, around: Surroundings) -> StoreNode:
    config, below = around.shape.store, around.shape.below
    memory = life.memory = SimMemory(config.arena_bytes)
    planes = [Plane(transfer, transfer.register(memory))]
    if below is None:
        node = assemble_store(config, life.generation, planes, memory, OFFLOAD)
        life.ledger = SlotChecker(around.findings, life.process, node, memory.buffer)
    else:
        device = life.device = around.devices[life.node]
        promised = [record.block.hash for record in device.whole()]
        backing, others = _backing(device, below, config.slot_bytes), Others(life.node, peers, below.copies)
        node = assemble_store(config, life.generation, planes, memory, OFFLOAD, backing, others)
        around.tiers.recovered(life.process, promised, node)
        around.pins.restarted(device, life.process, node)
        ledger = life.ledger = SlotChecker(around.findings, life.process, node, memory.buffer, device.objects.published)
        device.on_read = lambda view: _promoted(ledger, memory.buffer, view)
        life.tasks.start(node.run(), "tiering")
    around.ledgers[life.process] = life.ledger
    return node


def _backing(device: SimDevice, below: Below, slot_bytes: int) -> Backing:
    tier: Tier = SlotTier("disk", device, device.calls, device.calls)
    if below.objects_slots:
        bucket = ObjectTier("s3", device.objects, OFFLOAD, below.objects_slots, slot_bytes)
        tier = Stack(tier, bucket, slot_bytes)
    return Backing(tier, below.tiering, PinJournal(device.pins, device.pins.calls, _moment))


def _moment() -> Moment:
    return Moment("one boot", clock.now_s(), clock.now_s())


def _promoted(ledger: SlotChecker, buffer: memoryview, view: memoryview) -> None:
    offset = offset_in(buffer, view)
    if offset is not None:  # a scrub reads elsewhere
        ledger.promoted(offset)


def _worker(life: Life, info: NodeInfo, transfer: WatchedTransfer, peers: Peers, around: Surroundings) -> Worker:
    shape = around.shape
    engine = life.engine = FakeEngine(shape.engine, shape.cost)
    timed = life.timed = Timed()
    cast(Any, engine).run = timed.around(engine.run)
    buffer_bytes = shape.engine.layout.block_bytes
    memory = life.memory = SimMemory(shape.worker.staging_blocks * buffer_bytes)
    worker = assemble_worker(
        info,
        engine,
        memory,
        [Plane(transfer, transfer.register(memory))],
        peers,
        OFFLOAD,
        shape.worker,
        {"prefill": PrefillService, "decode": lambda host: DecodeService(host, peers)},
        buffer_bytes=buffer_bytes,
    )
    life.worker, life.host, life.flights = worker, worker.host, worker.host.flights
    return worker

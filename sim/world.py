"""A whole cluster under virtual time: nodes that live and die, and the faults that hit them."""

import asyncio

import msgspec

from records.fakes import MemoryDocuments
from router.dispatch.flips import FlipOutcome
from sim import loop as virtual
from sim.bills import Sums, Timed
from sim.checker import (
    AbortChecker,
    BugChecker,
    CachedChecker,
    Findings,
    RoleChecker,
    SampledChecker,
    TerminalChecker,
)
from sim.faults import (
    Break,
    Crash,
    DiskRot,
    DiskTrouble,
    Fault,
    FaultPlan,
    Freeze,
    HostLoss,
    PowerLoss,
    Retire,
    Rot,
    Turn,
    Weather,
    Zombie,
    make_faults,
    make_store_faults,
    make_turns,
)
from sim.http import Gateway
from sim.links import CopyLink, FrameLink
from sim.nodes import Life, start
from sim.records import Database, ended_unwritten
from sim.shape import FAULTS_END_S, FLEET, ROLES, ROUTERS, make_shape
from sim.slot_checker import SlotChecker
from sim.storage import SimDevice, SimObjects
from sim.store_checker import DrainChecker, PinChecker, TierChecker
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.runtime import clock
from tracehaul.transfer.local import LocalHub
from tracehaul.wire.blocks import Drain, DrainState
from tracehaul.wire.cluster import WorkerRole
from tracehaul.wire.errors import ClusterError, NameTaken
from tracehaul.wire.ids import Generation, NodeId, TraceId


class World:
    """One run. Attributes are what :class:`sim.nodes.Surroundings` asks for."""

    def __init__(self, seed: int, plan: FaultPlan | None = None) -> None:
        self.shape = make_shape(seed)
        self.findings = Findings()
        self.terminal = TerminalChecker(self.findings)
        self.aborts = AbortChecker(self.findings)
        self.cached = CachedChecker(self.findings)
        self.sampled = SampledChecker(self.findings)
        self.ledgers: dict[str, SlotChecker] = {}
        self.tiers = TierChecker(self.findings)
        self.pins = PinChecker(self.findings)
        self.devices: dict[NodeId, SimDevice] = {}
        self.drains = DrainChecker(self.findings)
        self.roles = RoleChecker(self.findings)
        self.one_at_a_time = False
        """Whether store nodes die so far apart that copies have been made anew; then what they promise is checked."""
        self.zombies: list[Life] = []
        self.healed_s: float | None = None
        self.seed = seed
        self._hosts = 0
        self._buckets: dict[NodeId, SimObjects] = {}
        self.plan = plan or self._make_plan(seed)
        self.weather = Weather(seed, self.plan)
        self.network = LocalNetwork(FrameLink(self.weather))
        self.hub = LocalHub(CopyLink(self.weather, self._is_alive))
        self._same_addresses = seed % 2 == 0
        self.router_addresses = tuple(self._address(node, 0) for node in ROUTERS)
        self.gateway = Gateway()
        self.database = Database(seed, FAULTS_END_S)
        self.documents = MemoryDocuments()
        self.lives: dict[NodeId, Life] = {}
        self.graves: list[Life] = []
        self.unheard: set[TraceId] = set()
        """Traces that ended at a router which died before it had written that: the next one waits for more of them."""
        self.bugs = BugChecker(self.findings)
        self.bills: Sums | None = None
        """What all of it cost; once it is over."""
        self._unheard_since_s: float | None = None
        """Since when there is no router."""
        self._generation = 0
        self._by_process: dict[str, Life] = {}
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        self.loop = loop

    def _make_plan(self, seed: int) -> FaultPlan:
        plan = make_faults(seed, FLEET, FAULTS_END_S)
        more = make_turns(seed, FLEET, FAULTS_END_S)
        if self.shape.below is not None:
            more += make_store_faults(seed, FLEET, FAULTS_END_S)
        faults = sorted((*plan.faults, *more), key=lambda fault: fault.at_s)
        return msgspec.structs.replace(plan, faults=tuple(faults))

    def engines(self) -> list[Timed]:
        """Of all lives, the dead ones too."""
        everybody = self.graves + [life for life in self.zombies if life.alive] + list(self.lives.values())
        return [life.timed for life in everybody if life.timed is not None]

    # --- life and death -----------------------------------------------------------------------------------

    def _is_alive(self, process: str) -> bool:
        return self._by_process[process].alive

    def _address(self, node: NodeId, generation: int) -> str:
        """A node that comes back may have its old address, or another one."""
        return f"{node}:{1 if self._same_addresses or ROLES[node] is None else generation}"

    def start(self, node: NodeId) -> Life:
        """A new life of ``node``."""
        self._generation += 1
        life = Life(node, Generation(self._generation), self._address(node, self._generation))
        self.lives[node] = self._by_process[life.process] = life
        if node in ROUTERS:
            self.gateway.routers[node] = life
            self._unheard_since_s = None
        if ROLES[node] == "store" and node not in self.devices:
            self._give_device(node)
        start(life, ROLES[node], self)
        return life

    def _give_device(self, node: NodeId) -> None:
        below = self.shape.below
        if below is not None:
            self._hosts += 1
            dice = f"device {self._hosts} {self.seed}"
            if node not in self._buckets:
                self._buckets[node] = SimObjects(2 * below.latency_s, f"bucket {node} {self.seed}")
            slot_bytes = self.shape.store.slot_bytes
            self.devices[node] = SimDevice(below.slots, slot_bytes, below.latency_s, dice, self._buckets[node])

    def crash(self, life: Life, *, power: bool = False) -> None:
        """It is gone, between two instructions; if its power is, too, so is what its device had not flushed."""
        life.alive = False
        if life.timed is not None:
            life.timed.died(self._unheard_since_s)
        if life.device is not None:
            life.device.killed()
            if power:
                life.device.lose_power()
        self.graves.append(life)
        self.bugs.dead.add(life.process)
        self.loop.freeze(life.process)
        self.hub.remove(life.process)
        self.network.crash(life.address)
        self.terminal.died(life.process)
        self.ledgers.pop(life.process, None)  # its memory is unreachable: who still tries fails
        if life.node in ROUTERS:
            self.gateway.lost(life)
            if not any(self.lives[router].alive for router in ROUTERS):
                self._unheard_since_s = clock.now_s()
        if life.dispatch is not None:
            self.unheard |= ended_unwritten(self.database.tables, life.dispatch.traces)

    def ended(self, life: Life, why: ClusterError) -> None:
        """Its process exits. Who took a frozen life's place in vain leaves it the place."""
        self.loop.call_soon(self._ended, life, why, context=self.network.context)

    def _ended(self, life: Life, why: ClusterError) -> None:
        if not life.alive:
            return
        self.crash(life)
        if self.lives[life.node] is not life:
            return
        lasting = next((zombie for zombie in self.zombies if zombie.node == life.node and zombie.alive), None)
        if lasting is None or not isinstance(why, NameTaken):
            self.findings.add("fenced", f"{life.process} is the last of its name, and ended: {why}")
            return
        self.zombies.remove(lasting)
        lasting.fenced_s = None
        self.lives[life.node] = lasting
        if lasting.device is not None:
            self.devices[life.node] = lasting.device

    # --- faults -------------------------------------------------------------------------------------------

    async def inject(self) -> None:
        """All faults of the plan, each in its time; returns when the last is over."""
        await asyncio.gather(*(self._inject(fault) for fault in self.plan.faults))

    async def _inject(self, fault: Fault) -> None:
        await asyncio.sleep(max(0.0, fault.at_s - clock.now_s()))
        self.loop.record(f"fault {fault}")
        match fault:
            case Crash(node=node, for_s=for_s) | PowerLoss(node=node, for_s=for_s) | HostLoss(node=node, for_s=for_s):
                if self.lives[node].alive:
                    self.crash(self.lives[node], power=isinstance(fault, PowerLoss))
                    if isinstance(fault, HostLoss):
                        self._give_device(node)
                    await asyncio.sleep(for_s)
                    self.start(node)
            case Freeze(node=node, for_s=for_s):
                life = self.lives[node]
                if life.alive:
                    await self._freeze(life, for_s)
            case Zombie(node=node, for_s=for_s):
                life = self.lives[node]
                if life.alive and not self._same_addresses:  # two processes cannot have one address
                    await self._replace(life, for_s)
            case Retire(node=node, for_s=for_s):
                await self._retire(self.lives[node], for_s)
            case Turn(node=node, router=router):
                self.turn(node, self.lives[router])
            case DiskTrouble(node=node):
                await self._trouble(fault)
            case DiskRot(node=node):
                if node in self.devices:
                    self.devices[node].flip()
                    self.devices[node].objects.flip()
            case Break(node=node):
                self.network.sever(self.lives[node].address)
            case Rot(node=node):
                self._rot(self.lives[node])
            case _:
                self.weather.begin(fault)
                await asyncio.sleep(fault.for_s)
                self.weather.end(fault)

    async def _freeze(self, life: Life, for_s: float) -> None:
        life.freezes += 1
        self.loop.freeze(life.process)
        self.network.freeze(life.address)
        await asyncio.sleep(for_s)
        life.freezes -= 1
        if life.alive and life.freezes == 0:
            self.network.thaw(life.address)
            self.loop.thaw(life.process)

    async def _replace(self, life: Life, for_s: float) -> None:
        """Another host takes its place while it stands still."""
        life.fenced_s = clock.now_s()
        self.zombies.append(life)
        freezing = asyncio.ensure_future(self._freeze(life, for_s))
        await asyncio.sleep(0)
        self._give_device(life.node)
        self.start(life.node)
        await freezing

    async def _retire(self, life: Life, for_s: float) -> None:
        """Drain it, and replace it by an empty host once it says that it is drained; or give up."""
        until_s = clock.now_s() + for_s
        while life.alive and life.store is not None:
            late = clock.now_s() >= until_s
            asking = self.loop.create_task(self._drain(life, cancel=late), context=life.context())
            await asyncio.wait([asking], timeout=1.0)
            if life.alive and asking.done() and asking.result():
                self.crash(life)
                self._give_device(life.node)
                self.start(life.node)
            elif late and (asking.done() or not life.alive):
                return
            asking.cancel()
            await asyncio.sleep(0.1)

    async def _drain(self, life: Life, *, cancel: bool) -> bool:
        """Whether it is drained."""
        assert life.store is not None
        try:
            state = await life.store.call(Drain(cancel), CallContext(peer="operator"))
        except ClusterError:
            return False  # nobody could take anything, or it drains nothing
        assert isinstance(state, DrainState)
        if state.state != "drained":
            return False
        if self.one_at_a_time:
            others = [self.lives[node] for node in FLEET.stores if node != life.node]
            self.drains.done(life.process, life.store, [o.store for o in others if o.alive and o.store], state)
        return True

    def turn(self, node: NodeId, router: Life) -> "asyncio.Task[FlipOutcome] | None":
        """That life of a router changes the role of a worker; None: it cannot, as it is not there."""
        dispatch, worker = router.dispatch, self.lives[node].worker
        if not router.alive or not router.ready.is_set() or dispatch is None or worker is None:
            return None
        to: WorkerRole = "decode" if worker.info.role == "prefill" else "prefill"
        return router.context().run(router.tasks.start, dispatch.flip(node, to), f"flip {node}")

    async def _trouble(self, fault: DiskTrouble) -> None:
        device = self.devices.get(fault.node)
        if device is None:
            return
        device.trouble(fault.kind)
        await asyncio.sleep(fault.for_s)
        device.trouble(None)

    def _rot(self, life: Life) -> None:
        if life.ledger is None or life.memory is None or not life.alive:
            return
        blocks = life.ledger.visible()
        if blocks:
            block = blocks[self.weather.pick(len(blocks))]
            life.ledger.rotten.add(block.hash)
            life.memory.buffer[block.offset + self.weather.pick(block.size_bytes)] ^= 0x10

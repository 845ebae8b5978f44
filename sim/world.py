"""A whole cluster under virtual time: built from a seed, hit by faults, healed, and made to prove itself."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from kvstore.config import StoreConfig
from router.dispatch.dispatch import Dispatch, DispatchConfig
from router.policy.retention import RetentionConfig
from sim import loop as virtual
from sim.checker import (
    AbortChecker,
    BugChecker,
    CachedChecker,
    Findings,
    IndexChecker,
    IntegrityChecker,
    OutputChecker,
    ProgressChecker,
    ReferenceChecker,
    SlotChecker,
    TerminalChecker,
    Truth,
)
from sim.clients import Agents, Books, Gateway
from sim.faults import (
    Break,
    Crash,
    DiskRot,
    DiskTrouble,
    Fault,
    FaultPlan,
    Fleet,
    Freeze,
    HostLoss,
    PowerLoss,
    Retire,
    Rot,
    Weather,
    Zombie,
    make_faults,
    make_store_faults,
)
from sim.keeper import ADDRESS, Keeper
from sim.links import CopyLink, FrameLink
from sim.nodes import Life, Shape, start
from sim.storage import SimDevice, SimObjects, make_below
from sim.store_checker import DrainChecker, PinChecker, TierChecker
from sim.traces import Mix, TracePlan, context_max, make_traces
from tracehaul.engine.fake import FAKE_LAYOUT, EngineCost, FakeEngine, fake_info
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.transfer.local import LocalHub
from tracehaul.wire.blocks import Drain, DrainState
from tracehaul.wire.cluster import Role
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.ids import Generation, NodeId
from worker.config import WorkerConfig

MIX = Mix(traces=20, steps_min=3, steps_max=8, system_tokens_max=40, new_tokens_max=24, output_tokens_max=12)
VOCAB = 256
TENANTS = ("tenant-0",)
"""Those with a quota, of the traces' salts; the others share the rest."""
ROUTER = NodeId("router")
ROLES: dict[NodeId, Role | None] = {
    ROUTER: None,
    **{NodeId(f"store-{i}"): "store" for i in range(3)},
    **{NodeId(f"prefill-{i}"): "prefill" for i in range(2)},
    **{NodeId(f"decode-{i}"): "decode" for i in range(2)},
}
FLEET = Fleet(
    router=ROUTER,
    stores=tuple(node for node, role in ROLES.items() if role == "store"),
    workers=tuple(node for node, role in ROLES.items() if role in ("prefill", "decode")),
)
FAULTS_END_S = 25.0
START_TIMEOUT_S = 10.0
PROGRESS_TIMEOUT_S = 400.0
"""From healing to the end of all traces: gaps of half a minute included."""
LATE_WRITE_S = 15.0
"""Longer than any fault holds a copy back: what a store has to be told of its transport."""
TOLD_S = 2.0
"""In which the router has heard of what the probes found bad."""
PINS_END_S = 10.0
"""Well before the stores are looked at in the end: those of a router that died are never ended by it."""
AUDIT_S = 0.1
"""How often hard pins are looked after."""
IDLE_S = 25.0
"""From the end of all work to the last timeout of anything that was held for it."""


class Result(msgspec.Struct, frozen=True):
    """What came of one run."""

    seed: int
    findings: tuple[str, ...]
    digest: str
    virtual_s: float
    faults: tuple[Fault, ...]
    finished: int
    failed: int
    hung_up: int
    prompt_tokens: int
    cached_tokens: int
    counts: dict[str, int]
    """What the cluster did, summed over all lives: to see that a run exercised something."""


def make_shape(seed: int) -> Shape:
    """Sizes of a cluster: roomy ones, and such that everything is always short of something."""
    rng = random.Random(f"shape {seed}")  # noqa: S311 - reproducible is the point
    longest = context_max(MIX)
    slots = rng.choice([24, 100, 1000])
    below = make_below(seed, slots)
    return Shape(
        engine=fake_info(
            context_max=longest, kv_tokens_max=rng.choice([longest, 2 * longest, 6 * longest]), vocab_size=VOCAB
        ),
        cost=EngineCost(iteration_s=0.005, prefill_token_s=0.0002, copy_token_s=0.00001),
        store=StoreConfig(
            arena_bytes=slots * 4096,
            slot_bytes=4096,
            reservation_ttl_s=rng.choice([0.5, 5.0]),
            lease_ttl_max_s=rng.choice([0.1, 6.0]),
            late_write_s=LATE_WRITE_S,
            hard_tenant_share_max=0.25 if below is None else below.hard_share,
            quota_bytes=dict.fromkeys(TENANTS, slots * 4096 // 4) if below is not None and below.quotas else {},
        ),
        worker=WorkerConfig(
            chunk_tokens=rng.choice([16, 64]),
            sequences_max=rng.choice([2, 16]),
            waiting_max=64,
            headroom_tokens=rng.choice([1, 16]),
            local_prefill_tokens=rng.choice([0, 16, 64]),
            staging_blocks=rng.choice([8, 64]),
            group_blocks=rng.choice([1, 4, 8]),
            store_timeout_s=rng.choice([1.0, 5.0]),
        ),
        dispatch=DispatchConfig(retention=RetentionConfig(pin_max_s=PINS_END_S)),
        below=below,
    )


class World:
    """One run. Attributes are what :class:`sim.nodes.Surroundings` asks for."""

    def __init__(self, seed: int, plan: FaultPlan | None = None) -> None:
        self.shape = make_shape(seed)
        self.findings = Findings()
        self.terminal = TerminalChecker(self.findings)
        self.aborts = AbortChecker(self.findings)
        self.cached = CachedChecker(self.findings)
        self.ledgers: dict[str, SlotChecker] = {}
        self.tiers = TierChecker(self.findings)
        self.pins = PinChecker(self.findings)
        self.devices: dict[NodeId, SimDevice] = {}
        self.drains = DrainChecker(self.findings)
        self.one_at_a_time = False
        """Whether store nodes die so far apart that copies have been made anew; then what they promise is checked."""
        self.zombies: list[Life] = []
        self.healed_s: float | None = None
        self._seed = seed
        self._hosts = 0
        self._buckets: dict[NodeId, SimObjects] = {}
        self.plan = plan or self._make_plan(seed)
        self.weather = Weather(seed, self.plan)
        self.network = LocalNetwork(FrameLink(self.weather))
        self.hub = LocalHub(CopyLink(self.weather, self._is_alive))
        self._same_addresses = seed % 2 == 0
        self.router_address = self._address(ROUTER, 0)
        self.gateway = Gateway()
        self.lives: dict[NodeId, Life] = {}
        self.graves: list[Life] = []
        self.bugs = BugChecker(self.findings)
        self._generation = 0
        self._by_process: dict[str, Life] = {}
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        self.loop = loop

    def _make_plan(self, seed: int) -> FaultPlan:
        plan = make_faults(seed, FLEET, FAULTS_END_S)
        if self.shape.below is None:
            return plan
        faults = sorted((*plan.faults, *make_store_faults(seed, FLEET, FAULTS_END_S)), key=lambda fault: fault.at_s)
        return msgspec.structs.replace(plan, faults=tuple(faults))

    # --- life and death -----------------------------------------------------------------------------------

    def _is_alive(self, process: str) -> bool:
        return self._by_process[process].alive

    def _address(self, node: NodeId, generation: int) -> str:
        """A node that comes back may have its old address, or another one."""
        return f"{node}:{1 if self._same_addresses or node == ROUTER else generation}"

    def start(self, node: NodeId) -> Life:
        """A new life of ``node``."""
        self._generation += 1
        life = Life(node, Generation(self._generation), self._address(node, self._generation))
        self.lives[node] = self._by_process[life.process] = life
        if ROLES[node] is None:
            self.gateway.router = life
        if ROLES[node] == "store" and node not in self.devices:
            self._give_device(node)
        start(life, ROLES[node], self)
        return life

    def _give_device(self, node: NodeId) -> None:
        below = self.shape.below
        if below is not None:
            self._hosts += 1
            dice = f"device {self._hosts} {self._seed}"
            if node not in self._buckets:
                self._buckets[node] = SimObjects(2 * below.latency_s, f"bucket {node} {self._seed}")
            slot_bytes = self.shape.store.slot_bytes
            self.devices[node] = SimDevice(below.slots, slot_bytes, below.latency_s, dice, self._buckets[node])

    def crash(self, life: Life, *, power: bool = False) -> None:
        """It is gone, between two instructions; if its power is, too, so is what its device had not flushed."""
        life.alive = False
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
        if ROLES[life.node] is None:
            self.gateway.lost()

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

    # --- the run ------------------------------------------------------------------------------------------

    async def run(self, plans: Sequence[TracePlan]) -> Agents:
        """Start, run the traces under faults, heal, wait for the end of all work, check what is left."""
        progress = ProgressChecker(self.findings)
        progress.calm = not self.plan.faults
        truth = Truth(FAKE_LAYOUT)
        aborts = self.aborts if progress.calm else None
        books = Books(self.terminal, OutputChecker(self.findings), self.cached, progress, aborts, truth)
        agents = Agents(self.gateway, books, VOCAB, self._keeper())
        lives = [self.start(node) for node in ROLES]
        async with asyncio.timeout(START_TIMEOUT_S):
            await asyncio.gather(*(life.ready.wait() for life in lives))
        running = asyncio.ensure_future(agents.run(plans))
        auditing = asyncio.ensure_future(self._audit())
        await self.inject()
        self.weather.heal()
        progress.healed_s = self.healed_s = clock.now_s()
        done, _ = await asyncio.wait([running], timeout=PROGRESS_TIMEOUT_S)
        if not done:
            progress.stuck("some trace")
            self.terminal.finish()
        else:
            running.result()
            await asyncio.sleep(IDLE_S)
            await self._probe(truth)
            await asyncio.sleep(TOLD_S)
            self._check_end(truth)
        auditing.cancel()
        self.bugs.uncaught(self.loop.errors)
        return agents

    def _keeper(self) -> Keeper | None:
        below = self.shape.below
        if below is None:
            return None
        if any(isinstance(fault, Retire) for fault in self.plan.faults):
            # A drain hands a trace's pin to other nodes: then a trace must have one, as a router's has.
            below = msgspec.structs.replace(below, replicas=max(2, below.replicas))
        peers = Peers(self.network.at(ADDRESS))
        return Keeper(self._seed, below, peers, self._stores, self.pins)

    def _stores(self) -> list[tuple[str, str]]:
        return [(self.lives[node].process, self.lives[node].address) for node in FLEET.stores]

    async def _audit(self) -> None:
        while True:
            await asyncio.sleep(AUDIT_S)
            for node in FLEET.stores:
                life = self.lives[node]
                if life.alive and not life.freezes and life.store is not None:
                    self.pins.audit(life.process, life.store)
            if self.one_at_a_time:
                lives = [self.lives[node] for node in FLEET.stores]
                self.pins.audit_fleet([life.store for life in lives if life.alive and life.store is not None])

    async def _probe(self, truth: Truth) -> None:
        """Ask every store for everything that it shows."""
        for node in FLEET.stores:
            life = self.lives[node]
            assert life.store is not None
            assert life.memory is not None
            assert life.ledger is not None
            probing = self.tiers.probe(life.process, life.store, life.memory.buffer, truth, life.ledger.rotten)
            await self.loop.create_task(probing, context=life.context())

    def _engines(self) -> list[FakeEngine]:
        lives = self.graves + [self.lives[node] for node in sorted(self.lives)]
        return [life.engine for life in lives if life.engine is not None]

    def _check_end(self, truth: Truth) -> None:
        self.terminal.finish()
        self.cached.finish(sum(engine.computed_tokens for engine in self._engines()))
        references = ReferenceChecker(self.findings)
        index = IndexChecker(self.findings)
        integrity = IntegrityChecker(self.findings)
        router = self.lives[ROUTER].dispatch
        assert router is not None
        for node in sorted(self.lives):
            life = self.lives[node]
            if life.ledger is not None and life.store is not None:
                life.ledger.contents(truth)
                integrity.check(life.process, life.store.arena.check)
                if life.store.tiering is not None:
                    integrity.check(life.process, life.store.tiering.tier.check)
                check_store(references, life)
                tiering = life.store.tiering
                tiers = [life.store.arena.published()] if tiering is None else tiering.by_tier()
                held = {block: tier for tier, blocks in enumerate(tiers) for block in blocks}
                index.compare(life.process, router.index.held(node), held)
            elif life.host is not None and life.engine is not None:
                integrity.check(life.process, life.engine.check)
                check_worker(references, life)
            else:
                check_router(references, router)
                integrity.check("router", router.traces.check)
        self._check_members(references, router)

    def _check_members(self, references: ReferenceChecker, router: Dispatch) -> None:
        """The newest life of each node is the member, and none that it replaced."""
        for info in router.members.infos():
            references.same("router", f"generation of {info.node}", info.generation, self.lives[info.node].generation)
        references.same("router", "members", len(router.members.infos()), len(ROLES) - 1)
        for life in self.zombies:
            if life.alive and life.membership is not None and life.store is not None:
                references.same(life.process, "joined", life.membership.joined.is_set(), False)
                references.zero(life.process, leases=life.store.arena.leases, followers=len(life.store.feed))

    def counts(self) -> dict[str, int]:
        """Sums over all lives."""
        total: dict[str, int] = {"world.deaths": len(self.graves), "world.zombies": len(self.zombies)}
        total["world.audited"] = self.pins.held
        total["world.pins_recovered"] = self.pins.recovered
        total["world.replicated"] = self.pins.replicated
        total["world.wanted"] = len(self.pins.wanted)
        total["world.drained"] = self.drains.drained
        total["world.drained_blocks"] = self.drains.moved_blocks

        def add(name: str, value: object) -> None:
            if isinstance(value, int):
                total[name] = total.get(name, 0) + value
            elif isinstance(value, dict):
                for key, part in value.items():  # pyright: ignore[reportUnknownVariableType] - counters by outcome
                    add(f"{name}.{key}", part)

        for life in self.graves + self.zombies + list(self.lives.values()):
            parts: list[tuple[str, msgspec.Struct]] = []
            if life.store is not None:
                parts.append(("store", life.store.stats))
                add("store.evicted", life.store.arena.evicted)
                if life.store.tiering is not None:
                    parts += [("tier", life.store.tiering.tier.stats), ("tiering", life.store.tiering.stats)]
                if life.store.neighbours is not None:
                    parts += list(life.store.neighbours.stats.items())
            if life.host is not None:
                parts += [("worker", life.host.stats), ("client", life.host.client.stats)]
            if life.dispatch is not None:
                parts += [("router", life.dispatch.stats), ("retention", life.dispatch.retainer.stats)]
            for name, stats in parts:
                for key, value in msgspec.structs.asdict(stats).items():
                    add(f"{name}.{key}", value)
        return total


def check_store(references: ReferenceChecker, life: Life) -> None:
    """An idle store node holds blocks, and nothing for anybody but the router's subscription."""
    assert life.store is not None
    arena = life.store.arena
    references.zero(
        life.process, leases=arena.leases, reservations=arena.reservations, quarantined=arena.slots_quarantined
    )
    references.same(life.process, "subscriptions", len(life.store.feed), 1)
    tiering = life.store.tiering
    if tiering is not None:
        coming = tiering.promotions.coming
        references.zero(life.process, uncopied=life.store.load().copies_waiting)
        references.zero(life.process, unwritten=tiering.behind, promotions=len(coming), pins=arena.pins)


def check_worker(references: ReferenceChecker, life: Life) -> None:
    """An idle worker holds warm sequences, and nothing else."""
    assert life.host is not None
    assert life.engine is not None
    host, staging = life.host, life.host.client.staging
    load = host.load()
    references.zero(life.process, running=load.running, waiting=load.waiting, jobs=len(host.loop))
    references.same(life.process, "staging buffers", staging.free, staging.count)
    warm = len(host._residency)  # pyright: ignore[reportPrivateUsage] - the other view of what the engine has
    references.same(life.process, "sequences", len(life.engine.sequences), warm)
    assert life.flights is not None
    references.zero(life.process, flights=len(life.flights))


def check_router(references: ReferenceChecker, router: Dispatch) -> None:
    """An idle router counts no step as running, and knows of each trace that it served to its end that it has ended:
    a step that it had lost, or counted twice, would still be open."""
    references.zero("router", running=router.decodes.total + router.prefills.total)
    states = Counter(trace.state for trace in router.traces.all())
    references.zero("router", **{f"{state} traces": count for state, count in states.items() if state != "ended"})


def simulate(
    seed: int,
    *,
    mix: Mix = MIX,
    traces: Sequence[TracePlan] | None = None,
    plan: FaultPlan | None = None,
    prepare: Callable[[World], None] | None = None,
) -> Result:
    """One run of everything.

    ``traces`` and ``plan`` replace the seed's own traces and faults; ``prepare`` may tamper with the world before it
    starts.
    """

    async def main() -> Result:
        world = World(seed, plan)
        if prepare is not None:
            prepare(world)
        root = logging.getLogger()
        root.addHandler(world.bugs)
        try:
            agents = await world.run(traces or make_traces(seed, mix, VOCAB))
        finally:
            root.removeHandler(world.bugs)
        return Result(
            seed=seed,
            findings=tuple(world.findings.lines),
            digest=world.loop.digest(),
            virtual_s=clock.now_s(),
            faults=world.plan.faults,
            finished=agents.finished,
            failed=agents.failed,
            hung_up=agents.hung_up,
            prompt_tokens=world.cached.prompt_tokens,
            cached_tokens=world.cached.claimed_tokens,
            counts=world.counts(),
        )

    return virtual.run(main, seed)

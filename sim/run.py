"""One run: a cluster is built from a seed, hit by faults, healed, and made to prove itself."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from sim import loop as virtual
from sim.bills import check_bills
from sim.checker import OutputChecker, ProgressChecker
from sim.clients import Agents, Books
from sim.ending import check_end, counts
from sim.faults import Fault, FaultPlan, Freeze, Retire, Turn
from sim.keeper import ADDRESS, Keeper
from sim.shape import FLEET, MIX, ROLES
from sim.slot_checker import Truth
from sim.text import VOCAB
from sim.traces import Mix, TracePlan, make_traces
from sim.world import World
from tracehaul.engine.fake import FAKE_LAYOUT
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock

BOOT_TIMEOUT_S = 10.0
PROGRESS_TIMEOUT_S = 400.0
"""From healing to the end of all traces: gaps of half a minute included."""
TOLD_S = 2.0
"""In which the router has heard of what the probes found bad."""
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
            agents = await run(world, traces or make_traces(seed, mix, VOCAB))
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
            counts=counts(world),
        )

    return virtual.run(main, seed)


async def run(world: World, plans: Sequence[TracePlan]) -> Agents:
    """Start, run the traces under faults, heal, wait for the end of all work, check what is left."""
    progress = ProgressChecker(world.findings)
    progress.calm = all(isinstance(fault, Turn) for fault in world.plan.faults)
    truth = Truth(FAKE_LAYOUT)
    aborts = world.aborts if progress.calm else None
    books = Books(world.terminal, OutputChecker(world.findings), world.cached, world.sampled, progress, aborts, truth)
    stood_still = any(isinstance(fault, Freeze) and fault.node in FLEET.routers for fault in world.plan.faults)
    sure = world.database.calm and not stood_still
    agents = Agents(world.gateway, books, world.shape.engine.model, _keeper(world), sure=sure)
    lives = [world.start(node) for node in ROLES]
    async with asyncio.timeout(BOOT_TIMEOUT_S):
        await asyncio.gather(*(life.ready.wait() for life in lives))
    running = asyncio.ensure_future(agents.run(plans))
    auditing = asyncio.ensure_future(_audit(world))
    await world.inject()
    world.weather.heal()
    progress.healed_s = world.healed_s = clock.now_s()
    done, _ = await asyncio.wait([running], timeout=PROGRESS_TIMEOUT_S)
    if not done:
        progress.stuck("some trace")
        world.terminal.finish()
    else:
        running.result()
        await asyncio.sleep(IDLE_S)
        await _probe(world, truth)
        await asyncio.sleep(TOLD_S)
        # Two routers may have served a trace at once where they could not hear of each other: one of them keeps it.
        check_end(world, truth, agents.unheard | world.unheard, {} if sure else agents.last_at, sure=sure)
        for life in world.lives.values():
            if life.keeper is not None:
                await life.keeper.flush()
        world.bills = await check_bills(world.findings, world.documents, world.engines())
    auditing.cancel()
    world.bugs.uncaught(world.loop.errors)
    return agents


def _keeper(world: World) -> Keeper | None:
    below = world.shape.below
    if below is None:
        return None
    if any(isinstance(fault, Retire) for fault in world.plan.faults):
        # A drain hands a trace's pin to other nodes: then a trace must have one, as a router's has.
        below = msgspec.structs.replace(below, replicas=max(2, below.replicas))
    peers = Peers(world.network.at(ADDRESS))
    return Keeper(world.seed, below, peers, lambda: _stores(world), world.pins)


def _stores(world: World) -> list[tuple[str, str]]:
    return [(world.lives[node].process, world.lives[node].address) for node in FLEET.stores]


async def _audit(world: World) -> None:
    while True:
        await asyncio.sleep(AUDIT_S)
        for node in FLEET.stores:
            life = world.lives[node]
            if life.alive and not life.freezes and life.store is not None:
                world.pins.audit(life.process, life.store)
        if world.one_at_a_time:
            lives = [world.lives[node] for node in FLEET.stores]
            world.pins.audit_fleet([life.store for life in lives if life.alive and life.store is not None])
        if all(isinstance(fault, Turn) for fault in world.plan.faults):
            services = [life.worker.service for life in world.lives.values() if life.worker is not None]
            world.roles.audit([(service.node.role, service.closed) for service in services])


async def _probe(world: World, truth: Truth) -> None:
    """Ask every store for everything that it shows."""
    for node in FLEET.stores:
        life = world.lives[node]
        assert life.store is not None
        assert life.memory is not None
        assert life.ledger is not None
        probing = world.tiers.probe(life.process, life.store, life.memory.buffer, truth, life.ledger.rotten)
        await world.loop.create_task(probing, context=life.context())

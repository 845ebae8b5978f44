"""What must hold of a simulated cluster when all work has ended and every timeout has passed; and what it did."""

from collections import Counter
from collections.abc import Collection, Mapping

import msgspec

from records.base import TraceName
from router.dispatch.dispatch import Dispatch
from sim.checker import IndexChecker, IntegrityChecker, ReferenceChecker
from sim.nodes import Life
from sim.records import written
from sim.shape import ROLES, ROUTERS
from sim.slot_checker import Truth
from sim.world import World
from tracehaul.engine.fake import FakeEngine
from tracehaul.wire.cluster import Viewer
from tracehaul.wire.ids import NodeId, TraceId


def _engines(world: World) -> list[FakeEngine]:
    lives = world.graves + [world.lives[node] for node in sorted(world.lives)]
    return [life.engine for life in lives if life.engine is not None]


def check_end(
    world: World, truth: Truth, unheard: Collection[TraceId], last_at: Mapping[TraceId, str], *, sure: bool
) -> None:
    """Write into the world's findings what does not hold.

    Args:
        world: after the run.
        truth: what clients know.
        unheard: traces of whose last step the router may not have heard.
        last_at: the life of a router that served the last step of a trace; others may never hear of that.
        sure: all routers stood and the database answered, throughout.
    """
    world.terminal.finish()
    world.cached.finish(sum(engine.computed_tokens for engine in _engines(world)))
    references = ReferenceChecker(world.findings)
    index = IndexChecker(world.findings)
    integrity = IntegrityChecker(world.findings)
    routers = {node: dispatch for node in ROUTERS if (dispatch := world.lives[node].dispatch) is not None}
    assert len(routers) == len(ROUTERS)
    for node in sorted(world.lives):
        life = world.lives[node]
        if life.ledger is not None and life.store is not None:
            life.ledger.contents(truth)
            integrity.check(life.process, life.store.arena.check)
            if life.store.tiering is not None:
                integrity.check(life.process, life.store.tiering.tier.check)
            check_store(references, life)
            tiering = life.store.tiering
            tiers = [life.store.arena.published()] if tiering is None else tiering.by_tier()
            held = {block: tier for tier, blocks in enumerate(tiers) for block in blocks}
            for router in routers.values():
                index.compare(life.process, router.index.held(node), held)
        elif life.host is not None and life.engine is not None:
            integrity.check(life.process, life.engine.check)
            check_worker(references, life)
        else:
            apart = {trace for trace, process in last_at.items() if process != life.process}
            check_router(references, routers[node], unheard, _elsewhere(world, node) | apart, sure=sure)
            integrity.check(node, routers[node].traces.check)
    _check_members(world, references, routers)
    check_records(references, world)


def _check_members(world: World, references: ReferenceChecker, routers: dict[NodeId, Dispatch]) -> None:
    """The newest life of each node is the member of every router, and known to who needs it; none that it replaced."""
    for name, router in routers.items():
        for info in router.members.infos():
            references.same(name, f"generation of {info.node}", info.generation, world.lives[info.node].generation)
            worker = world.lives[info.node].worker
            if worker is not None:
                own = worker.service.node
                said = (info.role, info.role_epoch, router.members.load(info.node).turning)
                references.same(name, f"the role of {info.node}", said, (own.role, own.role_epoch, ""))
            load = router.members.load(info.node)
            references.same(name, f"whether {info.node} serves, and why not", (load.serving, load.fault), (True, ""))
        references.same(name, "members", len(router.members.infos()), len(ROLES) - len(ROUTERS))
    roles = {life.worker.service.node.role for life in world.lives.values() if life.worker is not None}
    references.same("fleet", "roles", roles, {"prefill", "decode"})
    for node, life in world.lives.items():
        if life.membership is None:
            continue
        known = {info.node: info.generation for info in life.membership.members.nodes}
        viewer = Viewer(life.membership.info.role, life.membership.info.pool)
        others = [other.membership.info for other in world.lives.values() if other.membership is not None]
        needed = {info.node: info.generation for info in others if viewer.needs(info)}
        references.same(node, "known nodes", known, needed)
    for life in world.zombies:
        if life.alive and life.membership is not None and life.store is not None:
            references.same(life.process, "joined", life.membership.joined.is_set(), False)
            references.zero(life.process, leases=life.store.arena.leases, followers=len(life.store.feed))


def check_store(references: ReferenceChecker, life: Life) -> None:
    """An idle store node holds blocks, and nothing for anybody but the routers' subscriptions."""
    assert life.store is not None
    arena = life.store.arena
    references.zero(
        life.process, leases=arena.leases, reservations=arena.reservations, quarantined=arena.slots_quarantined
    )
    references.same(life.process, "subscriptions", len(life.store.feed), len(ROUTERS))
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
    warm = len(host.residency)
    references.same(life.process, "sequences", len(life.engine.sequences), warm)
    assert life.flights is not None
    references.zero(life.process, flights=len(life.flights))


def _elsewhere(world: World, node: NodeId) -> set[TraceId]:
    """Traces that another router writes: one that lost them may not have heard of that."""
    return {TraceId(name.trace) for name, head in world.database.tables.heads.items() if head.router != node}


def check_router(
    references: ReferenceChecker,
    router: Dispatch,
    unheard: Collection[TraceId],
    elsewhere: Collection[TraceId],
    *,
    sure: bool,
) -> None:
    """An idle router counts no step as running, and knows of each trace that it served to its end that it has ended:
    a step that it had lost, or counted twice, would still be open. Not so where it is not ``sure``, as the database
    did not tell what it had done: whose writing is refused forgets a trace, and reads it as it was before its end."""
    running = sum(pool.all.decodes.total + pool.all.prefills.total for pool in router.pools.values())
    references.zero("router", running=running)
    states = Counter(
        trace.state for trace in router.traces.all() if trace.trace not in unheard and trace.trace not in elsewhere
    )
    over = ("ended",) if sure else ("ended", "acting", "suspended")
    references.zero("router", **{f"{state} traces": count for state, count in states.items() if state not in over})


def check_records(references: ReferenceChecker, world: World) -> None:
    """What a next life would know of each trace is what its writer knows, and that is one of the routers that live."""
    for node in ROUTERS:
        router = world.lives[node].router
        assert router is not None
        assert router.journal is not None
        references.zero(node, behind=router.journal.behind, failing=router.journal.failing)
    tables = world.database.tables
    found = written(tables)
    references.same("records", "traces", {TraceName(*key) for key in found}, set(tables.heads))
    for key, told in found.items():
        head = tables.heads[TraceName(*key)]
        life = world.lives[NodeId(head.router)]
        references.same(f"records of {key[1]}", "writer", head.life, life.process)
        if life.dispatch is not None and head.life == life.process:
            references.same(f"records of {key[1]}", "value", told.trace, life.dispatch.traces.get(key))


def counts(world: World) -> dict[str, int]:
    """What the cluster did: sums over all lives."""
    total: dict[str, int] = {"world.deaths": len(world.graves), "world.zombies": len(world.zombies)}
    total["world.audited"] = world.pins.held
    total["world.sampled_on"] = world.sampled.again
    total["world.pins_recovered"] = world.pins.recovered
    total["world.replicated"] = world.pins.replicated
    total["world.wanted"] = len(world.pins.wanted)
    total["records.failed"] = world.database.failed
    total["world.drained"] = world.drains.drained
    total["world.drained_blocks"] = world.drains.moved_blocks

    def add(name: str, value: object) -> None:
        if isinstance(value, int):
            total[name] = total.get(name, 0) + value
        elif isinstance(value, dict):
            for key, part in value.items():  # pyright: ignore[reportUnknownVariableType] - counters by outcome
                add(f"{name}.{key}", part)

    for life in world.graves + [zombie for zombie in world.zombies if zombie.alive] + list(world.lives.values()):
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
        if life.router is not None:
            parts += list(life.router.stats.items())[2:]
        if life.dispatch is not None:
            parts += [("router", life.dispatch.stats), ("retention", life.dispatch.retainer.stats)]
        for name, stats in parts:
            for key, value in msgspec.structs.asdict(stats).items():
                add(f"{name}.{key}", value)
    return total

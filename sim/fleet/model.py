"""The fleet: places steps by a policy, moves their KV, and counts what came of it. Pure."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol

import msgspec

from router.dispatch.inflight import InFlight
from router.fleet.index import Index
from router.fleet.load import Key, Warm, WorkerTable
from router.policy.cost import OutputLengths
from router.policy.placement import Placement
from sim.fleet.clock import Clock
from sim.fleet.life import Trace
from sim.fleet.shape import Shape, WorkerKind
from sim.fleet.store import Store
from sim.fleet.worker import Host, Job, Worker
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.hashing import weight
from tracehaul.wire.ids import BlockHash, Generation, NodeId

LIFE = Generation(1)
HEARTBEAT_S = 1.0


class Watch(Protocol):
    """Told of steps."""

    def placed(self, trace: Trace, placement: Placement) -> None:
        """One was."""
        ...

    def ended(self, trace: Trace, seconds: float) -> None:
        """One has, after so long; before its trace goes on."""
        ...


class Routing(Protocol):
    """Says where steps run."""

    name: str
    private: bool
    """Each worker has a part of the stores' memory for itself, and nobody else reads it."""
    shrinks: bool
    """As in :class:`sim.fleet.worker.Worker`."""

    def place(self, fleet: "Fleet", trace: Trace, hashes: Sequence[BlockHash]) -> Placement:
        """Where the trace's step runs."""
        ...


@dataclass
class Tally:
    """What was done since it was last emptied."""

    since_s: float = 0.0
    steps: int = 0
    in_time: int = 0
    """Of them, those that met their deadlines."""
    traces: float = 0.0
    """In parts: a step is what it takes of the work of a trace, on the mean."""
    prompt: float = 0.0
    cached: float = 0.0
    pulled: float = 0.0
    output: float = 0.0
    ttft_s: list[float] = field(default_factory=list[float])
    """Since a step was sent to a worker."""
    asked_s: list[float] = field(default_factory=list[float])
    """Until the first token, since the step was asked for first, whether or not it was let in."""
    step_s: list[float] = field(default_factory=list[float])
    reasons: Counter[str] = field(default_factory=Counter[str])


class Fleet:
    """Workers and stores under one routing."""

    def __init__(self, shape: Shape, routing: Routing, clock: Clock) -> None:
        self.shape = shape
        self.clock = clock
        self.tally = Tally()
        self.index = Index()
        self.decodes = WorkerTable()
        self.prefills = WorkerTable()
        self.workers: dict[Key, Worker] = {}
        self.rows: dict[Key, int] = {}
        self.routing = routing
        self._kind = next(kind for kind in shape.workers if kind.role == "decode")
        self.ended: Callable[[Trace], None] = lambda trace: None
        """Told when a trace's step has ended."""
        self.computed: Callable[[Trace], None] = lambda trace: None
        """Told when its first token is there."""
        self.watch: Watch | None = None
        self.outputs = OutputLengths()
        self.shares: dict[int, float] = {}
        """What each call (by its id in memory) is of a trace's work."""
        self._infos: dict[str, list[NodeInfo]] = {"decode": [], "prefill": []}
        for kind in shape.workers:
            self._make(kind)
        self.stores: dict[NodeId, Store] = {}
        for kind in shape.stores:
            for _ in range(kind.count):
                node = NodeId(f"store-{len(self.stores)}")
                self.stores[node] = Store(node, kind, shape.block_tokens, None if routing.private else self.index)
        self.names = list(self.stores)
        self._homes: dict[str, NodeId] = {}
        self._beat()

    def _make(self, kind: WorkerKind) -> None:
        host = Host()
        for number in range(kind.count):
            if number % kind.host_workers == 0:
                host = Host()
            infos = self._infos[kind.role]
            key = Key(NodeId(f"{kind.role}-{len(infos)}"), LIFE)
            infos.append(self._info(key, kind))
            self.rows[key] = len(self.workers)
            self.workers[key] = Worker(kind, self.clock, host, shrinks=self.routing.shrinks)

    @staticmethod
    def _info(key: Key, kind: WorkerKind) -> NodeInfo:
        limits = WorkerLimits(
            kind.kv_tokens, kind.sequences_max, 256, kind.chunk_tokens, kind.local_prefill_tokens, kind.stretch
        )
        return NodeInfo(*key, kind.role, "", limits=limits, rates=kind.rates)

    def _beat(self) -> None:
        self._sync()
        self.clock.after(HEARTBEAT_S, self._beat)

    def _sync(self) -> None:
        for role, table in (("decode", self.decodes), ("prefill", self.prefills)):
            infos = self._infos[role]
            table.sync(infos, [self._load(self.workers[Key(info.node, info.generation)]) for info in infos])

    def leave(self, key: Key) -> None:
        """A worker is given nothing new."""
        for infos in self._infos.values():
            infos[:] = [info for info in infos if Key(info.node, info.generation) != key]
        self._sync()

    def take(self, key: Key, role: Literal["prefill", "decode"]) -> None:
        """A worker that was given nothing new takes a role, with all that it has."""
        worker = self.workers[key]
        worker.kind = msgspec.structs.replace(worker.kind, role=role)
        self._infos[role].append(self._info(key, worker.kind))
        self._sync()

    @staticmethod
    def _load(worker: Worker) -> NodeLoad:
        kind = worker.kind
        return NodeLoad(
            token_s=kind.token_s,
            pair_s=kind.pair_s,
            decode_s=worker.decode_s,
            pull_token_s=kind.pull_token_s,
            shared=kind.shared,
            free_tokens=max(0, int(worker.free_tokens)),
        )

    def own_store(self, key: Key) -> Store | None:
        """The store node that a worker reads: its own part of the memory, where that is private."""
        return self.stores[self.names[self.rows[key] % len(self.names)]] if self.names else None

    def home(self, trace: Trace) -> NodeId | None:
        """The store node that takes a trace's blocks, by rendezvous hashing."""
        root = trace.root
        if root.home is None and self.names:
            root.home = max(self.names, key=lambda store: weight(store, root.name))
        return root.home

    # --- steps ------------------------------------------------------------------------------------------------

    def step(self, trace: Trace) -> None:
        """Run the trace's next step."""
        trace.held = {row: min(held, trace.call.keeps) for row, held in trace.held.items()}
        if trace.warm is not None:
            kept = min(trace.warm.retained_tokens, trace.call.keeps)
            trace.warm = Warm(trace.warm.node, trace.warm.generation, kept)
        placement = self.routing.place(self, trace, trace.cut())
        self.tally.reasons[placement.reason] += 1
        if self.watch is not None:
            self.watch.placed(trace, placement)
        _Step(self, trace, placement).begin()

    def takes_s(self, trace: Trace) -> float:
        """Computing the trace's next prompt, as far as nobody has it."""
        call, size = trace.call, self.shape.block_tokens
        have = 0 if trace.warm is None else min(trace.warm.retained_tokens, call.keeps)
        stored = self.index.match(trace.cut()).blocks * size if self.stores else 0
        have = max(have, call.keeps if stored + size > call.keeps else stored)
        return self._kind.compute_s(have, call.prompt)

    def pull(self, worker: Worker, store: Store, memory: float, disk: float) -> float:
        """When so many tokens have come to a worker."""
        now_s = self.clock.now_s
        if disk:
            store.disk_free_s = max(now_s, store.disk_free_s) + disk * store.kind.disk_token_s
        worker.link_free_s = max(now_s, worker.link_free_s) + (memory + disk) * worker.kind.pull_token_s
        store.link_free_s = max(now_s, store.link_free_s) + (memory + disk) * store.kind.link_token_s
        raised_s = store.disk_free_s if disk else 0.0
        return max(worker.link_free_s, store.link_free_s, raised_s) + worker.kind.pull_s

    def over(self, trace: Trace) -> None:
        """It has ended: what it has on workers is free."""
        workers = list(self.workers.values())
        for row in trace.held:
            workers[row].forget(trace.name)

    def place_context(self, trace: Trace, key: Key, hashes: Sequence[BlockHash]) -> None:
        """A trace's last step was there, and what it left is in that worker's part of the host memory."""
        store = self.own_store(key)
        if store is not None:
            store.put(hashes)
        trace.warm = Warm(*key, 0)
        trace.held[self.rows[key]] = 0.0


class _Step:
    """One step's way through the fleet."""

    def __init__(self, fleet: Fleet, trace: Trace, placement: Placement) -> None:
        self._fleet = fleet
        self._trace = trace
        self._placement = placement
        self._hashes = trace.hashes
        self._call = trace.call
        self._began_s = fleet.clock.now_s
        self._worker = fleet.workers[placement.decode]
        self._row = fleet.rows[placement.decode]
        self._books = InFlight((fleet,), placement, fleet.clock.now_s, trace.call.prompt)
        self._reach = 0.0
        self._again = False
        self._told = False

    def begin(self) -> None:
        """Send it to its worker."""
        fleet, call = self._fleet, self._call
        keeps = self._trace.held.get(self._row, 0.0)
        job = Job(
            self._trace.name,
            call.prompt,
            call.output,
            keeps,
            self._entered,
            self._computed,
            self._over,
            self._suspended,
        )
        job.rank = fleet.clock.now_s
        fleet.clock.after(self._worker.kind.step_s, lambda: self._worker.submit(job))

    def _stored(self, key: Key, have: float, job: Job) -> tuple[Store | None, float, float]:
        """Whence it pulls, up to where, and how much of that from disk. Tokens."""
        fleet, limit = self._fleet, self._placement.pull_tokens
        most = job.length - 1 if self._again else self._call.keeps if self._trace.task.scoped else job.length - 1
        if limit is not None and not self._again:
            most = min(most, limit)
        if not fleet.stores or most <= have:
            return None, have, 0.0
        if fleet.routing.private:
            store = fleet.own_store(key)
        else:
            by_node = fleet.index.match(self._hashes).by_node
            store = fleet.stores[max(by_node, key=by_node.__getitem__)] if by_node else None
        if store is None:
            return None, have, 0.0
        size = fleet.shape.block_tokens
        first = int(have // size)
        blocks, _ = store.leading(self._hashes)
        _, below = store.leading(self._hashes[first:blocks])
        end = job.length if blocks == len(self._hashes) else blocks * size
        if most - end < size and self._again is False and self._trace.task.scoped and end >= most // size * size:
            end = most  # the tail of what it continues
        return store, max(have, min(end, most)), float(below * size)

    def _entered(self, job: Job) -> None:
        fleet = self._fleet
        store, end, disk = self._stored(self._placement.decode, job.have, job)
        when_s = fleet.clock.now_s
        if store is not None and end > job.have:
            disk = min(disk, end - job.have)
            when_s = fleet.pull(self._worker, store, end - job.have - disk, disk)
            if not self._again:
                fleet.tally.pulled += end - job.have
            store.put(self._hashes[: int(end // fleet.shape.block_tokens)])
        if not self._again:
            self._reach = end
        fleet.clock.at(when_s, lambda: self._assembled(job, end))

    def _assembled(self, job: Job, end: float) -> None:
        helper, kind = self._placement.helper, self._worker.kind
        if helper is None or self._again or job.length - end <= kind.local_prefill_tokens or job.gone:
            self._worker.assembled(job, end)
            return
        fleet = self._fleet
        there = fleet.workers[helper]

        def computed(_: Job) -> None:
            rest = (job.length - end) % there.kind.chunk_tokens + 1  # the rest was pulled while it was computed
            fleet.clock.at(fleet.clock.now_s + rest * kind.pull_token_s + kind.pull_s, lambda: self._worker.handed(job))

        def entered(other: Job) -> None:
            store, reach, disk = self._stored(helper, max(other.have, 0.0), other)
            reach = max(reach, other.have)
            when_s = fleet.clock.now_s
            if store is not None and reach > other.have:
                when_s = fleet.pull(there, store, reach - other.have - disk, disk)
            self._reach = max(self._reach, reach)
            fleet.clock.at(when_s, lambda: there.assembled(other, reach))

        prompt = Job(self._trace.name, job.length, 1, 0.0, entered, computed, lambda _: None, lambda _: None)
        prompt.rank = fleet.clock.now_s
        there.submit(prompt)

    def _computed(self, job: Job) -> None:
        if self._told:
            return
        self._told = True
        fleet, tally = self._fleet, self._fleet.tally
        self._books.token(fleet.clock.now_s)
        tally.ttft_s.append(fleet.clock.now_s - self._began_s)
        tally.prompt += self._call.prompt
        self._trace.cached = min(self._reach, self._call.prompt - 1)
        tally.cached += self._trace.cached
        tally.asked_s.append(fleet.clock.now_s - min(self._trace.asked_s, self._began_s))
        self._trace.asked_s = inf
        fleet.computed(self._trace)

    def _suspended(self, job: Job) -> None:
        self._again = True
        self._keep()

    def _keep(self) -> None:
        """What it has computed is in a store."""
        fleet = self._fleet
        if not fleet.stores:
            return
        home = fleet.home(self._trace)
        store = (
            fleet.own_store(self._placement.decode) if fleet.routing.private else fleet.stores[home] if home else None
        )
        if store is not None:
            new = store.put(self._hashes) * fleet.shape.block_tokens
            store.link_free_s = max(fleet.clock.now_s, store.link_free_s) + new * store.kind.link_token_s

    def _over(self, job: Job) -> None:
        fleet, trace, tally = self._fleet, self._trace, self._fleet.tally
        self._books.ended()
        self._keep()
        trace.warm = Warm(*self._placement.decode, int(job.length) - 1)
        trace.held[self._row] = job.length - 1
        tally.steps += 1
        tally.in_time += fleet.clock.now_s - self._began_s <= self._call.deadline_s
        tally.traces += fleet.shares.get(id(self._call), 0.0)
        tally.output += self._call.output
        fleet.outputs.ended(self._call.output)
        tally.step_s.append(fleet.clock.now_s - self._began_s)
        if fleet.watch is not None:
            fleet.watch.ended(trace, fleet.clock.now_s - self._began_s)
        fleet.ended(trace)

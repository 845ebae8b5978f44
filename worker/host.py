"""A worker, whatever its role: an engine, the sequences on it, and its way to the store."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from itertools import count

from kvstore.client.client import StoreClient
from tracehaul.engine.base import Engine, SequenceId
from tracehaul.runtime import clock, deadline
from tracehaul.runtime.finish import finish
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import ContextTooLong, Overloaded, Unavailable
from tracehaul.wire.hashing import TOKEN_BYTES, extend_chain, salted, token_count
from tracehaul.wire.ids import BlockHash, NodeId, TraceId
from worker.config import WorkerConfig
from worker.context import Context
from worker.families import Families
from worker.flights import Flights
from worker.iteration import IterationLoop, usable_context
from worker.job import Job
from worker.meter import Account, Meter
from worker.pressure import Arrival, Line
from worker.residency import Residency, Resident
from worker.scheduler import Scheduler
from worker.stats import WorkerStats
from worker.writer import BlockWriter

Acquired = tuple[SequenceId, int, Sequence[BlockHash]]
"""A busy sequence, how many of a step's tokens it holds already, and the hashes of those, and more."""


class WorkerHost:
    """What prefill and decode services share. One per process. ``shared`` as in :class:`NodeLoad`."""

    def __init__(self, engine: Engine, client: StoreClient, config: WorkerConfig, shared: float = 0.0) -> None:
        self.engine = engine
        self.client = client
        self.config = config
        self.stats = WorkerStats()
        self.root = engine.info.layout.root()
        self.meter = Meter()
        scheduler = Scheduler(config.chunk_tokens, config.sequences_max)
        self.loop = IterationLoop(engine, scheduler, self._make_room, self.meter)
        token_bytes = engine.info.layout.token_bytes
        self.residency = Residency(
            lambda one: self.meter.rests(one.sequence, one.salt, one.trace, one.length * token_bytes, clock.now_s()),
            lambda one: self.meter.rested(one.sequence, clock.now_s()),
        )
        self._line = Line()
        self._families = Families()
        self.flights = Flights()
        self._room = asyncio.Event()
        """Set when there may be memory for somebody in the line."""
        self._arrivals = count()
        self._leave_before = 0
        self._background: set[SequenceId] = set()
        """Busy sequences of steps of the background."""
        self._shared = shared
        self._running = 0
        self._recalls: dict[tuple[str, TraceId], asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Iterate for ever; cancel to stop."""
        await self.loop.run()

    def set_nodes(self, nodes: Sequence[NodeInfo], draining: Collection[NodeId] = ()) -> None:
        """Membership changed."""
        stores = [node for node in nodes if node.role == "store"] if self.config.use_store else []
        self.client.set_nodes(stores, draining)

    def leave(self) -> None:
        """All steps that are here end as soon as they can go on elsewhere: what they have is in the store by then."""
        self._leave_before = next(self._arrivals)
        self.loop.leave(self._leave_before)
        self._cut_recalls()
        self._room.set()

    def _stays(self, arrival: Arrival) -> None:
        if arrival.number < self._leave_before:
            raise Unavailable("this worker has another role now: the step goes on elsewhere")

    @asynccontextmanager
    async def taken(self, resident: Resident) -> AsyncGenerator[Context]:
        """One that was taken out of residency, until it is idle again."""
        of, at = (resident.salt, resident.tokens, resident.hashes), (resident.sequence, resident.length)
        context = self._context(Arrival(True, next(self._arrivals)), *of, *at)
        try:
            yield context
        finally:
            self._retire(resident.trace, context)

    def load(self) -> NodeLoad:
        """What is so now."""
        self.loop.meter.aged(clock.now_s())
        info = self.engine.info
        return NodeLoad(
            running=self._running,
            background=len(self._background),
            waiting=len(self._line),
            bytes_used=(info.kv_tokens_max - self.engine.free_tokens) * info.layout.token_bytes,
            bytes_max=info.kv_tokens_max * info.layout.token_bytes,
            **self.loop.meter.rates._asdict(),
            shared=self._shared,
            free_tokens=self.engine.free_tokens,
            up_s=self.meter.up_s(clock.now_s()),
            busy_s=self.meter.busy_s,
            charges=self.meter.charges(clock.now_s()),
        )

    @asynccontextmanager
    async def context(
        self,
        trace: TraceId,
        family: TraceId,
        salt: str,
        packed: bytes,
        capacity: int,
        suspended: Context | None = None,
        *,
        background: bool = False,
        deadline_s: float | None = None,
        account: Account | None = None,
    ) -> AsyncGenerator[Context]:
        """A context with room for ``capacity`` tokens, starting from what is resident; waits for memory.

        At the end its sequence becomes idle and stays warm. The caller must have ended all work on it, and keeps
        ``context.tokens`` equal to the tokens whose KV it computed (it may be longer). A step that was suspended says
        which context it had: it waits before those that came later.

        Raises:
            ContextTooLong: ``capacity`` can never fit.
            Overloaded: too many steps wait already.
            DeadlineExceeded: the deadline has passed, before or while it waited.
        """
        deadline.check(deadline_s)
        longest = usable_context(self.engine.info)
        if token_count(packed) >= longest:
            tokens = token_count(packed)
            message = (
                f"This model's maximum context length is {longest} tokens. However, you requested {tokens + 1} tokens"
            )
            raise ContextTooLong(message)
        capacity = min(capacity, longest)
        if suspended is None:
            arrival = Arrival(background, next(self._arrivals))
        else:
            arrival = suspended.arrival
            self._stays(arrival)
            self.stats.suspended_steps += 1
            self.stats.background_suspended += background
        await self._end_recall(trace, salt)
        sequence, resident_tokens, known = await self._acquire(
            arrival, trace, salt, packed, capacity, deadline_s, may_refuse=suspended is None
        )
        self._running += 1
        if arrival.background:
            self._background.add(sequence)
        came_s = self._families.join((salt, family), clock.now_s() if suspended is None else suspended.came_s)
        context = self._context(arrival, salt, packed, known, sequence, resident_tokens, came_s, deadline_s)
        context.account = account
        try:
            yield context
        finally:
            self._running -= 1
            self._background.discard(sequence)
            self._families.leave((salt, family))
            self._count(context)
            self._retire(trace, context)
            self.loop.freed(arrival)

    def keep(self, trace: TraceId, salt: str, for_s: float) -> int:
        """What is idle here of a trace is worth its memory for so long; returns its longest context's tokens."""
        return self.residency.value(trace, salt, clock.now_s() + for_s)

    async def forget(self, trace: TraceId, salt: str) -> int:
        """Free what is idle here of a trace; returns what is left of it."""
        await self._end_recall(trace, salt)
        for resident in self.residency.forget(trace, salt):
            self.engine.close(resident.sequence)
        self._room.set()
        return 0

    async def recall(self, trace: TraceId, salt: str, packed: bytes, keep_s: float, *, told: bool) -> int:
        """Bring a trace's context back from the store while no step asks for it; returns the tokens that are here then.

        It takes what memory is free or past its time, that of any idle context if ``told``, and gives way to whoever
        waits for memory. Fewer tokens than there are: the store does not have more, or there is no memory, or it gave
        way.
        """
        key = (salt, trace)
        if key not in self._recalls and token_count(packed) < usable_context(self.engine.info):
            task = self._recalls[key] = asyncio.create_task(
                self._recall(trace, salt, packed, worthless=not told), name=f"recall {trace}"
            )
            task.add_done_callback(lambda _: self._recalls.pop(key, None))
            try:
                await asyncio.wait([task])
            finally:
                task.cancel()
            if not task.cancelled():
                task.result()
        return self.keep(trace, salt, keep_s)

    async def _recall(self, trace: TraceId, salt: str, packed: bytes, *, worthless: bool) -> None:
        tokens = token_count(packed)
        taken = self.residency.take_own(trace, salt, packed)
        known: Sequence[BlockHash] = ()
        if taken is not None:
            resident, shared = taken
            if shared == tokens or not self._make_room(resident.sequence, tokens, worthless=worthless):
                self.residency.keep(resident)
                return
            sequence, known = resident.sequence, resident.hashes
            self.engine.truncate(sequence, shared)
        elif self.loop.lacks_memory or len(self._line):
            return
        else:
            shared, sequence = 0, self._try_open(tokens, worthless=worthless)
            if sequence is None:
                return
        context = self._context(Arrival(True, next(self._arrivals)), salt, packed, known, sequence, shared)
        try:
            await context.locate()
            await context.pull(tokens)
        finally:
            self.stats.recalled_tokens += context.length - shared
            self.meter.moved(salt, trace, context.pulled.nbytes, clock.now_s())
            self._retire(trace, context)

    def _cut_recalls(self) -> None:
        """Somebody waits for memory."""
        for recall in self._recalls.values():
            recall.cancel()

    async def _end_recall(self, trace: TraceId, salt: str) -> None:
        """Before a step of the trace: what a recall has brought is resident then."""
        task = self._recalls.get((salt, trace))
        if task is not None:
            task.cancel()
            await finish(asyncio.wait([task]))

    def _context(
        self,
        arrival: Arrival,
        salt: str,
        packed: bytes,
        known: Sequence[BlockHash],
        sequence: SequenceId,
        resident_tokens: int,
        came_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> Context:
        return Context(
            self.engine,
            self.client,
            self.config,
            arrival=arrival,
            came_s=came_s,
            deadline_s=deadline_s,
            salt=salt,
            packed=packed,
            hashes=self._chain(salt, packed, known, resident_tokens),
            sequence=sequence,
            resident_tokens=resident_tokens,
        )

    @asynccontextmanager
    async def job(self, job: Job) -> AsyncGenerator[Job]:
        """A job in the iteration loop; on exit no iteration touches its sequence."""
        key = self.loop.start(job)
        try:
            yield job
        finally:
            await finish(self.loop.stop(key))

    @asynccontextmanager
    async def writer(
        self,
        here: Context,
        home: NodeId | None,
        on_published: Callable[[int], None] | None = None,
        on_ended: Callable[[], None] | None = None,
    ) -> AsyncGenerator[BlockWriter]:
        """Writes a context's blocks back to the store; see there."""
        async with BlockWriter(self.engine, self.client, self.config, here, home, on_published, on_ended) as writer:
            try:
                yield writer
            finally:
                self.stats.write_back_refused += writer.refused != ""

    def _count(self, here: Context) -> None:
        """Add a finished context's pulls to the counters."""
        self.stats.resident_tokens += here.resident_tokens
        self.stats.pulled_tokens += here.pulled.tokens
        self.stats.pulled_bytes += here.pulled.nbytes
        self.stats.pull_s += here.pulled.seconds
        self.stats.missed_blocks += here.pulled.missed_blocks
        self.loop.meter.pulled(here.pulled.tokens, here.pulled.seconds, clock.now_s())

    def _retire(self, trace: TraceId, context: Context) -> None:
        sequence, length = context.sequence, self.engine.length(context.sequence)
        if length == 0 or length > len(context.tokens):
            self.engine.close(sequence)
        else:
            before = min(length, token_count(context.packed))
            packed = context.packed[: before * TOKEN_BYTES] + context.tokens[before:length].tobytes()
            hashes = self._chain(context.salt, packed, context.hashes, before)
            self.residency.keep(Resident(sequence, trace, context.salt, packed, tuple(hashes)))
        self._room.set()

    def _chain(self, salt: str, packed: bytes, known: Sequence[BlockHash], shared_tokens: int) -> list[BlockHash]:
        """Hashes of the full blocks of ``packed``, which begins as what ``known`` are the hashes of."""
        layout = self.engine.info.layout
        return extend_chain(salted(self.root, salt), packed, layout.block_tokens, known, shared_tokens)

    def _make_room(self, sequence: SequenceId, capacity: int, *, worthless: bool = False) -> bool:
        """Grow a busy sequence, evicting idle ones as needed; ``worthless``: only those past their time."""
        if self.engine.capacity(sequence) >= capacity:
            return True
        worthless = worthless or (sequence in self._background and len(self._background) > 1)
        wanted = min(capacity + self.config.headroom_tokens, self.engine.info.context_max)
        while not (self.engine.grow(sequence, wanted) or self.engine.grow(sequence, capacity)):
            if not self._evict(worthless=worthless):
                if not worthless:
                    self._cut_recalls()
                return False
        self._room.set()  # perhaps a running step lacked it, and everybody else waited for that
        return True

    async def _acquire(
        self,
        arrival: Arrival,
        trace: TraceId,
        salt: str,
        packed: bytes,
        capacity: int,
        deadline_s: float | None,
        *,
        may_refuse: bool,
    ) -> Acquired:
        """Wait for a sequence: what runs comes first, then who came first, and the background last.

        Raises:
            Overloaded: ``may_refuse``, and too many wait already.
            DeadlineExceeded: it has not got any by then.
        """
        acquired = self._try_acquire(arrival, trace, salt, packed, capacity)
        if acquired is not None:
            return acquired
        if may_refuse and self._line.before(arrival) >= self.config.waiting_max:
            raise Overloaded(f"{len(self._line)} steps wait for KV memory")
        self._line.join(arrival)
        try:
            with self.loop.wanted(arrival):
                async with deadline.until(deadline_s):
                    while (acquired := self._try_acquire(arrival, trace, salt, packed, capacity)) is None:
                        self._cut_recalls()
                        self._room.clear()
                        await self._room.wait()
                        self._stays(arrival)
            return acquired
        finally:
            self._line.leave(arrival)
            self._room.set()

    def _try_acquire(
        self, arrival: Arrival, trace: TraceId, salt: str, packed: bytes, capacity: int
    ) -> Acquired | None:
        """A warm sequence waits for no turn, unless it is the background's: it takes little from those in the line."""
        first = self._line.is_first(arrival)
        if self.loop.holds_up(arrival) or (arrival.background and not first):
            return None
        taken = self.residency.take(trace, salt, packed)
        if taken is not None:
            resident, shared = taken
            kept = min(shared, token_count(packed) - 1)
            self.engine.truncate(resident.sequence, kept)
            if self._make_room(resident.sequence, capacity):
                return resident.sequence, kept, resident.hashes
            # Idle sequences are gone by now and busy ones hold the rest: start anew where there will be room.
            self.engine.close(resident.sequence)
            self._room.set()
        worthless = arrival.background and len(self._background) > 0
        sequence = self._try_open(capacity, worthless=worthless) if first else None
        return None if sequence is None else (sequence, 0, ())

    def _try_open(self, capacity: int, *, worthless: bool = False) -> SequenceId | None:
        while (sequence := self.engine.open(capacity)) is None:
            if not self._evict(worthless=worthless):
                return None
        return sequence

    def _evict(self, *, worthless: bool = False) -> bool:
        victim = self.residency.evict(clock.now_s(), worthless=worthless)
        if victim is None:
            return False
        self.stats.evicted_sequences += 1
        self.engine.close(victim.sequence)
        return True

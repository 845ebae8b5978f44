"""The iteration loop: one continuous batch over one engine."""

import asyncio
import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

from tracehaul.engine.base import CutShort, Engine, EngineInfo, Result, SequenceId, Work
from tracehaul.runtime import clock, deadline
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import ClusterError, InvalidRequest
from worker.job import Computed, Failed, Job, Sampled, Scored, Suspended
from worker.meter import Meter
from worker.pressure import LEAVING_MAX_S, Arrival, Pressure
from worker.rates import STRETCH, RateMeter, compute_s, token_s
from worker.scheduler import Grant, Scheduler

log = Log(__name__)

SCORED_TOKENS_MAX = 128
"""Most tokens of one job that an iteration scores: each takes a row of logits, over the whole vocabulary."""
SLICE_S = 0.05
"""So long an iteration takes at most that computes a prompt of the background: whoever comes waits for its end."""
SLICE_TOKENS_MIN = 16
BESIDE_SHARE = 0.1
"""By so much a prompt of the background may slow others' decode steps."""

MakeRoom = Callable[[SequenceId, int], bool]


class Measured(NamedTuple):
    """An iteration of one sequence."""

    before: int
    """Tokens that it had."""
    tokens: int
    """Computed."""
    seconds: float


def usable_context(info: EngineInfo) -> int:
    """The longest sequence in tokens: what the model supports, if the KV memory holds it."""
    return min(info.context_max, info.kv_tokens_max)


class IterationLoop:
    """Runs iterations while there are jobs; sleeps without them.

    ``make_room(sequence, capacity)`` grows a sequence's memory at whatever cost to idle ones, or returns False. Then
    a job is suspended, and whoever owns its sequence says when that is idle (:meth:`freed`).
    """

    def __init__(self, engine: Engine, scheduler: Scheduler, make_room: MakeRoom, metered: Meter | None = None) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._make_room = make_room
        self.meter = RateMeter()
        self._metered = metered or Meter()
        self._context_max = usable_context(engine.info)
        self._pressure = Pressure()
        self._jobs: dict[int, Job] = {}
        self._next_key = 0
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._planned: frozenset[int] = frozenset()
        """Jobs that the iteration under way may touch, also those that left."""
        self._gives_way = False
        """The iteration under way is the background's alone."""
        self._iteration_ended = asyncio.Event()
        self._iteration_ended.set()
        self._leave_before = 0
        self.iterations = 0
        self.cuts = 0
        """Iterations of the background that ended before their time."""
        self.computed_tokens = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def lacks_memory(self) -> bool:
        """A job waits to grow: what becomes free or idle is for it."""
        return self._pressure.high

    def holds_up(self, arrival: Arrival) -> bool:
        """A job waits to grow that goes before that step."""
        return self._pressure.holds_up(arrival)

    @contextlib.contextmanager
    def wanted(self, arrival: Arrival) -> Generator[None, None, None]:
        """That step waits for memory: those of the background leave for any other."""
        self._pressure.waits(arrival)
        self._wake.set()
        try:
            yield
        finally:
            self._pressure.waits_no_more(arrival)

    def leave(self, before: int) -> None:
        """Jobs of steps whose number is less are suspended, also those that start later."""
        self._leave_before = before
        self._wake.set()

    def freed(self, arrival: Arrival) -> None:
        """That step's sequence is idle or closed."""
        self._pressure.left(arrival)
        self._wake.set()

    def start(self, job: Job) -> int:
        """Add a job; returns its key. There must be a pending token. One past its deadline has failed at once."""
        key = self._next_key
        self._next_key += 1
        self._jobs[key] = job
        at_most = None if job.scores_top is None else SCORED_TOKENS_MAX
        rates, background = self.meter.rates, job.arrival.background
        if background:
            slice_tokens = int(SLICE_S / token_s(rates, len(job.tokens)))
            at_most = min(at_most or slice_tokens, max(SLICE_TOKENS_MIN, slice_tokens))
        rank = job.came_s + STRETCH * compute_s(rates, job.computed, len(job.tokens))
        self._scheduler.add(key, len(job.tokens) - job.computed, at_most, rank=rank, background=background)
        if job.deadline_s is not None:
            # No turn is needed to leave: it may wait for memory, or behind others.
            at_s, late = job.deadline_s, deadline.exceeded()
            self._deadlines[key] = asyncio.get_running_loop().call_at(at_s, self._fail, key, late)
            if at_s <= clock.now_s():
                self._fail(key, late)
        if self._gives_way and not background:
            self._engine.cut()
        self._wake.set()
        return key

    async def stop(self, key: int) -> None:
        """Remove a job, ended or not. On return no iteration touches its sequence."""
        self._drop(key)
        if key in self._planned:
            await self._iteration_ended.wait()

    async def calibrate(self, tokens_max: int) -> list[Measured]:
        """Measure the engine on a prompt of no meaning; nothing if it does not fit. Not while :meth:`run` runs."""
        tokens = [0] * min(tokens_max, self._context_max // 2 - 1)
        sequence = self._engine.open(2 * len(tokens) + 1) if len(tokens) > 1 else None
        if sequence is None:
            return []
        measured: list[Measured] = []
        for part in (tokens, tokens, tokens[:1]):
            length, started_s = self._engine.length(sequence), clock.now_s()
            await self._engine.run([Work(sequence, part)])
            measured.append(Measured(length, len(part), clock.now_s() - started_s))
        self._engine.close(sequence)
        self.learn(measured)
        return measured

    def learn(self, measured: Sequence[Measured]) -> None:
        """Take over what was measured of an engine as fast as this one."""
        for one in measured:
            self.meter.iterated([(one.before, one.tokens)], one.seconds)

    async def run(self) -> None:
        """For ever; cancel to stop."""
        while True:
            while not self._jobs:
                self._wake.clear()
                await self._wake.wait()
            self._wake.clear()
            if not await self._iterate() and self._jobs:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEAVING_MAX_S):
                        await self._wake.wait()

    def _drop(self, key: int) -> None:
        job = self._jobs.pop(key, None)
        self._scheduler.remove(key)
        timer = self._deadlines.pop(key, None)
        if timer is not None:
            timer.cancel()
        if job is not None:
            self._pressure.has(job.arrival)
            self._wake.set()

    def _fail(self, key: int, error: ClusterError) -> None:
        job = self._jobs.get(key)
        self._drop(key)
        if job is not None:
            job.events.put_nowait(Failed(error))

    async def _iterate(self) -> bool:
        """Whether anything was computed."""
        self._iteration_ended.clear()
        try:
            computed = await self._compute()
        finally:
            self._planned = frozenset()
            self._iteration_ended.set()
        self.iterations += bool(computed)
        for grant, job, result in computed:
            self._settle(grant, job, result)
        return bool(computed)

    async def _compute(self) -> list[tuple[Grant, Job, Result]]:
        rates = self.meter.rates
        plan = self._scheduler.plan(beside=int(BESIDE_SHARE * rates.decode_s / rates.token_s))
        self._planned = frozenset(grant.key for grant in plan)
        fitting = await self._fitting(plan)
        self._relieve()
        # Some may have left while another grew, or for it.
        grants = [(grant, job) for grant, job in fitting if grant.key in self._jobs]
        work = [self._work(grant, job) for grant, job in grants]
        if not work:
            return []
        started_s = clock.now_s()
        self._gives_way = all(job.arrival.background for _, job in grants)
        results: list[Result] | None = None
        try:
            results = await self._engine.run(work)
        except CutShort:
            self.cuts += 1
        except ClusterError as error:
            for grant, _ in grants:
                self._fail(grant.key, error)
            return []
        except Exception as error:
            log.error("iteration failed: its steps end here", error=error)
            for grant, _ in grants:
                self._fail(grant.key, ClusterError("the engine failed in an iteration"))
            return []
        finally:
            self._gives_way = False
            now_s = clock.now_s()
            shared = [(job.account, job.computed, grant.tokens) for grant, job in grants]
            self._metered.iterated(shared, now_s - started_s, rates, now_s)
        if results is None:
            for grant, job in grants:
                self._ended_by_budget(grant, job)
            return []
        self.meter.iterated([(job.computed, grant.tokens) for grant, job in grants], now_s - started_s)
        return [(grant, job, result) for (grant, job), result in zip(grants, results, strict=True)]

    async def _fitting(self, grants: list[Grant]) -> list[tuple[Grant, Job]]:
        """Those whose sequences have room for what is granted, or could be given it."""
        fitting: list[tuple[Grant, Job]] = []
        for grant in grants:
            job = self._jobs.get(grant.key)
            if job is None:
                continue  # left while another waited to grow
            end = job.computed + grant.tokens
            fits = self._engine.capacity(job.sequence) >= end
            if not fits:
                async with job.copying:
                    fits = self._make_room(job.sequence, end)
            if fits:
                self._pressure.has(job.arrival)
                fitting.append((grant, job))
            elif grant.key in self._jobs:
                self._pressure.lacks(job.arrival)
        return fitting

    def _relieve(self) -> None:
        """Let those leave that have to; if a job lacks memory, one."""
        for key in [key for key, job in self._jobs.items() if job.arrival.number < self._leave_before]:
            self._suspend(key)
        keys = {job.arrival: key for key, job in self._jobs.items()}
        arrival = self._pressure.suspend(keys, clock.now_s())
        if arrival is not None:
            self._suspend(keys[arrival])

    def _suspend(self, key: int) -> None:
        job = self._jobs[key]
        self._drop(key)
        job.events.put_nowait(Suspended())

    def _work(self, grant: Grant, job: Job) -> Work:
        end = job.computed + grant.tokens
        samples = end == len(job.tokens) and job.samples_max > 0
        return Work(
            sequence=job.sequence,
            tokens=job.tokens[job.computed : end],
            sampling=job.sampling if samples else None,
            emitted=job.emitted,
            history=job.history,
            scoring=job.scoring(end),
            guide=job.guide if samples else None,
        )

    def _settle(self, grant: Grant, job: Job, result: Result) -> None:
        job.computed += grant.tokens
        self.computed_tokens += grant.tokens
        job.events.put_nowait(Computed(job.computed))
        if result.scores:
            job.events.put_nowait(Scored(result.scores))
        if result.error:
            self._fail(grant.key, InvalidRequest(f"the answer cannot go on in its grammar: {result.error}"))
            return
        if result.token is None:
            if job.computed == len(job.tokens):
                self._drop(grant.key)
            else:
                self._goes_on(grant, job, sampled=False)
            return
        reason = job.accept(result.token, self._context_max)
        job.events.put_nowait(Sampled(result.token, reason, result.logprobs))
        if reason is not None or job.samples == job.samples_max:
            self._drop(grant.key)
        else:
            self._goes_on(grant, job, sampled=True)

    def _goes_on(self, grant: Grant, job: Job, *, sampled: bool) -> None:
        if not self._ended_by_budget(grant, job):
            self._scheduler.computed(grant, sampled=sampled)

    def _ended_by_budget(self, grant: Grant, job: Job) -> bool:
        if job.account is None or not job.account.exhausted:
            return False
        self._fail(grant.key, job.account.over())
        return True

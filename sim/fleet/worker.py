"""A worker with its continuous batch, as a fluid: between two events each iteration is like the one before.

Time on a worker is counted in iterations. Each decodes a token of all that decode there, and computes a chunk of the
first prompt that is due, so an iteration takes the sum of both. What follows from that is when the next prompt is
computed, the next sequence ends, or memory is full: only these are events. Pure.
"""

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from itertools import count

from sim.fleet.clock import Clock
from sim.fleet.shape import WorkerKind

NEVER = float("inf")
EPSILON = 1e-7


@dataclass(eq=False)
class Job:
    """One step on one worker. Tokens."""

    trace: Hashable
    length: float
    """Its prompt, with what was generated before it was suspended."""
    output: float
    """Still to be generated."""
    keeps: float
    """Of the prompt, what the trace's context here may be used for."""
    entered: Callable[["Job"], None]
    """It has its memory: to be answered by :meth:`Worker.assembled`."""
    computed: Callable[["Job"], None]
    """Its prompt is, and its first token is there."""
    ended: Callable[["Job"], None]
    """All of it was generated."""
    suspended: Callable[["Job"], None]
    """It gave its memory to others and waits for some."""
    rank: float = 0.0
    """Of its prompt among those that wait; lower comes first."""
    arrival: int = 0
    have: float = 0.0
    """Leading tokens that are here."""
    work_s: float = 0.0
    """Computing that is left of its prompt."""
    chunks: float = 0.0
    """Iterations that this takes."""
    at: float = 0.0
    """The worker's count of iterations when it began to decode, less what it had then."""
    decoding: bool = False
    gone: bool = False


@dataclass
class Host:
    """Cores that several workers share."""

    workers: list["Worker"] = field(default_factory=list["Worker"])
    busy: int = 0


class Worker:
    """One worker. ``shrinks``: an idle context gives way from its end, as far as it must, not as a whole."""

    def __init__(self, kind: WorkerKind, clock: Clock, host: Host, *, shrinks: bool = False) -> None:
        self.kind = kind
        self.link_free_s = 0.0
        self.idle: OrderedDict[Hashable, float] = OrderedDict()
        """Contexts of traces that do nothing here, least recently used first."""
        self.idle_tokens = 0.0
        self.busy_s = 0.0
        self.suspensions = 0
        self._clock = clock
        self._host = host
        host.workers.append(self)
        self._shrinks = shrinks
        self._arrivals = count()
        self._line: list[tuple[int, Job]] = []
        self._entries = count()
        """Tell a job from what it was before it was suspended."""
        self._prompts: list[tuple[float, int, int, Job]] = []
        self._computing: Job | None = None
        self._ends: list[tuple[float, int, int, Job]] = []
        self._decoding = 0
        self._context = 0.0
        self._iterations = 0.0
        self._as_of_s = 0.0
        self._iteration_s = NEVER
        self._held = 0.0
        """KV of what does not grow, and of what grows as of iteration 0."""
        self._jobs: dict[int, Job] = {}
        self._pressed = False
        """A job had to give way, and none has ended since: nobody takes memory."""
        self._plan = 0

    @property
    def free_tokens(self) -> float:
        """KV memory with nothing in it."""
        return self.kind.kv_tokens - self._held - self._decoding * self._iterations - self.idle_tokens

    @property
    def active_tokens(self) -> float:
        """KV memory of what is worked on, with what waits for some."""
        waiting = sum(job.length for _, job in self._line)
        return self._held + self._decoding * self._iterations + waiting

    @property
    def quiet(self) -> bool:
        """Nothing is worked on here, and nothing waits."""
        return not self._jobs and not self._line

    @property
    def waiting(self) -> int:
        """Jobs that wait for memory."""
        return len(self._line)

    @property
    def decode_s(self) -> float:
        """What an iteration that only decodes takes now."""
        if not self._decoding:
            return self.kind.decode_s(1, 0.0)
        turns = max(1.0, self._decoding / self.kind.sequences_max)
        return self.kind.decode_s(self._decoding, self._context) * turns

    # --- jobs -------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """A job comes."""
        assert job.length + min(job.output, self.kind.headroom_tokens) <= self.kind.kv_tokens, "it can never fit"
        self.sync()
        job.arrival = next(self._arrivals)
        if not self._enter(job):
            self._line.append((job.arrival, job))
        self._replan()

    def assembled(self, job: Job, have: float) -> None:
        """Leading tokens of it are here; the rest of its prompt is to be computed."""
        if job.gone:
            return
        self.sync()
        job.have = min(have, job.length - 1)
        self._queue(job, job.have)
        self._replan()

    def handed(self, job: Job) -> None:
        """All of its prompt is here, with its first token, computed elsewhere."""
        if job.gone:
            return
        self.sync()
        job.have = job.length
        self._first(job)
        self._replan()

    def forget(self, trace: Hashable) -> None:
        """Free what is idle of a trace."""
        self.idle_tokens -= self.idle.pop(trace, 0.0)

    def _enter(self, job: Job) -> bool:
        """Give it memory, if there is some, evicting what is idle."""
        kept = self.idle.pop(job.trace, 0.0)
        self.idle_tokens -= kept
        wanted = job.length + min(job.output, self.kind.headroom_tokens)
        warm = kept > 0 or not self._line or self._line[0][0] >= job.arrival
        if self._pressed or not warm or not self._room(wanted):
            return False
        self._held += wanted
        self._jobs[job.arrival] = job
        job.gone = False
        job.have = min(kept, job.keeps)
        job.entered(job)
        return True

    def _room(self, tokens: float) -> bool:
        """Whether so much is free, or can be made so."""
        short = tokens - self.free_tokens
        if short > self.idle_tokens:
            return False
        while short > 0 and self.idle:
            trace, length = self.idle.popitem(last=False)
            given = min(length, short) if self._shrinks else length
            self.idle_tokens -= given
            short -= given
            if given < length:
                self.idle[trace] = length - given
                self.idle.move_to_end(trace, last=False)
        return True

    def _admit(self) -> None:
        """Let in who waits for memory, the first to come first."""
        while self._line:
            _, job = self._line.pop(0)
            if not self._enter(job):
                self._line.insert(0, (job.arrival, job))
                return

    def _queue(self, job: Job, start: float) -> None:
        job.work_s = self.kind.compute_s(start, job.length) + self.kind.prompt_s
        job.chunks = (job.length - start) / self.kind.chunk_tokens
        job.rank += self.kind.stretch * job.work_s
        now = self._computing
        if now is not None and job.rank < now.rank:
            self._pause(now)
        heapq.heappush(self._prompts, (job.rank, job.arrival, next(self._entries), job))
        self._next()

    def _pause(self, job: Job) -> None:
        left = max(0.0, job.at - self._iterations)
        job.work_s *= left / job.chunks
        job.chunks = left
        heapq.heappush(self._prompts, (job.rank, job.arrival, next(self._entries), job))
        self._computing = None

    def _next(self) -> None:
        """Begin with the next prompt, if none is computed."""
        while self._computing is None and self._prompts:
            _, _, _, job = heapq.heappop(self._prompts)
            if job.gone:
                continue
            if not self._prompts:  # alone in its last iteration
                job.chunks = max(1.0, job.chunks)
            job.chunks = max(job.chunks, EPSILON)
            job.at = self._iterations + job.chunks
            self._computing = job

    def _first(self, job: Job) -> None:
        """Its first token is there."""
        job.length += 1
        job.output -= 1
        wanted = min(job.output + 1, self.kind.headroom_tokens)
        self._held -= wanted  # what it holds from here on is what it grows to
        job.computed(job)
        if job.output <= 0:
            self._held += 1
            self._leave(job)
            job.ended(job)
            return
        job.decoding = True
        job.at = self._iterations - job.length
        self._held += 1 - self._iterations
        self._decoding += 1
        self._context += job.length + job.output / 2
        heapq.heappush(self._ends, (self._iterations + job.output, job.arrival, next(self._entries), job))

    def _stop_decoding(self, job: Job) -> None:
        """Its length becomes what it has grown to."""
        self._context -= job.length + job.output / 2
        self._decoding -= 1
        progress = self._iterations - job.at - job.length
        grown = min(job.output, progress)
        self._held += self._iterations - (progress - grown)
        job.length += grown
        job.output -= grown
        job.decoding = False
        if not self._decoding:
            self._context = 0.0

    def _leave(self, job: Job) -> None:
        """It has its memory no more: what it has stays, idle."""
        job.gone = True
        del self._jobs[job.arrival]
        self._held -= job.length
        self.idle[job.trace] = job.length - 1
        self.idle_tokens += job.length - 1
        if not self._jobs:
            self._held = 0.0
        self._pressed = False
        self._admit()

    def _suspend(self) -> None:
        """The last to come gives way."""
        job = self._jobs[max(self._jobs)]
        self.suspensions += 1
        self._pressed = True
        if job.decoding:
            self._stop_decoding(job)
        else:
            self._held -= min(job.output, self.kind.headroom_tokens)
        if job is self._computing:
            self._computing = None
        del self._jobs[job.arrival]
        self._held -= job.length
        job.gone = True
        job.suspended(job)
        insort(self._line, (job.arrival, replace(job, decoding=False, have=0.0)), key=lambda waiting: waiting[0])

    # --- time -------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Count what was done until now."""
        now_s = self._clock.now_s
        if self._iteration_s < NEVER:
            self._iterations += (now_s - self._as_of_s) / self._iteration_s
            self.busy_s += now_s - self._as_of_s
        elif not self._jobs:
            self._iterations = 0.0
        self._as_of_s = now_s

    def _replan(self) -> None:
        """Say how long iterations take from here on, and when something will have happened."""
        self._next()
        computing = self._computing
        busy = self._decoding > 0 or computing is not None
        before = self._iteration_s < NEVER
        iteration_s = self.decode_s if self._decoding else 0.0
        if computing is not None:
            iteration_s += computing.work_s / computing.chunks
        if self.kind.shared and busy != before:
            self._host.busy += 1 if busy else -1
        if self.kind.shared and busy:
            iteration_s *= 1 + self.kind.shared * max(0, self._host.busy - 1)
        self._iteration_s = max(iteration_s, EPSILON) if busy else NEVER
        self._plan += 1
        if busy:
            until = self._ends[0][0] if self._ends else NEVER
            if computing is not None:
                until = min(until, computing.at)
            if self._decoding and len(self._jobs) > 1:
                until = min(until, self._iterations + max(0.0, self.free_tokens + self.idle_tokens) / self._decoding)
            plan = self._plan
            wait_s = max(0.0, until - self._iterations) * self._iteration_s
            self._clock.after(wait_s, lambda: self._happened(plan))
        if self.kind.shared and busy != before:
            for other in self._host.workers:
                if other is not self and other._iteration_s < NEVER:
                    other.sync()
                    other._replan()

    def _happened(self, plan: int) -> None:
        if plan != self._plan:
            return
        self.sync()
        done = self._iterations + EPSILON
        computing = self._computing
        if computing is not None and computing.at <= done:
            self._computing = None
            self._first(computing)
        while self._ends and self._ends[0][0] <= done:
            _, _, _, job = heapq.heappop(self._ends)
            if job.decoding and not job.gone and job.output <= self._iterations - job.at - job.length + 1e-3:
                self._stop_decoding(job)
                self._leave(job)
                job.ended(job)
        if self.free_tokens < 1.0 and len(self._jobs) > 1 and not self._room(float(self._decoding)):
            self._suspend()
        self._admit()
        self._replan()

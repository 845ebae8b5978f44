"""Asks the lines of batches, so many at once, and keeps what is answered."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from jobs.asking import Asker
from jobs.leases import Held, Taken
from jobs.ledger import Ledger
from jobs.lines import Call
from jobs.queue import Claim, Queue
from jobs.results import result
from jobs.retries import FAULTS_MAX, Answer, NoAnswer, Tried, again_in_s
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log

log = Log(__name__)

LEASE_S = 60.0
"""A line whose asker died can be claimed by another after this; who lives renews it."""
AGAIN_S = 2.0
"""So often what cannot be kept is tried to be kept again."""
ANSWER_S = 3600.0
"""A line that takes longer has no answer."""


class Source(Protocol):
    """A batch's lines."""

    async def read(self, line: int) -> Call:
        """That line's call. Raises OSError."""
        ...


class Job:
    """A batch that is being run."""

    def __init__(
        self,
        name: str,
        deadline_s: float,
        chains: Sequence[Sequence[int]],
        source: Source,
        ledger: Ledger,
        asker: Asker,
    ) -> None:
        """
        Args:
            name: unlike that of any other.
            deadline_s: of :func:`tracehaul.runtime.clock.now_s`.
            chains: see :meth:`jobs.lines.Table.chains`.
            source: its lines.
            ledger: keeps what they are answered.
            asker: answers them.
        """
        self.name = name
        self.deadline_s = deadline_s
        self.chains = chains
        self.source = source
        self.ledger = ledger
        self.asker = asker
        self.drained = asyncio.Event()
        """Every line has ended."""
        self.tried: dict[int, Tried] = {}
        """Lines that failed, and will be asked again."""
        self.again = 0
        """How often any was."""
        self.trouble: str | None = None
        """Why nothing can be kept now."""
        self.attempts: set[asyncio.Task[None]] = set()


class Runner:
    """Runs jobs beside each other, the earliest deadline first: :meth:`add` some, and have :meth:`run` run."""

    def __init__(
        self,
        concurrency: int,
        dice: random.Random,
        wall_s: Callable[[], float] = clock.wall_s,
        answer_s: float = ANSWER_S,
    ) -> None:
        """
        Args:
            concurrency: so many at once.
            dice: scatters retries.
            wall_s: leases are of this clock.
            answer_s: how long an answer may take.
        """
        self._concurrency = concurrency
        self._dice = dice
        self._wall_s = wall_s
        self._answer_s = answer_s
        self._queue = Queue()
        self._jobs: dict[str, Job] = {}
        self._changed = asyncio.Event()
        self._running = 0
        self._crash: BaseException | None = None

    def add(self, job: Job) -> None:
        """Its lines are asked from now on."""
        self._jobs[job.name] = job
        self._queue.add(job.name, job.deadline_s, job.chains, job.ledger.ended)
        self._changed.set()

    async def drop(self, job: Job) -> None:
        """None of its lines is asked any more when this returns."""
        self._queue.drop(job.name)
        self._jobs.pop(job.name, None)
        attempts = list(job.attempts)
        for attempt in attempts:
            attempt.cancel()
        if attempts:
            await asyncio.wait(attempts)

    async def run(self) -> None:
        """Until it is cancelled; then what is being asked ends, and can be asked again. Raises what an attempt did: a
        bug."""
        attempts: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._changed.clear()
                if self._crash is not None:
                    raise self._crash
                while self._running < self._concurrency and (claim := self._queue.claim(clock.now_s())) is not None:
                    job = self._jobs[claim.batch]
                    self._running += 1
                    task = asyncio.create_task(self._attempt(job, claim), name=f"line {claim.line} of {claim.batch}")
                    attempts.add(task)
                    job.attempts.add(task)
                    task.add_done_callback(attempts.discard)
                    task.add_done_callback(job.attempts.discard)
                    task.add_done_callback(self._over)
                self._settle()
                wake_s = self._queue.wake_s(clock.now_s()) if self._running < self._concurrency else None
                pause_s = None if wake_s is None else max(0.001, wake_s - clock.now_s())
                try:
                    async with asyncio.timeout(pause_s):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            for task in attempts:
                task.cancel()
            if attempts:
                await asyncio.wait(list(attempts))

    def _settle(self) -> None:
        for job in self._jobs.values():
            if self._queue.drained(job.name):
                job.drained.set()

    def _over(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crash = error
        self._changed.set()

    async def _attempt(self, job: Job, claim: Claim) -> None:
        """Ask a line once, and see to what follows."""
        try:
            again_s = await self._tried(job, claim.line)
        except OSError as error:
            # Neither read nor claimed: no line is to blame.
            self._trouble(job, str(error))
            again_s = AGAIN_S
        if again_s is None:
            job.tried.pop(claim.line, None)
            self._queue.over(claim)
        else:
            self._queue.later(claim, clock.now_s() + again_s)

    async def _tried(self, job: Job, line: int) -> float | None:
        """In how many seconds it is to be asked again; None: it has ended."""
        now_s = self._wall_s()
        held = await job.ledger.claim(line, now_s, now_s + LEASE_S)
        if isinstance(held, Taken):
            return None if held.until_s is None else max(1.0, min(LEASE_S, held.until_s - now_s))
        try:
            return await self._asked(job, line, held)
        finally:
            # Of no effect where it has ended.
            await asyncio.shield(self._put_back(job, line, held.fence))

    async def _put_back(self, job: Job, line: int, fence: int) -> None:
        try:
            await job.ledger.put_back(line, fence)
        except OSError as error:
            log.debug("a claim was not given back: its time will end", job=job.name, line=line, why=error)

    async def _asked(self, job: Job, line: int, held: Held) -> float | None:
        call = await job.source.read(line)
        left_s = job.deadline_s - clock.now_s()
        if held.lost >= FAULTS_MAX:
            said = NoAnswer(f"whoever asked this died of it, {held.lost} times")
        else:
            found = await self._answer(job, line, held.fence, call, min(left_s, self._answer_s))
            if found is None:
                return 1.0
            said = found
        if not (isinstance(said, Answer) and said.ok):
            tried = job.tried.setdefault(line, Tried())
            tried.faults = max(tried.faults, held.lost)
            again_s = again_in_s(said, tried, job.deadline_s - clock.now_s(), self._dice.random())
            if again_s is not None:
                job.again += 1
                return again_s
        ok = isinstance(said, Answer) and said.ok
        await self._end(job, line, held.fence, result(job.name, call.custom_id, said), ok=ok)
        return None

    async def _answer(self, job: Job, line: int, fence: int, call: Call, timeout_s: float) -> Answer | NoAnswer | None:
        """What the call is answered; None: the line is another's by now."""
        work = asyncio.create_task(job.asker.ask(call, timeout_s))
        try:
            while True:
                done, _ = await asyncio.wait((work,), timeout=LEASE_S / 3)
                if done:
                    return _said(job, line, work)
                try:
                    if not await job.ledger.renew(line, fence, self._wall_s() + LEASE_S):
                        return None
                except OSError as error:
                    self._trouble(job, str(error))
        finally:
            work.cancel()
            await asyncio.wait((work,))

    async def _end(self, job: Job, line: int, fence: int, said: bytes, *, ok: bool) -> None:
        """Keep what was answered, however long that takes: it is not computed twice because a disk is full."""
        while True:
            try:
                await job.ledger.end(line, fence, said, ok=ok)
            except OSError as error:
                self._trouble(job, str(error))
                await asyncio.sleep(AGAIN_S)
                try:
                    await job.ledger.renew(line, fence, self._wall_s() + LEASE_S)
                except OSError:
                    continue
            else:
                job.trouble = None
                return

    def _trouble(self, job: Job, why: str) -> None:
        if job.trouble is None:
            log.warning("lines wait: they cannot be read, or what they are answered not kept", job=job.name, why=why)
        job.trouble = why


def _said(job: Job, line: int, work: asyncio.Task[Answer | NoAnswer]) -> Answer | NoAnswer:
    """What was answered; a fault of ours is that line's alone."""
    if (error := work.exception()) is None:
        return work.result()
    if not isinstance(error, Exception):
        raise error
    log.error("a line could not be asked", job=job.name, line=line, error=error)
    return NoAnswer(f"the line could not be asked: {type(error).__name__}")

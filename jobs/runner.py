"""Asks the lines of batches, so many at once, and keeps what is answered."""

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Protocol

from jobs.asking import Asker
from jobs.cap import AHEAD, LINE_S, Grants, lasts, needed
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
LOOK_S = 0.25
"""So often it is looked what is granted while something waits."""
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


class _Trying:
    """A line that is being asked."""

    def __init__(self, *, urgent: bool) -> None:
        self.urgent = urgent
        """Whatever else runs."""


class NoTurn(Exception):
    """There was no room for a call in time."""


class Runner:
    """Runs jobs beside each other, the earliest deadline first: :meth:`add` some, and have :meth:`run` run.

    It is the one queue of all that nobody waits for: calls that are no job's line take a :meth:`turn` in it.
    """

    def __init__(
        self,
        grants: Grants,
        dice: random.Random,
        wall_s: Callable[[], float] = clock.wall_s,
        answer_s: float = ANSWER_S,
    ) -> None:
        """
        Args:
            grants: how many at once.
            dice: scatters retries.
            wall_s: leases are of this clock.
            answer_s: how long an answer may take.
        """
        self._grants = grants
        self._dice = dice
        self._wall_s = wall_s
        self._answer_s = answer_s
        self._queue = Queue()
        self._jobs: dict[str, Job] = {}
        self._changed = asyncio.Event()
        self._running = 0
        self._urgent = 0
        """Of those, in progress whatever else runs."""
        self._line_s = LINE_S
        self._turns: dict[str, asyncio.Future[bool]] = {}
        """Calls that wait for one."""
        self._names = count()
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
                waits = self._begin(attempts)
                self._settle()
                wake_s = self._queue.wake_s(clock.now_s())
                pause_s = LOOK_S if waits else None if wake_s is None else max(0.001, wake_s - clock.now_s())
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

    @property
    def waiting(self) -> int:
        """Calls that wait for a turn."""
        return len(self._turns)

    @asynccontextmanager
    async def turn(self, deadline_s: float, *, presses: bool = False) -> AsyncGenerator[bool, None]:
        """A place among all that runs, for one call.

        Args:
            deadline_s: of :func:`tracehaul.runtime.clock.now_s`; in this order turns come.
            presses: it comes by then, whatever else runs: then the turn is urgent.

        Raises:
            NoTurn: none came by then.
        """
        name, turn = f"call {next(self._names)}", asyncio.get_running_loop().create_future()
        self._turns[name] = turn
        self._queue.add(name, deadline_s, [range(1)], presses=presses)
        self._changed.set()
        began_s: float | None = None
        try:
            try:
                async with asyncio.timeout(deadline_s - clock.now_s()):
                    urgent = await asyncio.shield(turn)
            except TimeoutError:
                raise NoTurn from None
            began_s = clock.now_s()
            yield urgent
        finally:
            self._queue.drop(name)
            if self._turns.pop(name, None) is None:
                self._ended(clock.now_s() if began_s is None else began_s, urgent=turn.result())

    def _begin(self, attempts: set[asyncio.Task[None]]) -> bool:
        """As many as may; whether more would, if they might."""
        now_s = clock.now_s()
        cap = self._grants()
        live = cap.until_s > now_s
        lines = cap.lines if live else 0
        pressing = needed(self._queue.left(now_s), self._line_s) if live else 0
        while True:
            urgent = self._running >= lines
            if urgent and self._urgent >= pressing - lines:
                return True
            if (claim := self._queue.claim(now_s)) is None:
                return False
            self._running += 1
            self._urgent += urgent
            if (turn := self._turns.pop(claim.batch, None)) is not None:
                turn.set_result(urgent)
                continue
            job = self._jobs[claim.batch]
            trying = _Trying(urgent=urgent)
            task = asyncio.create_task(self._attempt(job, claim, trying), name=f"line {claim.line} of {claim.batch}")
            attempts.add(task)
            job.attempts.add(task)
            task.add_done_callback(attempts.discard)
            task.add_done_callback(job.attempts.discard)
            task.add_done_callback(partial(self._over, now_s, trying))

    def _settle(self) -> None:
        for job in self._jobs.values():
            if self._queue.drained(job.name):
                job.drained.set()

    def _ended(self, began_s: float, *, urgent: bool) -> None:
        self._running -= 1
        self._urgent -= urgent
        self._line_s = lasts(self._line_s, clock.now_s() - began_s)
        self._changed.set()

    def _over(self, began_s: float, trying: _Trying, task: asyncio.Task[None]) -> None:
        self._ended(began_s, urgent=trying.urgent)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crash = error

    async def _attempt(self, job: Job, claim: Claim, trying: _Trying) -> None:
        """Ask a line once, and see to what follows."""
        try:
            again_s = await self._tried(job, claim.line, trying)
        except OSError as error:
            # Neither read nor claimed: no line is to blame.
            self._trouble(job, str(error))
            again_s = AGAIN_S
        if again_s is None:
            job.tried.pop(claim.line, None)
            self._queue.over(claim)
        else:
            self._queue.later(claim, clock.now_s() + again_s)

    async def _tried(self, job: Job, line: int, trying: _Trying) -> float | None:
        """In how many seconds it is to be asked again; None: it has ended."""
        now_s = self._wall_s()
        held = await job.ledger.claim(line, now_s, now_s + LEASE_S)
        if isinstance(held, Taken):
            return None if held.until_s is None else max(1.0, min(LEASE_S, held.until_s - now_s))
        try:
            return await self._asked(job, line, held, trying)
        finally:
            # Of no effect where it has ended.
            await asyncio.shield(self._put_back(job, line, held.fence))

    async def _put_back(self, job: Job, line: int, fence: int) -> None:
        try:
            await job.ledger.put_back(line, fence)
        except OSError as error:
            log.debug("a claim was not given back: its time will end", job=job.name, line=line, why=error)

    async def _asked(self, job: Job, line: int, held: Held, trying: _Trying) -> float | None:
        call = await job.source.read(line)
        left_s = job.deadline_s - clock.now_s()
        if held.lost >= FAULTS_MAX:
            said = NoAnswer(f"whoever asked this died of it, {held.lost} times")
        else:
            found = await self._answer(job, line, held.fence, call, min(left_s, self._answer_s), trying)
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

    async def _answer(
        self, job: Job, line: int, fence: int, call: Call, timeout_s: float, trying: _Trying
    ) -> Answer | NoAnswer | None:
        """What the call is answered; None: the line is another's by now. Where its deadline comes near, whoever answers
        is left and asked again, urgently: that is the same call, and what it has is not lost."""
        ends_s = clock.now_s() + timeout_s
        work = asyncio.create_task(job.asker.ask(call, timeout_s, urgent=trying.urgent))
        try:
            while True:
                rises_s = math.inf if trying.urgent else job.deadline_s - AHEAD * self._line_s - clock.now_s()
                done, _ = await asyncio.wait((work,), timeout=min(LEASE_S / 3, max(0.0, rises_s)))
                if done:
                    return _said(job, line, work)
                if rises_s <= LEASE_S / 3:
                    work.cancel()
                    await asyncio.wait((work,))
                    if not work.cancelled():
                        return _said(job, line, work)
                    trying.urgent = True
                    self._urgent += 1
                    work = asyncio.create_task(job.asker.ask(call, ends_s - clock.now_s(), urgent=True))
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

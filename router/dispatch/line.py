"""Steps that wait for their turn: :mod:`router.policy.turns` over what was sent to the workers.

Nothing is sent for a step while it waits, so that whoever leaves, is late or was deleted costs nobody anything.
"""

import asyncio
from collections.abc import Callable
from math import inf
from typing import NamedTuple

from router.dispatch.pooled import Books
from router.dispatch.run import Run
from router.dispatch.stats import DispatchStats
from router.policy.order import CLASS_WEIGHTS, Waiter
from router.policy.turns import Turns, has_room
from tracehaul.runtime import clock
from tracehaul.wire.errors import ClusterError

LOOK_S = 0.5
"""How long workers may have had room without anybody noticing: what ends is noticed at once."""


class Needs(NamedTuple):
    """Of workers' time, in seconds."""

    given_s: float
    """To its trace so far, or to the one that started it."""
    takes_s: float
    """For the step's prompt."""
    decodes_s: float
    """Generating what a step generates, about."""
    begins: bool
    """It is the first step of a trace that nobody started."""


class Line:
    """One router's, a line for each pool.

    Args:
        books: what a pool's workers were sent, by the pool's name, with what they said last.
        needs: of a step as of now; raises ClusterError where nobody can do it.
        stats: where waits are counted.
    """

    def __init__(self, books: Callable[[str], Books], needs: Callable[[Run], Needs], stats: DispatchStats) -> None:
        self._books = books
        self._needs = needs
        self._stats = stats
        self._turns: dict[str, Turns[Run]] = {}
        self._waits: dict[Run, asyncio.Future[None]] = {}
        self._going: dict[str, Run] = {}
        """Of each pool the one that was told to go, and was not sent yet."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Steps that wait."""
        return sum(len(turns.order) for turns in self._turns.values())

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()

    async def turn(self, run: Run) -> None:
        """Wait until the step may be sent, which is to happen at once then. What runs in the background, or on a worker
        that its caller has named, does not wait here.

        Raises:
            TraceDeleted, DeadlineExceeded: as :meth:`Run.waiting`.
        """
        request = run.request
        if run.background or request.decode is not None:
            return
        books, turns = self._books(request.pool), self._turns.setdefault(request.pool, Turns())
        now_s, tokens = clock.now_s(), request.prompt_tokens + len(run.emitted)
        if not len(turns.order) and has_room(books.decodes, books.prefills, tokens, now_s):
            return
        try:
            needs = self._needs(run)
        except ClusterError:
            return  # nowhere: that is told by who sends it
        group = (request.tenant, CLASS_WEIGHTS[request.step_class])
        deadline_s = inf if request.deadline_s is None else request.deadline_s
        turns.join(run, Waiter(now_s, group, *needs, request.priority, deadline_s), tokens)
        self._waits[run] = asyncio.get_running_loop().create_future()
        self._next(request.pool)
        self._plan()
        try:
            with run.waiting():
                await self._waits[run]
        finally:
            turns.leave(run)
            del self._waits[run]
            run.waited_s = clock.now_s() - now_s
            self._stats.steps_waited += 1
            self._stats.waited_s += run.waited_s
            if self._going.get(request.pool) is run:
                del self._going[request.pool]
                asyncio.get_running_loop().call_soon(self._next, request.pool)  # it is sent, or gone, by then

    def moved(self, pool: str) -> None:
        """A step of that pool has its first token, or has ended: there may be room now."""
        turns = self._turns.get(pool)
        if turns is not None and len(turns.order):
            turns.moved(clock.now_s())
            self._next(pool)

    def _next(self, pool: str) -> None:
        """Tell who is next to go, if it may: one at a time, as where it goes says who may follow."""
        turns = self._turns[pool]
        if pool in self._going or not len(turns.order):
            return
        books = self._books(pool)
        run = turns.next(books.decodes, books.prefills, clock.now_s())
        if run is not None:
            self._going[pool] = run
            if not self._waits[run].done():  # else it is about to leave
                self._waits[run].set_result(None)

    def _plan(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        for pool in self._turns:
            self._next(pool)
        if len(self):
            self._plan()

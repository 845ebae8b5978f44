"""Turns workers' roles where a gain is foretold, pool by pool: the loop of :mod:`router.adapt` over what this router
sees, and flips that every router which lists the worker has to agree to.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from router.adapt.loop import AdaptConfig, Change, Loop, Seat, Verdict, View
from router.adapt.model import Roles
from router.adapt.story import Noted
from router.adapt.window import Ended
from router.dispatch.flips import Flips
from router.dispatch.pooled import Books, Pooled
from router.dispatch.pricing import Pricing
from router.dispatch.run import FAIR, Run
from router.fleet.members import MemberRegistry
from router.policy.placement import Placement
from router.traces.machine import Traces
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import (
    BudgetExceeded,
    CannotContinue,
    ContextTooLong,
    InvalidRequest,
    TraceDeleted,
)
from tracehaul.wire.ids import NodeId

log = Log(__name__)

HOLD_S = 10.0
"""Where a pool has become another, and not by this router, nothing is decided for so long: who was lost comes back, and
the others have its work."""
NOTED_MAX = 256
KEEP = 0.9
ALL = 0.9
"""Whose own count is at least this share of what workers say sees all: their word is a second old."""
THEIRS = {kind.code for kind in (InvalidRequest, ContextTooLong, TraceDeleted, BudgetExceeded, CannotContinue)}
"""Errors that say nothing of the fleet's pace."""


class AdaptStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    changes: int = 0
    kept: int = 0
    unclear: int = 0
    in_vain: int = 0
    refused: int = 0
    taken_back: int = 0


class _Watched:
    """One pool."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.lives: dict[NodeId, tuple[int, int]] = {}
        """Its workers that serve, each in a life, with the role that it has in that."""
        self.hold_until_s = 0.0
        self.turning: NodeId | None = None
        self._own = self._all = 0.0

    def counted(self, own: float, everybody: float) -> float:
        """The share of the pool's steps that are this router's, of late."""
        self._own = KEEP * self._own + (1 - KEEP) * own
        self._all = KEEP * self._all + (1 - KEEP) * everybody
        share = self._own / self._all if self._all else 1.0
        return 1.0 if share >= ALL else max(0.05, share)


class Adapting:
    """One router's."""

    def __init__(
        self,
        config: AdaptConfig,
        flips: Flips,
        members: MemberRegistry,
        pools: Mapping[str, Pooled],
        pricing: Pricing,
        traces: Traces,
    ) -> None:
        self.stats = AdaptStats()
        self.noted: deque[Noted] = deque(maxlen=NOTED_MAX)
        """The last ones."""
        self.told: Callable[[Noted], None] | None = None
        """Told of each."""
        self.leads: Callable[[], bool] = lambda: True
        """Whether it is this router's turn, of several."""
        self._config = config
        self._flips = flips
        self._members = members
        self._pools = pools
        self._pricing = pricing
        self._traces = traces
        self._watched: dict[str, _Watched] = {}
        self._tasks = Tasks("adapting")
        self._closed = False

    async def close(self) -> None:
        """Change nothing more; what is under way is called off."""
        self._closed = True
        await self._tasks.close()

    def of(self, node: NodeId) -> Sequence[Noted]:
        """What was changed at a node, and what came of it, the oldest first."""
        return [one for one in self.noted if one.what.node == node]

    @property
    def turning(self) -> list[NodeId]:
        """Whom it changes now, of each pool at most one."""
        return [watched.turning for watched in self._watched.values() if watched.turning is not None]

    # --- what is done ---------------------------------------------------------------------------------------------

    def placed(self, run: Run, placement: Placement) -> None:
        """A step was, for the first time."""
        trace = self._traces.get(run.key)
        step = None if trace is None else trace.runs(run.request.step)
        if not self._config.enabled or self._closed or step is None:
            return
        gap_s = None if step.pause is None else step.pause.seconds
        work_s = placement.decode_work_s + placement.prefill_work_s
        self._of_pool(run.request.pool).loop.window.placed(clock.now_s(), work_s, gap_s)

    def ended(self, run: Run) -> None:
        """A step has, whatever way; before its trace hears of it."""
        trace, request, now_s = self._traces.get(run.key), run.request, clock.now_s()
        step = None if trace is None else trace.runs(request.step)
        watched = self._watched.get(request.pool)
        if watched is None or step is None or run.ending in THEIRS:
            return
        if run.ending not in FAIR:
            watched.loop.window.missed(now_s)
        elif run.emitted:
            new = request.prompt_tokens - (run.hits.theoretical if run.hits is not None else 0)
            deadline_s = None if request.deadline_s is None else request.deadline_s - step.began_s
            ended = Ended(new, len(run.emitted), now_s - step.began_s, deadline_s)
            watched.loop.window.ended(now_s, ended)

    def _of_pool(self, pool: str) -> _Watched:
        if not self._watched:
            self._tasks.start(self._run(), "loop")
        if pool not in self._watched:
            self._watched[pool] = _Watched(Loop(self._config, lambda what: self._note(pool, what)))
        return self._watched[pool]

    # --- looking --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._config.every_s)
            for pool, watched in self._watched.items():
                change = watched.loop.look(self._view(pool, watched))
                if change is not None:
                    watched.turning = change.node
                    self._tasks.start(self._turn(watched, change), f"turn {change.node}")

    async def _turn(self, watched: _Watched, change: Change) -> None:
        outcome = await self._flips.flip(change.node, change.role)
        info = self._members.known(change.node)
        if outcome.flipped and info is not None:
            watched.lives[change.node] = _life(info)
        watched.turning = None
        watched.loop.done(change, clock.now_s(), "" if outcome.flipped else outcome.why)

    def _view(self, pool: str, watched: _Watched) -> View:
        now_s, members = clock.now_s(), self._members
        fleet = members.view()
        workers = [worker for worker in fleet.workers if worker.info.pool == pool]
        lives = {worker.info.node: _life(worker.info) for worker in workers if worker.live}
        known = watched.lives
        if any(known.get(node) != lives.get(node) for node in known.keys() | lives.keys() if node != watched.turning):
            watched.lives, watched.hold_until_s = lives, now_s + HOLD_S
            watched.loop.disturbed("the pool has become another meanwhile")
        books = self._pricing.synced(self._pools[pool].all, pool) if pool in self._pools else Books()
        decodes, prefills = books.decodes, books.prefills
        loads = {key.node: members.load(key.node) for key in decodes.keys}
        seen = watched.counted(decodes.total, sum(load.running for load in loads.values()))
        turning = watched.turning is not None or any(worker.turning for worker in workers)
        sure = fleet.settled and self.leads() and not turning and now_s >= watched.hold_until_s
        paces = [
            (max(1, round(float(count) / seen)), float(decode_s))
            for count, decode_s in zip(decodes.decoding, decodes.decode_s, strict=True)
            if count
        ]
        return View(
            now_s=now_s,
            sure=sure,
            roles=Roles(len(prefills), len(decodes)),
            paces=tuple(paces),
            places=self._places(books),
            to_decode=tuple(
                Seat(key.node, prefills.running(key))
                for key in prefills.keys
                if sure and members.may_flip(key.node, "decode", fleet) is None
            ),
            to_prefill=tuple(
                Seat(key.node, decodes.running(key))
                for key in decodes.keys
                if sure and members.may_flip(key.node, "prefill", fleet) is None
            ),
            seen=seen,
        )

    def _places(self, books: Books) -> float:
        """Sequences that a decode worker has room for, of such as run now."""
        decodes = books.decodes
        infos = [info for key in decodes.keys if (info := self._members.known(key.node)) is not None]
        running = float(decodes.running_steps.sum())
        if not infos or not running:
            return float("inf")
        context = max(1.0, float(decodes.sent_tokens.sum()) / running)
        limits = [info.limits for info in infos]
        rooms = [min(one.sequences_max or 1e6, (one.kv_tokens_max or 1e9) / context) for one in limits]
        return sum(rooms) / len(rooms)

    def _note(self, pool: str, what: Change | Verdict) -> None:
        noted, stats = Noted(clock.wall_s(), pool, what), self.stats
        self.noted.append(noted)
        if self.told is not None:
            self.told(noted)
        match what:
            case Change(undoes=None):
                stats.changes += 1
            case Change():
                stats.taken_back += 1
            case Verdict(outcome="kept"):
                stats.kept += 1
            case Verdict(outcome="unclear"):
                stats.unclear += 1
            case Verdict(outcome="in vain"):
                stats.in_vain += 1
            case Verdict():
                stats.refused += 1
        facts = {name: value for name, value in msgspec.structs.asdict(what).items() if value is not None}
        log.info("a role is to be changed" if isinstance(what, Change) else "a change was judged", pool=pool, **facts)


def _life(info: NodeInfo) -> tuple[int, int]:
    return info.generation, info.role_epoch

"""The shell of the journal: what becomes of the traces is written down, and a router that starts knows them again.

Nobody waits for it but who deletes a trace. What is written is how traces differ from what was written of them, so what
is behind is never more than the traces themselves: a store of records that is slow, full or gone costs nothing but that
a router which ends meanwhile forgets what came last. It is caught up with once the store is back.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain

from records.base import Batch, Claim, Records, RecordsLost, TraceName
from router.dispatch.ledger import Ledger, Stored, TraceJournalStats, names
from router.dispatch.rereading import Reread, now_here, reread
from router.dispatch.taken import Taken
from router.traces.changes import Planned
from router.traces.events import Elsewhere, Event, Tick
from router.traces.machine import Traces
from router.traces.packing import packed
from router.traces.revival import lost, revived
from router.traces.trace import TraceKey
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.ids import TraceId

log = Log(__name__)

LATE_S = 0.1
"""Changes are written together, at most so long after they were made where the store keeps up."""
BATCH_BYTES = 4 << 20
"""Written at once, before it is packed."""
ERASED_BYTES = 64 << 10
"""What a trace that is erased counts for in it, as nobody knows how much is there."""
TURN_S = 0.002
"""The event loop is let go after so long."""
AGAIN_S = (0.5, 5.0)
"""The first and the longest pause before a store that failed is asked again."""
LOAD_S = 20.0
"""A router that starts waits so long for its traces; they come later, then."""
ERASE_S = 5.0
CLOSE_S = 3.0
GONE_MAX = 100_000
"""Traces that ended before it was known which there were."""


class Journal:
    """One router's.

    Args:
        records: where its rows are.
        traces: what is written down.
        send: tells the traces what happens.
        keep_s: what has rested for longer is erased.
        editions: of the models whose texts the traces remember, by what they are called.
        offload: packs what is written.
        shared: other routers have rows beside these, and give and take traces.
    """

    def __init__(
        self,
        records: Records,
        traces: Traces,
        send: Callable[[Event], None],
        keep_s: float,
        editions: Mapping[str, str],
        offload: Offload,
        *,
        shared: bool = False,
    ) -> None:
        self.stats = TraceJournalStats()
        self.shared = shared
        self.failing = False
        """The store could not be written, or read, when it was last tried."""
        self._records = records
        self._traces = traces
        self._send = send
        self._keep_s = keep_s
        self._editions = editions
        self._offload = offload
        self.ledger = Ledger(keep_s, editions)
        self._changed: dict[TraceKey, None] = {}
        self._under_way = 0
        """Being written."""
        traces.changed = self._changed
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._loaded = asyncio.Event()
        self._waiting: dict[TraceKey, list[asyncio.Future[None]]] = {}
        """Who waits for a trace to be written, or erased, as it is from now on."""
        self._tasks = Tasks("journal")

    @property
    def behind(self) -> int:
        """Traces that are not written down as they are."""
        return len(self._changed) + self._under_way

    @property
    def loaded(self) -> bool:
        """What was written is known."""
        return self._loaded.is_set()

    async def start(self) -> None:
        """Read what was written; returns when the traces are known again, or it takes too long."""
        self.ledger.swept(clock.now_s())
        self._tasks.start(self._run(), "writer")
        try:
            async with asyncio.timeout(LOAD_S):
                await self._loaded.wait()
        except TimeoutError:
            log.warning("traces of before are not known yet", waited_s=LOAD_S)

    def changed(self) -> None:
        """Something has happened to a trace."""
        self._wake.set()

    def holds(self, key: TraceKey) -> bool:
        """The store may have something of a trace."""
        return not self.loaded or key in self.ledger.stored

    async def erased(self, key: TraceKey, *, here: bool = False) -> None:
        """Nothing is left of what was written of a trace up to now; ``here``: by this router.

        Raises:
            Unavailable: not yet; it will be erased as soon as the store does it.
        """
        if not self.loaded:
            self._changed[key] = None
            raise Unavailable("what was written down of traces is not known yet; ask again")
        try:
            async with asyncio.timeout(ERASE_S):
                if key in self.ledger.stored:
                    self.ledger.unsure([key])
                    await self._done(key)
                left = await self._records.holder(*key) if self.shared and not here else None
        except (TimeoutError, RecordsLost):
            raise Unavailable("what was written down of the trace cannot be erased now; ask again") from None
        if left is not None:
            raise Unavailable("another router has the trace, where a step of it may run; ask again")

    async def erased_all(self, tenant: str) -> int:
        """See :meth:`router.traces.book.Written.erased_all`; traces that begin meanwhile are new ones."""
        try:
            async with asyncio.timeout(ERASE_S):
                while not self.loaded or self._under_way:  # noqa: ASYNC110
                    await asyncio.sleep(LATE_S / 10)
                gone = await self._records.erase(tenant)
        except (TimeoutError, RecordsLost) as error:
            raise Unavailable("what was written down of the traces cannot be erased now; ask again") from error
        self.ledger.forget(tenant)
        return gone

    async def close(self) -> None:
        """What can be is written down; the records stay open."""
        try:
            async with asyncio.timeout(CLOSE_S):
                while self.loaded and self.behind and not self.failing:
                    self._wake.set()
                    self._hurry.set()
                    await asyncio.sleep(LATE_S / 10)
        except TimeoutError:
            pass
        await self._tasks.close()
        if self.behind:
            log.warning("traces are not written down as they are", traces=self.behind)

    # --- whose traces are -----------------------------------------------------------------------------------------

    def writes(self, key: TraceKey, fence: int = 0) -> bool:
        """A trace is known, and nobody else writes it, as far as is known here; under that fence, or a later one."""
        known = key in self.ledger.stored or (key in self._traces and key not in self.ledger.foreign)
        return known and self.ledger.fence(key) >= fence

    def refused(self, key: TraceKey, fence: int | None) -> None:
        """The store says that a trace of that fence is not this router's: it is forgotten, or if something is under
        way in it no more written. Not if it was claimed meanwhile."""
        if fence is not None and fence == self.ledger.under(key):
            self.stats.lost += bool(fence)
            self._let_go(key)

    async def give(self, key: TraceKey) -> bool:
        """Another router takes a trace: it is written as it is, and known here no more. False: something is under way
        in it. The caller limits the wait."""
        if not self._idle(key):
            return False
        if key in self._changed or self._under_way:
            await self._done(key)
        if not self._idle(key):
            return False
        self._let_go(key)
        return True

    async def take(self, told: Reread, claims: Sequence[Claim]) -> None:
        """Traces are this router's from now on; where one is known here as something else, it is that. Those that were
        read and are not claimed are others', and only known."""
        now, turn_s = now_here(), clock.perf_s()
        self.stats.unreadable += len(told.bad)
        fences = {(claim.tenant, TraceId(claim.trace)): claim.fence for claim in claims}
        older = {key for key, fence in fences.items() if fence <= self.ledger.fence(key)}  # claimed again meanwhile
        fences = {key: fence for key, fence in fences.items() if key not in older}
        for key in told.stored.keys() | fences.keys():
            if key in self.ledger.foreign and self._idle(key):
                self._let_go(key)
        known = {key for key in told.found if key in self._traces or key in self._changed or key in self.ledger.stored}
        for key, fence in fences.items():
            stored = self.ledger.stored[key] = told.stored.get(key) or Stored(None, 0, 0.0)
            stored.at_s, stored.fence = now.now_s, fence
            self.ledger.foreign.discard(key)
        for trace, alarms in revived(told.found, known, self._keep_s, now, self._editions):
            key = trace.key
            if key in self._traces or key in self._changed or (key in fences and key not in self.ledger.stored):
                continue  # a step of it has begun meanwhile, or it was deleted, or is another one's
            self._traces.restore(trace, alarms)
            if key not in fences or trace.children == told.found[key].trace.children:
                self._changed.pop(key, None)  # it is written as it is
            if key not in fences:
                self.ledger.foreign.add(key)
            elif told.found[key].clock.boot == now.boot:  # else all its times are others now
                self.ledger.stored[key].trace = told.found[key].trace
            self.stats.restored += 1
            for event in lost(trace):
                self._send(event)
            if clock.perf_s() - turn_s > 10 * TURN_S:
                await asyncio.sleep(0)
                turn_s = clock.perf_s()
        others = {key for key in fences if key in known or key not in self._traces}  # than what was read
        self._changed.update(dict.fromkeys(others - told.bad))
        self._send(Tick())  # what should have happened by now happens, and what comes next is planned

    def _idle(self, key: TraceKey) -> bool:
        trace = self._traces.get(key)
        return key not in self._traces or (trace is not None and trace.forgettable and not trace.unanswered)

    def _let_go(self, key: TraceKey) -> None:
        self.ledger.stored.pop(key, None)
        self._send(Elsewhere(key))
        self._changed.pop(key, None)
        self.ledger.foreign.discard(key)
        if key in self._traces:
            self.ledger.foreign.add(key)

    async def _done(self, key: TraceKey) -> None:
        self._changed[key] = None
        done = asyncio.get_running_loop().create_future()
        self._waiting[key] = [*(one for one in self._waiting.get(key, ()) if not one.done()), done]
        self._wake.set()
        self._hurry.set()
        await done

    # --- working --------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        began_s = clock.perf_s()
        claims = await self._records.adopt(others=not self.shared, all_mine=True)
        told = await reread(self._records.rows(names(claims)), self._offload)
        await self.take(told, claims)
        seconds = clock.perf_s() - began_s
        log.info("traces are known again", traces=self.stats.restored, rows=told.rows, seconds=seconds)

    async def _run(self) -> None:
        pause_s = AGAIN_S[0]
        while True:
            try:
                if not self.loaded:
                    await self._load()
                    self._loaded.set()
                    self._over()
                    pause_s = AGAIN_S[0]
                await self._wait()
                if await self._write():
                    self._over()
                    pause_s = AGAIN_S[0]
            except Exception as error:
                self.stats.failures += 1
                if not isinstance(error, RecordsLost) and not self.failing:
                    log.error("the journal of traces does what it should not", error=error)
                if not self.failing:
                    log.warning("the journal of traces stands still; all is served on", why=error)
                self.failing = True
                self._prune()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, AGAIN_S[1])

    def _prune(self) -> None:
        """Of traces that came and went meanwhile nothing has to be known."""
        if self.loaded or len(self._changed) > GONE_MAX:
            known = self.ledger.stored
            for key in [key for key in self._changed if key not in self._traces and key not in known]:
                del self._changed[key]
                _tell(self._waiting.pop(key, ()))

    def _over(self) -> None:
        if self.failing:
            log.info("the journal of traces goes on", behind=self.behind)
        self.failing = False

    async def _wait(self) -> None:
        """Until there is something to be written, and a little longer."""
        rest_s = self.ledger.sweeps_s(clock.now_s())
        if not self._changed and rest_s:
            self._wake.clear()
            try:
                async with asyncio.timeout(rest_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
        try:
            async with asyncio.timeout(LATE_S):
                await self._hurry.wait()
        except TimeoutError:
            pass
        self._hurry.clear()

    async def _write(self) -> bool:
        """Write some of what has changed; False: nothing had to be."""
        expired = self.ledger.expired(clock.now_s(), self._changed)
        taken = Taken([], {}, [], [], [], expired, [*expired])
        self._under_way = len(expired)
        away = frozenset[TraceName]()
        try:
            await self._take_some(taken)
            if taken.rows or taken.erased:
                bodies = await self._offload.run(partial(packed, [row.body for row in taken.rows]))
                rows = [row._replace(body=body) for row, body in zip(taken.rows, bodies, strict=True)]
                gone = self.ledger.gone(taken.erased)
                away = await self._records.write(Batch(rows, taken.claims, taken.superseded, gone))
                self.stats.batches += 1
                self.stats.changes += len(rows)
                self.stats.bytes_written += sum(map(len, bodies))
        except BaseException:
            self._failed(taken)
            raise
        finally:
            self._under_way = 0
        self.stats.whole = self.ledger.whole
        self.ledger.wrote(taken.keys)
        for key in taken.erased:
            self.ledger.stored.pop(key, None)
        for key in self.ledger.lost(away, taken.claims):
            self.stats.lost += 1
            self._let_go(key)
        _tell(chain.from_iterable(taken.waiting.values()))
        return bool(taken.rows or taken.erased)

    async def _take_some(self, taken: Taken) -> None:
        """A trace is in it once: what becomes of it, or is asked for, from when it was taken is for the next time."""
        now, turn_s, ledger = now_here(), clock.perf_s(), self.ledger
        for key in list(dict.fromkeys(self._waiting) | self._changed):  # who waits comes first
            if taken.nbytes + len(taken.erased) * ERASED_BYTES >= BATCH_BYTES:
                break
            self._changed.pop(key, None)
            trace = self._traces.get(key)
            if key in ledger.foreign:
                if trace is None:
                    ledger.foreign.discard(key)
                _tell(self._waiting.pop(key, ()))
                continue
            taken.waiting[key] = self._waiting.pop(key, [])
            taken.keys.append(key)
            self._under_way += 1
            if trace is not None:
                planned: Planned = tuple((alarm.at_s, alarm.kind) for alarm in self._traces.planned(key))
                row, claim, first = ledger.row(trace, planned, now)
                taken.rows.append(row)
                taken.claims.append(claim)
                taken.nbytes += len(row.body)
                if first:
                    taken.superseded.append((TraceName(*key), first))
            elif key in ledger.stored:
                taken.erased.append(key)
            if clock.perf_s() - turn_s > TURN_S:
                await asyncio.sleep(0)
                turn_s = clock.perf_s()

    def _failed(self, taken: Taken) -> None:
        """All that was taken is written anew, and whole: nobody knows what the store has. Nothing is held for it."""
        self._changed.update(dict.fromkeys(taken.keys))
        for key, told in taken.waiting.items():
            if told:
                self._waiting[key] = [*told, *self._waiting.get(key, ())]
        if taken.expired:
            self.ledger.swept()
        self.ledger.unsure((*taken.expired, *self._changed))


def _tell(told: Iterable[asyncio.Future[None]]) -> None:
    for done in told:
        if not done.done():
            done.set_result(None)

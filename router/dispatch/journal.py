"""The shell of the journal: what becomes of the traces is written down, and a router that starts knows them again.

Nobody waits for it but who deletes a trace. What is written is how traces differ from what was written of them, so what
is behind is never more than the traces themselves: a store of records that is slow, full or gone costs nothing but that
a router which ends meanwhile forgets what came last. It is caught up with once the store is back.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import msgspec

from records.base import Batch, Records, RecordsLost, TraceName, TraceRow
from router.traces.changes import VERSION, Clock, Planned, Read, Unreadable, read, written
from router.traces.events import Event, Tick
from router.traces.machine import Traces
from router.traces.revival import lost, revived
from router.traces.trace import Trace, TraceKey
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.ids import TraceId

log = Log(__name__)
seldom = Seldom(log, 60.0)

LATE_S = 0.1
"""Changes are written together, at most so long after they were made where the store keeps up."""
BATCH_BYTES = 4 << 20
"""Written at once."""
ERASED_BYTES, EXPIRED_MAX = 64 << 10, 32
"""What a trace that is erased counts for in it, as nobody knows how much is there; and how many at most are erased at
once because they have rested too long."""
TURN_S = 0.002
"""The event loop is let go after so long."""
AGAIN_S = (0.5, 5.0)
"""The first and the longest pause before a store that failed is asked again."""
LOAD_S = 20.0
"""A router that starts waits so long for its traces; they come later, then."""
ERASE_S = 5.0
CLOSE_S = 3.0
SWEEP_S = 600.0
GONE_MAX = 100_000
"""Traces that ended before it was known which there were."""
CHANGES_FEW, CHANGES_MAX = 16, 128
"""A trace is written whole again after the first number of changes if they take half of what it took, else after the
second."""


class TraceJournalStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    batches: int = 0
    changes: int = 0
    bytes_written: int = 0
    whole: int = 0
    failures: int = 0
    restored: int = 0
    unreadable: int = 0


@dataclass
class _Stored:
    """What the store has of a trace."""

    trace: Trace | None
    """As it was written; None: it is to be written whole."""
    number: int
    """Of its last change."""
    at_s: float
    whole_bytes: int = 0
    since_bytes: int = 0
    count: int = 0

    @property
    def full(self) -> bool:
        """It is time to write it whole."""
        return self.count >= CHANGES_MAX or (self.count >= CHANGES_FEW and 2 * self.since_bytes >= self.whole_bytes)


class Journal:
    """One router's.

    Args:
        records: where its rows are.
        traces: what is written down.
        send: tells the traces what happens.
        keep_s: what has rested for longer is erased.
        editions: of the models whose texts the traces remember, by what they are called.
    """

    def __init__(
        self,
        records: Records,
        traces: Traces,
        send: Callable[[Event], None],
        keep_s: float,
        editions: Mapping[str, str],
    ) -> None:
        self.stats = TraceJournalStats()
        self.failing = False
        """The store could not be written, or read, when it was last tried."""
        self._records = records
        self._traces = traces
        self._send = send
        self._keep_s = keep_s
        self._editions = editions
        self._stored: dict[TraceKey, _Stored] = {}
        self._number = 0
        self._changed: dict[TraceKey, None] = {}
        self._under_way = 0
        """Being written."""
        traces.changed = self._changed
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._loaded = asyncio.Event()
        self._erasing: dict[TraceKey, list[asyncio.Future[None]]] = {}
        """Who waits for what is not being written yet."""
        self._swept_s = 0.0
        self._tasks = Tasks("journal")

    @property
    def behind(self) -> int:
        """Traces that are not written down as they are."""
        return len(self._changed) + self._under_way

    async def start(self) -> None:
        """Read what was written; returns when the traces are known again, or it takes too long."""
        self._swept_s = clock.now_s()
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
        return not self._loaded.is_set() or key in self._stored

    async def erased(self, key: TraceKey) -> None:
        """Nothing is left of what was written of a trace up to now.

        Raises:
            Unavailable: not yet; it will be erased as soon as the store does it.
        """
        if not self._loaded.is_set():
            self._changed[key] = None
            raise Unavailable("what was written down of traces is not known yet; ask again")
        stored = self._stored.get(key)
        if stored is None:
            return
        stored.trace = None
        self._changed[key] = None
        done = asyncio.get_running_loop().create_future()
        self._erasing[key] = [*(one for one in self._erasing.get(key, ()) if not one.done()), done]
        self._wake.set()
        self._hurry.set()
        try:
            async with asyncio.timeout(ERASE_S):
                await done
        except TimeoutError:
            raise Unavailable("what was written down of the trace cannot be erased now; ask again") from None

    async def close(self) -> None:
        """What can be is written down."""
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._loaded.is_set() and self.behind and not self.failing:
                    self._wake.set()
                    self._hurry.set()
                    await asyncio.sleep(LATE_S / 10)
        except TimeoutError:
            pass
        await self._tasks.close()
        if self.behind:
            log.warning("traces are not written down as they are", traces=self.behind)
        await self._records.close()

    # --- reading ------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        began_s, turn_s, rows = clock.perf_s(), clock.perf_s(), 0
        found: dict[TraceKey, Read] = {}
        bad: set[TraceKey] = set()
        last: dict[TraceKey, int] = {}
        sizes: dict[TraceKey, _Stored] = {}
        async for some in self._records.rows():
            for row in some:
                key = (row.tenant, TraceId(row.trace))
                last[key] = row.number
                try:
                    if row.version > VERSION:
                        raise Unreadable(f"version {row.version} is newer than {VERSION}")
                    found[key] = now = read(key, found.get(key), row.number, row.body)
                    bad.discard(key)
                    size = sizes.get(key) if now.follows else None
                    size = sizes[key] = size or _Stored(None, 0, 0.0, len(row.body), -len(row.body), -1)
                    size.since_bytes, size.count = size.since_bytes + len(row.body), size.count + 1
                except Unreadable as error:
                    found.pop(key, None)
                    if key not in bad:
                        seldom.warning("a trace cannot be read", trace=row.trace, why=error)
                    bad.add(key)
                rows += 1
                if clock.perf_s() - turn_s > 10 * TURN_S:
                    await asyncio.sleep(0)
                    turn_s = clock.perf_s()
        self._number = max(last.values(), default=0)
        self.stats.unreadable += len(bad)
        await self._revive(found, last, sizes, bad)
        log.info("traces are known again", traces=self.stats.restored, rows=rows, seconds=clock.perf_s() - began_s)

    async def _revive(
        self, found: dict[TraceKey, Read], last: dict[TraceKey, int], sizes: dict[TraceKey, _Stored], bad: set[TraceKey]
    ) -> None:
        now, turn_s = _clock(), clock.perf_s()
        known = {key for key in found if key in self._traces or key in self._changed}
        for key, number in last.items():
            self._stored[key] = _Stored(None, number, now.now_s)
        for trace, alarms in revived(found, known, self._keep_s, now, self._editions):
            key = trace.key
            if key in self._traces or key in self._changed:
                continue  # a step of it has begun meanwhile, or it was deleted
            self._traces.restore(trace, alarms)
            del self._changed[key]
            stored, was = self._stored[key], sizes[key]
            if found[key].clock.boot == now.boot:  # else all its times are others now
                stored.trace = found[key].trace
                stored.whole_bytes, stored.since_bytes, stored.count = was.whole_bytes, was.since_bytes, was.count
            self.stats.restored += 1
            for event in lost(trace):
                self._send(event)
            if clock.perf_s() - turn_s > 10 * TURN_S:
                await asyncio.sleep(0)
                turn_s = clock.perf_s()
        self._changed.update(dict.fromkeys(key for key in last if key not in self._traces and key not in bad))
        self._send(Tick())  # what should have happened by now happens, and what comes next is planned

    # --- writing ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        pause_s = AGAIN_S[0]
        while True:
            try:
                if not self._loaded.is_set():
                    await self._load()
                    self._loaded.set()
                    self._over(pause_s)
                    pause_s = AGAIN_S[0]
                await self._wait()
                if await self._write():
                    self._over(pause_s)
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
        if self._loaded.is_set() or len(self._changed) > GONE_MAX:
            for key in [key for key in self._changed if key not in self._traces and key not in self._stored]:
                del self._changed[key]
                _tell(self._erasing.pop(key, ()))

    def _over(self, pause_s: float) -> None:
        if self.failing:
            log.info("the journal of traces goes on", behind=self.behind)
        self.failing = False

    async def _wait(self) -> None:
        """Until there is something to be written, and a little longer."""
        if not self._changed and not self._sweeping():
            self._wake.clear()
            try:
                async with asyncio.timeout(SWEEP_S):
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
        """Write some of what has changed; False: nothing had to be. A trace is in it once: what becomes of it, or is
        asked for, from when it was taken is for the next time."""
        rows: list[TraceRow] = []
        superseded: list[tuple[TraceName, int]] = []
        expired = self._expired()
        erased = [*expired]
        taken: list[TraceKey] = []
        waiting: dict[TraceKey, list[asyncio.Future[None]]] = {}
        self._under_way = len(erased)
        now, turn_s, nbytes = _clock(), clock.perf_s(), 0
        try:
            for key in list(dict.fromkeys(self._erasing) | self._changed):  # who waits comes first
                if nbytes + len(erased) * ERASED_BYTES >= BATCH_BYTES:
                    break
                self._changed.pop(key, None)
                waiting[key] = self._erasing.pop(key, [])
                taken.append(key)
                self._under_way += 1
                stored, trace = self._stored.get(key), self._traces.get(key)
                if trace is not None:
                    row = self._row(key, trace, stored, now)
                    rows.append(row)
                    nbytes += len(row.body)
                    if stored is not None and self._stored[key].count == 0:
                        superseded.append((TraceName(*key), row.number))
                elif stored is not None:
                    erased.append(key)
                if clock.perf_s() - turn_s > TURN_S:
                    await asyncio.sleep(0)
                    turn_s = clock.perf_s()
            if rows or erased:
                await self._records.write(Batch(rows, superseded, [TraceName(*key) for key in erased]))
        except BaseException:
            self._failed(taken, expired, waiting)
            raise
        finally:
            self._under_way = 0
        self.stats.batches += bool(rows or erased)
        self.stats.changes += len(rows)
        self.stats.bytes_written += nbytes
        for key in erased:
            del self._stored[key]
        _tell(chain.from_iterable(waiting.values()))
        return bool(rows or erased)

    def _row(self, key: TraceKey, trace: Trace, stored: _Stored | None, now: Clock) -> TraceRow:
        before = stored.trace if stored is not None and not stored.full else None
        follows = stored.number if stored is not None and before is not None else 0
        self._number += 1
        planned: Planned = tuple((alarm.at_s, alarm.kind) for alarm in self._traces.planned(key))
        body = written(before, follows, trace, planned, now, self._editions)
        if stored is None or before is None:
            self._stored[key] = _Stored(trace, self._number, now.now_s, len(body))
            self.stats.whole += 1
        else:
            stored.trace, stored.number, stored.at_s = trace, self._number, now.now_s
            stored.since_bytes += len(body)
            stored.count += 1
        return TraceRow(key[0], key[1], self._number, VERSION, body)

    def _failed(
        self, taken: list[TraceKey], expired: list[TraceKey], waiting: dict[TraceKey, list[asyncio.Future[None]]]
    ) -> None:
        """All that was taken is written anew, and whole: nobody knows what the store has. Nothing is held for it."""
        self._changed.update(dict.fromkeys(taken))
        for key, told in waiting.items():
            if told:
                self._erasing[key] = [*told, *self._erasing.get(key, ())]
        if expired:
            self._swept_s = -math.inf
        for key in (*expired, *self._changed):
            if (stored := self._stored.get(key)) is not None:
                stored.trace = None

    def _sweeping(self) -> bool:
        """It is time to look for what has rested too long."""
        return clock.now_s() - self._swept_s >= SWEEP_S

    def _expired(self) -> list[TraceKey]:
        """Of what nothing is to be kept any more, although it is known: some, none of it changed."""
        if not self._sweeping():
            return []
        now_s, kept = clock.now_s(), self._stored.items()
        old = (key for key, stored in kept if now_s - stored.at_s > self._keep_s and key not in self._changed)
        found = list(islice(old, EXPIRED_MAX))
        if len(found) < EXPIRED_MAX:
            self._swept_s = now_s
        return found


def _tell(told: Iterable[asyncio.Future[None]]) -> None:
    for done in told:
        if not done.done():
            done.set_result(None)


def _clock() -> Clock:
    return Clock(clock.boot_id(), clock.now_s(), clock.wall_s())

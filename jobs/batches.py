"""Batches as they are run, wherever they are kept.

A batch is written down before what follows from it is done (:mod:`jobs.batch`), so that whoever starts after a death
goes on where it happened.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, TypeVar

import msgspec

from jobs.batch import (
    AGE_S,
    OVER,
    Batch,
    Cancelled,
    Counts,
    Delivered,
    Drained,
    Effect,
    Event,
    Late,
    Refused,
    Stopped,
    Validated,
    handle,
    in_order,
    outlived,
    results_name,
    resumed,
)
from jobs.files import File, NoRoom
from jobs.keeping import BatchStore, Lost, Opened, Unreadable, kept
from jobs.lines import LineError
from jobs.live import Live, Means, StillRuns, TooMany
from jobs.outputs import Outputs
from jobs.runner import Job
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.runtime.tasks import Tasks

log = Log(__name__)

T = TypeVar("T")

LOOK_S = 1.0
"""So often it is looked whether a window is over."""
AGAIN_S = 2.0
ENDS_S = 10.0
"""A batch that is to be erased has ended by then."""
OUTPUT = "batch_output"
"""The purpose of what a batch was answered."""


class Batches:
    """All of them. One process has a batch at a time."""

    def __init__(
        self,
        store: BatchStore,
        found: Sequence[Batch],
        checking: Offload,
        live_max: int,
        wall_s: Callable[[], float] = clock.wall_s,
    ) -> None:
        """
        Args:
            store: keeps them.
            found: what it has.
            checking: where what takes seconds is done; the caller closes it.
            live_max: so many batches of each tenant may wait or run at a time.
            wall_s: what time it is.
        """
        self.store = store
        self._means: Means | None = None
        self._checking = checking
        self._live_max = live_max
        self._wall_s = wall_s
        self._tasks = Tasks("batches")
        self._live: dict[str, Live] = {}
        self._batches = in_order(found)
        self._undoing: set[asyncio.Task[None]] = set()

    # --- what clients do --------------------------------------------------------------------------------------

    def get(self, tenant: str, name: str) -> Batch | None:
        """That batch of theirs, as it is now."""
        batch = self._batches.get((tenant, name))
        if batch is not None and (live := self._live.get(name)) is not None and live.outputs is not None:
            counts = Counts(batch.counts.total, live.outputs.completed, live.outputs.failed)
            return msgspec.structs.replace(batch, counts=counts)
        return batch

    def list(self, tenant: str) -> Sequence[Batch]:
        """All of theirs, the oldest first."""
        names = [name for owner, name in self._batches if owner == tenant]
        return [batch for name in names if (batch := self.get(tenant, name)) is not None]

    async def create(self, batch: Batch, file: File) -> None:
        """Begin one, with that file as its input.

        Raises:
            TooMany: the tenant has too many that are not over.
            NoRoom: it cannot be kept.
        """
        if sum(live.batch.tenant == batch.tenant for live in self._live.values()) >= self._live_max:
            raise TooMany(f"{self._live_max} batches are not over yet, which is the most")
        live = self._live[batch.id] = Live(batch)
        beginning = asyncio.create_task(kept(self.store.begin(batch, file)), name=f"begin {batch.id}")
        try:
            await asyncio.shield(beginning)
        except asyncio.CancelledError:  # what is under way goes on, and nobody hears of the batch
            undoing = asyncio.create_task(self._undo(beginning, batch), name=f"forget {batch.id}")
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            raise
        except BaseException:
            del self._live[batch.id]
            raise
        self._batches[batch.tenant, batch.id] = batch
        self._tasks.start(self._drive(live), batch.id)

    async def cancel(self, batch: Batch) -> Batch:
        """End it. Raises NoRoom: that cannot be kept, and it goes on."""
        if (live := self._live.get(batch.id)) is not None:
            async with live.changing:
                changed, effect = handle(live.batch, Cancelled(), int(self._wall_s()))
                if effect is not None:
                    await kept(self.store.write(changed))
                    self._know(live, changed)
                    live.interrupted.set()
        return self.get(batch.tenant, batch.id) or batch

    async def erase(self, tenant: str, until_s: float = inf) -> int:
        """Nothing is known any more of theirs that were made until then, in Unix seconds; what they were answered is
        among the files. Returns how many there were.

        Raises:
            NoRoom, OSError, StillRuns: not of all of them.
        """
        theirs = [batch for owner, batch in self._batches.items() if owner[0] == tenant]
        found = [batch for batch in theirs if batch.created_at <= until_s]
        for batch in found:
            await self.cancel(batch)
        patient_s = clock.now_s() + ENDS_S
        for batch in found:
            while batch.id in self._live:
                if clock.now_s() > patient_s:
                    raise StillRuns(f"the batch {batch.id} has not ended yet")
                await asyncio.sleep(ENDS_S / 200)
            with suppress(Lost):
                await self.store.forget(self._batches.get((tenant, batch.id), batch))
            self._batches.pop((tenant, batch.id), None)
        return len(found)

    # --- how they live ----------------------------------------------------------------------------------------

    async def run(self, means: Means) -> None:
        """Until it is cancelled: whoever runs it next goes on. None is created before."""
        self._means = means
        for batch in self._batches.values():
            self._begun(batch)
        self._tasks.start(self._looking(), "look")
        try:
            await asyncio.Event().wait()
        finally:
            await self._tasks.close()
            for live in self._live.values():
                await self._close(live)

    def took(self, found: Sequence[Batch]) -> None:
        """These were another's, and are kept here now; those that are not over go on, where any run."""
        self._batches = in_order([*self._batches.values(), *found])
        for batch in found if self._means is not None else ():
            self._begun(batch)

    def lost(self, names: Collection[str]) -> None:
        """These are another's by now: nothing is done for them any more."""
        for name in names:
            if (live := self._live.get(name)) is not None and live.batch.status not in OVER:
                live.lost = True
                live.interrupted.set()

    def _begun(self, batch: Batch) -> None:
        if batch.status in OVER:
            self._given.over(batch)
            return
        live = self._live[batch.id] = Live(batch)
        self._tasks.start(self._drive(live), batch.id)

    @property
    def _given(self) -> Means:
        assert self._means is not None, "they do not run yet"
        return self._means

    async def _looking(self) -> None:
        while True:
            now = int(self._wall_s())
            for live in list(self._live.values()):
                try:
                    if handle(live.batch, Late(), now)[1] is not None and await self._handle(live, Late()) is not None:
                        live.interrupted.set()
                except Lost:
                    self.lost([live.batch.id])
            for batch in outlived(list(self._batches.values()), now):
                if batch.id in self._live:
                    continue
                with suppress(OSError):
                    with suppress(Lost):
                        await self.store.forget(batch)
                    self._batches.pop((batch.tenant, batch.id), None)
            await asyncio.sleep(LOOK_S)

    async def _drive(self, live: Live) -> None:
        try:
            await self._through(live)
        except Lost as error:
            live.lost = True
            log.warning("a batch is gone on with by another router", batch=live.batch.id, why=error)
        await self._close(live)
        if live.lost:
            self._batches.pop((live.batch.tenant, live.batch.id), None)
        else:
            await self._clean(self.store.clean, live.batch)
        del self._live[live.batch.id]

    async def _through(self, live: Live) -> None:
        """Until it is over. Raises Lost."""
        effect = resumed(live.batch)
        while effect is not None:
            if live.lost:
                raise Lost(live.batch.id)
            match effect:
                case "validate":
                    event = await self._unless(live, self._validate(live))
                case "run":
                    event = await self._unless(live, self._run(live))
                case "stop":
                    event = await self._stop(live)
                case "deliver":
                    event = await self._deliver(live)
            effect = None if event is None else await self._handle(live, event)
            # What came too late, as something else came between, is not what follows.
            effect = effect or resumed(live.batch)

    async def _undo(self, beginning: asyncio.Task[None], batch: Batch) -> None:
        try:
            with suppress(NoRoom):
                await beginning
            for rid in (self.store.forget, self.store.clean):
                await self._clean(rid, batch)
        finally:
            del self._live[batch.id]

    async def _clean(self, rid: Callable[[Batch], Awaitable[None]], batch: Batch) -> None:
        while True:
            try:
                with suppress(Lost):
                    await rid(batch)
                return
            except OSError as error:
                log.warning("what a batch needed no more is still there", batch=batch.id, why=error)
            await asyncio.sleep(AGAIN_S)

    async def _unless(self, live: Live, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work leads to; None: it was interrupted."""
        tasks = asyncio.create_task(work), asyncio.create_task(live.interrupted.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return None if live.interrupted.is_set() else tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _handle(self, live: Live, event: Event) -> Effect | None:
        """Keep what the event makes of the batch, however long that takes; then what follows."""
        while True:
            async with live.changing:
                batch, effect = handle(live.batch, event, int(self._wall_s()))
                if batch is live.batch:
                    return effect
                try:
                    await self.store.write(batch)
                except OSError as error:
                    log.warning("a batch cannot be kept: it waits", batch=batch.id, why=error)
                else:
                    self._know(live, batch)
                    return effect
            await asyncio.sleep(AGAIN_S)

    def _know(self, live: Live, batch: Batch) -> None:
        live.batch = self._batches[batch.tenant, batch.id] = batch
        if batch.status in OVER:
            self._given.over(batch)

    async def _validate(self, live: Live) -> Event:
        batch = live.batch
        while True:
            try:
                checked = await self.store.check(batch, partial(self._given.refuse, batch))
                break
            except Unreadable as error:
                return Refused((LineError("file_unreadable", f"The input file cannot be read: {error}."),))
            except OSError as error:
                log.warning("a batch cannot be checked: it waits", batch=batch.id, why=error)
            await asyncio.sleep(AGAIN_S)
        if checked.wrong:
            more = checked.wrong - len(checked.errors)
            left = (LineError("more_errors", f"{more} more lines are wrong."),) if more else ()
            return Refused(checked.errors + left)
        live.checked = checked
        return Validated(len(checked.table))

    async def _opened(self, live: Live) -> Opened:
        """Opened once, whoever stops waiting for it."""
        if live.opening is None:
            live.opening = self._tasks.start(self._open(live), f"open {live.batch.id}")
        return await asyncio.shield(live.opening)

    async def _open(self, live: Live) -> Opened:
        batch = live.batch
        while True:
            try:
                if live.checked is None:
                    live.checked = await self.store.check(batch, lambda model: None)
                opened = await self.store.open(batch, live.checked)
            except (OSError, Unreadable) as error:
                log.warning("a batch cannot be gone on with: it waits", batch=batch.id, why=error)
                await asyncio.sleep(AGAIN_S)
            else:
                live.outputs = opened.outputs
                return opened

    async def _run(self, live: Live) -> Event:
        opened = await self._opened(live)
        deadline_s = clock.now_s() + live.batch.expires_at - self._wall_s()
        chains = await self._checking.run(opened.table.chains)
        asker = self._given.asker(live.batch)
        live.job = Job(live.batch.id, deadline_s, chains, opened.source, opened.outputs, asker)
        self._given.runner.add(live.job)
        await live.job.drained.wait()
        return Drained()

    async def _stop(self, live: Live) -> Event:
        if live.job is not None:
            await self._given.runner.drop(live.job)
            live.job = None
        return Stopped()

    async def _deliver(self, live: Live) -> Event:
        await self._stop(live)
        if live.batch.in_progress_at is None:
            return Delivered(Counts(), 0, None, None)
        table, _, outputs = await self._opened(live)
        while True:
            if live.lost:
                raise Lost(live.batch.id)
            try:
                await outputs.flushed()
                why = "batch_cancelled" if live.batch.status == "cancelling" else "batch_expired"
                await outputs.shut(live.batch.id, table.index, why)
                await self.store.settle(live.batch, outputs)
                answers = await self._as_file(live.batch, outputs, ok=True)
                errors = await self._as_file(live.batch, outputs, ok=False)
            except (OSError, NoRoom) as error:
                log.warning("a batch cannot be delivered: it waits", batch=live.batch.id, why=error)
                await asyncio.sleep(AGAIN_S)
                continue
            counts = Counts(len(table), outputs.completed, outputs.failed)
            return Delivered(counts, outputs.unasked, answers, errors)

    async def _as_file(self, batch: Batch, outputs: Outputs, *, ok: bool) -> str | None:
        """Make a file of lines that ended so, which a second time is the same one."""
        name = results_name(batch.id, ok=ok)
        now = int(self._wall_s())
        filename = f"{batch.id}_{'output' if ok else 'error'}.jsonl"
        file = File(name, batch.tenant, filename, OUTPUT, 0, now, now + (batch.output_age_s or AGE_S))
        return name if await self.store.deliver(file, batch, outputs, ok=ok) else None

    async def _close(self, live: Live) -> None:
        if live.job is not None:
            await self._given.runner.drop(live.job)
        if live.opening is not None and live.outputs is None:
            live.opening.cancel()
        if live.opening is not None and live.outputs is not None:
            _, source, outputs = live.opening.result()
            await outputs.flushed()
            outputs.close()
            source.close()
            live.opening = live.outputs = None

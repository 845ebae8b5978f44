"""Batches as they are run: each a record of its own in a folder, beside its input and what its lines were answered.

A record is replaced whole before what follows from it is done (:mod:`jobs.batch`), so that whoever starts after a death
goes on where it happened. The input is a second name of the client's file, which may be deleted meanwhile.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
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
    outlived,
    resumed,
)
from jobs.batch_records import read_batch, write_batch
from jobs.files import File, Files, NoRoom, on_disk
from jobs.left import moved
from jobs.lines import Checked, Limits, LineError
from jobs.live import Live, Means, Opened
from jobs.outputs import ForeignFile, InUse, Outputs
from jobs.reading import FileSource, check_file
from jobs.runner import Job
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.runtime.tasks import Tasks

log = Log(__name__)

T = TypeVar("T")

RECORD, INPUT, ANSWERS, ERRORS = ".json", ".input", ".answers", ".errors"
LOOK_S = 1.0
"""So often it is looked whether a window is over."""
AGAIN_S = 2.0
ENDS_S = 10.0
"""A batch that is to be erased has ended by then."""
LIMITS = Limits(errors_max=100)
"""So many wrong lines are told of each."""
OUTPUT = "batch_output"
"""The purpose of what a batch was answered."""


class StillRuns(Exception):
    """It has not ended yet; says which."""


class TooMany(Exception):
    """No more batches are taken; says why."""


class Batches:
    """All of them. One process has the folder at a time: the one that has the files."""

    def __init__(
        self,
        folder: Path,
        files: Files,
        offload: Offload,
        checking: Offload,
        live_max: int,
        wall_s: Callable[[], float] = clock.wall_s,
    ) -> None:
        """
        Args:
            folder: on the disk of the files.
            files: where inputs come from, and results go.
            offload: where the disk is waited for; the caller closes it.
            checking: where whole files are read, which takes seconds; likewise.
            live_max: so many batches of each tenant may wait or run at a time.
            wall_s: what time it is.

        Raises:
            OSError: the folder cannot be had.
        """
        self._folder = folder
        self._files = files
        self._means: Means | None = None
        self._offload, self._checking = offload, checking
        self._live_max = live_max
        self._wall_s = wall_s
        self._tasks = Tasks("batches")
        self._live: dict[str, Live] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = [batch for path in folder.glob(f"*{RECORD}") if (batch := read_batch(path)) is not None]
        self._batches = _in_order(found)
        kept = {path.stem for path in folder.glob(f"*{RECORD}")}  # also what cannot be read now
        kept -= {batch.id for batch in found if batch.status in OVER}
        for path in folder.iterdir():
            if path.suffix == ".tmp" or (path.suffix != RECORD and path.stem not in kept):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

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
            NoRoom: the disk does not take it.
        """
        if sum(live.batch.tenant == batch.tenant for live in self._live.values()) >= self._live_max:
            raise TooMany(f"{self._live_max} batches are not over yet, which is the most")
        live = self._live[batch.id] = Live(batch)
        try:
            await on_disk(self._offload, partial(self._begin, batch, self._files.path(file)))
        except BaseException:
            del self._live[batch.id]
            raise
        self._batches[batch.tenant, batch.id] = batch
        self._tasks.start(self._drive(live), batch.id)

    def _begin(self, batch: Batch, data: Path) -> None:
        kept = self._path(batch, INPUT)
        try:
            os.link(data, kept)
            self._write(batch)
        except OSError:
            kept.unlink(missing_ok=True)
            raise

    async def cancel(self, batch: Batch) -> Batch:
        """End it. Raises NoRoom: that cannot be kept, and it goes on."""
        if (live := self._live.get(batch.id)) is not None:
            async with live.changing:
                changed, effect = handle(live.batch, Cancelled(), int(self._wall_s()))
                if effect is not None:
                    await on_disk(self._offload, partial(self._write, changed))
                    self._know(live, changed)
                    live.interrupted.set()
        return self.get(batch.tenant, batch.id) or batch

    async def erase(self, tenant: str) -> int:
        """Nothing is known of theirs any more; what they were answered is among the files. Returns how many there were.

        Raises:
            NoRoom, OSError, StillRuns: not of all of them.
        """
        found = [batch for owner, batch in self._batches.items() if owner[0] == tenant]
        for batch in found:
            await self.cancel(batch)
        until_s = clock.now_s() + ENDS_S
        for batch in found:
            while batch.id in self._live:
                if clock.now_s() > until_s:
                    raise StillRuns(f"the batch {batch.id} has not ended yet")
                await asyncio.sleep(ENDS_S / 200)
            await self._offload.run(partial(self._path(batch, RECORD).unlink, missing_ok=True))
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

    async def adopt(self, folder: Path) -> int:
        """As :meth:`jobs.files.Files.adopt`; those that are not over go on here, where any run."""
        paths = await self._offload.run(partial(moved, folder, self._folder, [INPUT, ANSWERS, ERRORS]))
        found = [batch for path in paths if (batch := await self._offload.run(partial(read_batch, path))) is not None]
        self._batches = _in_order([*self._batches.values(), *found])
        for batch in found if self._means is not None else ():
            self._begun(batch)
        return len(found)

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
                if handle(live.batch, Late(), now)[1] is not None and await self._handle(live, Late()) is not None:
                    live.interrupted.set()
            for batch in outlived(list(self._batches.values()), now):
                with suppress(OSError):
                    await self._offload.run(partial(self._path(batch, RECORD).unlink, missing_ok=True))
                    del self._batches[batch.tenant, batch.id]
            await asyncio.sleep(LOOK_S)

    async def _drive(self, live: Live) -> None:
        effect = resumed(live.batch)
        while effect is not None:
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
        await self._close(live)
        await self._offload.run(partial(self._clean, live.batch))
        del self._live[live.batch.id]

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
                    await self._offload.run(partial(self._write, batch))
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
        try:
            checked = await self._check(batch, partial(self._given.refuse, batch))
        except OSError as error:
            return Refused((LineError("file_unreadable", f"The input file cannot be read: {error.strerror}."),))
        if checked.wrong:
            more = checked.wrong - len(checked.errors)
            left = (LineError("more_errors", f"{more} more lines are wrong."),) if more else ()
            return Refused(checked.errors + left)
        live.checked = checked
        return Validated(len(checked.table))

    async def _check(self, batch: Batch, refuse: Callable[[str], LineError | None]) -> Checked:
        path = self._path(batch, INPUT)
        return await self._checking.run(partial(check_file, path, batch.endpoint, refuse, LIMITS))

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
                    live.checked = await self._check(batch, lambda model: None)
                table = live.checked.table
                answers, errors = self._path(batch, ANSWERS), self._path(batch, ERRORS)
                make = partial(Outputs, answers, errors, table.index, self._offload)
                outputs = await self._checking.run(make)
                try:
                    opened = Opened(table, FileSource(self._path(batch, INPUT), table, self._offload), outputs)
                except OSError:
                    outputs.close()
                    raise
            except (OSError, InUse, ForeignFile) as error:
                log.warning("a batch cannot be gone on with: it waits", batch=batch.id, why=error)
                await asyncio.sleep(AGAIN_S)
            else:
                live.outputs = outputs
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
            try:
                await outputs.flushed()
                why = "batch_cancelled" if live.batch.status == "cancelling" else "batch_expired"
                await outputs.shut(live.batch.id, table.index, why)
                answers = await self._as_file(live.batch, ANSWERS, outputs.answers_size, "o")
                errors = await self._as_file(live.batch, ERRORS, outputs.errors_size, "e")
            except (OSError, NoRoom) as error:
                log.warning("a batch cannot be delivered: it waits", batch=live.batch.id, why=error)
                await asyncio.sleep(AGAIN_S)
                continue
            counts = Counts(len(table), outputs.completed, outputs.failed)
            return Delivered(counts, outputs.unasked, answers, errors)

    async def _as_file(self, batch: Batch, kind: str, size: int, mark: str) -> str | None:
        """Make a file of it, which a second time is the same one."""
        if not size:
            return None
        name = f"file-{batch.id.removeprefix('batch_')}{mark}"
        now = int(self._wall_s())
        filename = f"{batch.id}_{'output' if mark == 'o' else 'error'}.jsonl"
        file = File(name, batch.tenant, filename, OUTPUT, size, now, now + (batch.output_age_s or AGE_S))
        await self._files.take(self._path(batch, kind), file)
        return name

    async def _close(self, live: Live) -> None:
        if live.job is not None:
            await self._given.runner.drop(live.job)
        if live.opening is not None and live.outputs is not None:
            _, source, outputs = live.opening.result()
            await outputs.flushed()
            outputs.close()
            source.close()
            live.opening = live.outputs = None

    def _clean(self, batch: Batch) -> None:
        for kind in (INPUT, ANSWERS, ERRORS):
            with suppress(OSError):
                self._path(batch, kind).unlink(missing_ok=True)

    def _path(self, batch: Batch, kind: str) -> Path:
        return self._folder / f"{batch.id}{kind}"

    def _write(self, batch: Batch) -> None:
        write_batch(self._path(batch, RECORD), batch)


def _in_order(batches: Sequence[Batch]) -> dict[tuple[str, str], Batch]:
    """By tenant and id, the oldest first."""
    return {(each.tenant, each.id): each for each in sorted(batches, key=lambda each: (each.created_at, each.id))}

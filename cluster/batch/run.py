"""Runs a file of calls against an endpoint, and goes on where it was killed."""

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.api import Api
from cluster.batch.asking import Endpoint, client
from cluster.rundir import ClusterFault
from jobs.cap import fixed
from jobs.folder.outputs import ForeignFile, InUse, file_outputs
from jobs.folder.reading import FileSource, check_file
from jobs.lines import Checked, Limits, LineError, model_not_found
from jobs.runner import Job, Runner
from tracehaul.runtime import clock
from tracehaul.runtime.offload import ThreadOffload

LOOK_S = 0.2
MODELS_S = 10.0
LIMITS = Limits(lines_max=10_000_000, bytes_max=2**40, errors_max=1_000_000)
"""Of a command that runs beside its own file: none that matter but a line's."""


class Order(msgspec.Struct, frozen=True):
    """What is to be run."""

    file: Path
    answers: Path
    errors: Path
    """May be the same."""
    concurrency: int
    window_s: float


class Outcome(msgspec.Struct, frozen=True):
    """How it ended."""

    total: int
    before: int
    """Lines that had ended before this run."""
    completed: int
    failed: int
    again: int
    """How often a line was asked again."""
    took_s: float

    @property
    def left(self) -> int:
        """Lines whose turn never came."""
        return self.total - self.completed - self.failed


def checked(order: Order, api: Api) -> Checked:
    """What the file holds, every wrong line of it.

    Raises:
        ClusterFault: it cannot be read, or nobody answers.
    """
    models = _models(api)

    def refuse(model: str) -> LineError | None:
        return None if models is None or model in models else model_not_found(model)

    try:
        return check_file(order.file, None, refuse, LIMITS)
    except OSError as error:
        raise ClusterFault(f"cannot read {order.file}: {error.strerror or error}") from None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _models(api: Api) -> frozenset[str] | None:
    """Those that can be asked for; None: it does not tell.

    Raises:
        ClusterFault: nobody answers, or refuses the key.
    """
    answer = api.get("/v1/models", MODELS_S)
    try:
        return frozenset(model.id for model in msgspec.json.decode(answer.content, type=_Models).data)
    except msgspec.DecodeError:
        return None


async def run(order: Order, api: Api, found: Checked, err: Console) -> Outcome:
    """Ask every line of the file that has not ended yet.

    Raises:
        ClusterFault: the files cannot be had.
    """
    began_s = clock.now_s()
    deadline_s = began_s + order.window_s
    async with AsyncExitStack() as stack:
        offload = ThreadOffload("files", threads=2)
        stack.callback(offload.close)
        try:
            source = FileSource(order.file, found.table, offload)
            stack.callback(source.close)
            outputs = file_outputs(order.answers, order.errors, found.table.index, offload)
        except (OSError, InUse, ForeignFile) as error:
            raise ClusterFault(str(error)) from None
        stack.callback(outputs.close)
        stack.push_async_callback(outputs.flushed)
        before = outputs.completed + outputs.failed
        http: httpx.AsyncClient = await stack.enter_async_context(client(api, order.concurrency))
        runner = Runner(fixed(order.concurrency), random.Random())  # noqa: S311 - it scatters retries
        job = Job(order.file.name, deadline_s, found.table.chains(), source, outputs, Endpoint(http))
        runner.add(job)
        progress = stack.enter_context(_progress(err))
        shown = progress.add_task("", total=len(found.table), failed=0, trouble="")
        running = asyncio.create_task(runner.run())
        try:
            while not job.drained.is_set() and not running.done() and clock.now_s() < deadline_s:
                ended = outputs.completed + outputs.failed
                trouble = f"waits: {job.trouble}" if job.trouble else ""
                progress.update(shown, completed=ended, failed=outputs.failed, trouble=trouble)
                await asyncio.wait((running,), timeout=LOOK_S)
        finally:
            running.cancel()
            await asyncio.wait((running,))
        if not running.cancelled():
            running.result()
        await outputs.flushed()
        progress.update(shown, completed=outputs.completed + outputs.failed, failed=outputs.failed, trouble="")
        took_s = clock.now_s() - began_s
        return Outcome(len(found.table), before, outputs.completed, outputs.failed, job.again, took_s)


def _progress(err: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[trouble]}", style="yellow", markup=False),
        console=err,
        disable=not err.is_terminal,
    )

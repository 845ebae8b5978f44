"""Jobs of store nodes that a person watches: polled until they end, cancelled with Ctrl-C."""

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.asking import Answers, StoreRef, ask_own
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request

POLL_S = 0.2
POLL_TIMEOUT_S = 10.0
"""A node that works hard may answer late."""
LINE_S = 5.0
"""Where there is no terminal, between two lines of progress."""
CANCEL_TIMEOUT_S = 3.0

R = TypeVar("R", bound=Reply)


class Progressed(NamedTuple):
    """How far a job is."""

    done: int
    total: int
    running: bool
    note: str = ""
    forgotten: bool = False
    """The node does not know the job: it was restarted."""


class JobKind(msgspec.Struct, Generic[R], frozen=True):
    """A kind of job."""

    what: str
    kind: type[R]
    poll: Callable[[R], Request]
    cancel: Callable[[R], Request] | None
    """None: it goes on when nobody watches."""
    progress: Callable[[R], Progressed]


async def follow(
    peers: Peers, refs: Sequence[StoreRef], begun: Mapping[NodeId, R], job: JobKind[R], console: Console
) -> Answers[R]:
    """Watch jobs on several nodes until all have ended; returns their last states.

    A node that stops answering is given up after one late answer. Cancelled itself, it cancels the jobs.
    """
    states = dict(begun)
    failed: dict[NodeId, str] = {}

    def running() -> dict[NodeId, R]:
        return {n: s for n, s in states.items() if n not in failed and job.progress(s).running}

    try:
        with _bars(console, job.what) as bars:
            while True:
                bars.show({node: job.progress(state) for node, state in states.items() if node not in failed})
                if not (going := running()):
                    return Answers({node: s for node, s in states.items() if node not in failed}, failed)
                await asyncio.sleep(POLL_S)
                requests = {node: job.poll(state) for node, state in going.items()}
                answers = await ask_own(peers, refs, requests, job.kind, POLL_TIMEOUT_S)
                states.update(answers.got)
                failed.update(answers.failed)
                for node, state in answers.got.items():
                    if job.progress(state).forgotten:
                        failed[node] = f"has forgotten the {job.what}: it was restarted meanwhile"
    except asyncio.CancelledError:
        if job.cancel is None:
            console.print(f"The {job.what} goes on.", highlight=False)
            raise
        requests = {node: job.cancel(state) for node, state in running().items()}
        told = await ask_own(peers, refs, requests, job.kind, CANCEL_TIMEOUT_S)
        if told.got:
            console.print(f"Cancelled the {job.what} on {', '.join(told.got)}.", highlight=False)
        raise


class _Bars:
    """A bar per node on a terminal, else a line every few seconds."""

    def __init__(self, console: Console, what: str, progress: Progress | None) -> None:
        self._console = console
        self._what = what
        self._progress = progress
        self._tasks: dict[NodeId, TaskID] = {}
        self._told_s = clock.perf_s()

    def show(self, states: Mapping[NodeId, Progressed]) -> None:
        """The jobs as they are now."""
        if self._progress is not None:
            for node, state in states.items():
                if node not in self._tasks:
                    self._tasks[node] = self._progress.add_task(f"{self._what} {node}", note="")
                self._progress.update(
                    self._tasks[node], completed=state.done, total=max(state.total, state.done), note=state.note
                )
            return
        if clock.perf_s() - self._told_s < LINE_S:
            return
        self._told_s = clock.perf_s()
        for node, state in states.items():
            if state.running:
                line = f"{self._what} {node}: {state.done} of {max(state.total, state.done)} {state.note}"
                self._console.print(line.rstrip(), highlight=False, markup=False)


@contextmanager
def _bars(console: Console, what: str) -> Generator[_Bars, None, None]:
    if not console.is_terminal:
        yield _Bars(console, what, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=console) as progress:
        yield _Bars(console, what, progress)

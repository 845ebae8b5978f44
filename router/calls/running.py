"""The steps of one call, run at once."""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Protocol

from router.dispatch.steps import Dispatcher, Finished, Output, StepRequest, Tell
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import ClusterError

log = Log(__name__)

EVENTS_MAX = 256
"""Events between the steps and a client that reads slowly; then the steps wait."""
ABORT_TIMEOUT_S = 5.0
"""For the steps of a call that ends early to free what they hold."""

Event = tuple[int, Output | Finished]


class Running(Protocol):
    """Runs one step per request, inside a context; leaving it aborts what still runs."""

    async def __aenter__(self) -> "Running": ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def end(self, index: int) -> None:
        """Abort one step: nothing more is told of it."""
        ...

    async def next(self) -> Sequence[Event]:
        """What happened since the last call, in order; waits for something.

        Raises:
            Exception: what the first step to fail raised, once everything before it was returned.
        """
        ...


def running(dispatcher: Dispatcher, requests: Sequence[StepRequest], forks: int, tell: Tell | None) -> Running:
    """Each run of ``forks`` requests has one prompt: the others of it start when the first has its first token, and
    find the prompt's KV computed. ``tell``: of a single one."""
    return One(dispatcher, requests[0], tell) if len(requests) == 1 else Several(dispatcher, requests, forks)


class One:
    """One step, run by whoever asks for what happens: no task of its own, no queue."""

    def __init__(self, dispatcher: Dispatcher, request: StepRequest, tell: Tell | None) -> None:
        self._request = request
        self._events = dispatcher.run(request, tell)
        self._ended = False

    async def __aenter__(self) -> "One":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await self._events.aclose()
        except TimeoutError:
            log.error("steps did not end after their abort", steps=1, waited_s=ABORT_TIMEOUT_S)

    def end(self, index: int) -> None:
        self._ended = True  # with the context

    async def next(self) -> Sequence[Event]:
        assert not self._ended
        try:
            return ((0, await anext(self._events)),)
        except StopAsyncIteration:
            raise _unfinished(self._request) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _cancelled(self._request) from None


class Several:
    """Each step in a task of its own."""

    def __init__(self, dispatcher: Dispatcher, requests: Sequence[StepRequest], forks: int) -> None:
        self._dispatcher = dispatcher
        self._requests = requests
        self._happened: deque[tuple[int, Output | Finished | Exception]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        """Of the caller, where nothing has happened."""
        self._room = asyncio.Event()
        """Of the steps, where too much has."""
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: set[int] = set()
        self._failure: Exception | None = None
        self._forks = forks
        self._prompts_computed = [asyncio.Event() for _ in range(0, len(requests), forks)]

    async def __aenter__(self) -> "Several":
        self._tasks = [asyncio.create_task(self._pump(i, request)) for i, request in enumerate(self._requests)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failure = None  # it leads to its traceback, and that back here
        for task in self._tasks:
            task.cancel()
        _, stuck = await asyncio.wait(self._tasks, timeout=ABORT_TIMEOUT_S)
        if stuck:
            log.error("steps did not end after their abort", steps=len(stuck), waited_s=ABORT_TIMEOUT_S)

    def end(self, index: int) -> None:
        self._ended.add(index)
        self._tasks[index].cancel()

    async def next(self) -> Sequence[Event]:
        events: list[Event] = []
        while not events and self._failure is None:
            if not self._happened:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            self._take_all(events)
        if self._failure is not None and not events:
            raise self._failure
        return events

    def _take_all(self, events: list[Event]) -> None:
        """What has happened, up to the first failure."""
        while self._happened and self._failure is None:
            index, event = self._happened.popleft()
            if index in self._ended:
                continue
            if isinstance(event, Exception):
                self._failure = event
            else:
                events.append((index, event))
        self._room.set()

    async def _put(self, index: int, event: Output | Finished | Exception) -> None:
        while len(self._happened) >= EVENTS_MAX:
            self._room.clear()
            await self._room.wait()
        self._happened.append((index, event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _pump(self, index: int, request: StepRequest) -> None:
        try:
            computed = self._prompts_computed[index // self._forks]
            if index % self._forks:
                await computed.wait()
            async with aclosing(self._dispatcher.run(request)) as events:
                async for event in events:
                    if isinstance(event, Finished) or event.tokens:
                        computed.set()
                    await self._put(index, event)
                    if isinstance(event, Finished):
                        return
            raise _unfinished(request)
        except asyncio.CancelledError:
            if self._tasks[index].cancelling():
                raise
            await self._put(index, _cancelled(request))
        except Exception as error:
            await self._put(index, error)


def _unfinished(request: StepRequest) -> ClusterError:
    return ClusterError(f"step {request.step} ended without a terminal event")


def _cancelled(request: StepRequest) -> ClusterError:
    """A wait inside the step was cancelled, and not by us: without an answer the client would wait for ever."""
    return ClusterError(f"step {request.step} was cancelled")

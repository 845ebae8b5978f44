"""The steps of one call, run at once."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType

from router.dispatch.steps import Dispatcher, Finished, Output, StepRequest
from tracehaul.wire.errors import ClusterError

_log = logging.getLogger(__name__)

EVENTS_MAX = 256
"""Events between the steps and a client that reads slowly; then the steps wait."""
ABORT_TIMEOUT_S = 5.0
"""For the steps of a call that ends early to free what they hold."""

Event = tuple[int, Output | Finished]


class Running:
    """Runs one step per request, each in a task of its own; leaving the context aborts what still runs.

    Each run of ``forks`` requests has one prompt: the others of it start when the first has its first token, and find
    the prompt's KV computed.
    """

    def __init__(self, dispatcher: Dispatcher, requests: Sequence[StepRequest], forks: int = 1) -> None:
        self._dispatcher = dispatcher
        self._requests = requests
        self._queue: asyncio.Queue[tuple[int, Output | Finished | Exception]] = asyncio.Queue(EVENTS_MAX)
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: set[int] = set()
        self._failure: Exception | None = None
        self._forks = forks
        self._prompts_computed = [asyncio.Event() for _ in range(0, len(requests), forks)]

    async def __aenter__(self) -> "Running":
        self._tasks = [asyncio.create_task(self._pump(i, request)) for i, request in enumerate(self._requests)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        _, stuck = await asyncio.wait(self._tasks, timeout=ABORT_TIMEOUT_S)
        if stuck:
            _log.error("%d steps did not end within %s s of their abort", len(stuck), ABORT_TIMEOUT_S)

    def end(self, index: int) -> None:
        """Abort one step: nothing more is told of it."""
        self._ended.add(index)
        self._tasks[index].cancel()

    async def next(self, silence_s: float | None) -> list[Event]:
        """What happened since the last call, in order; waits for something, and returns nothing after ``silence_s``.

        Raises:
            Exception: what the first step to fail raised, once everything before it was returned.
        """
        if self._failure is not None:
            raise self._failure
        events: list[Event] = []
        try:
            async with asyncio.timeout(silence_s):
                while not events and self._failure is None:
                    self._take(await self._queue.get(), events)
        except TimeoutError:
            return []
        while self._failure is None and not self._queue.empty():
            self._take(self._queue.get_nowait(), events)
        if self._failure is not None and not events:
            raise self._failure
        return events

    def _take(self, item: tuple[int, Output | Finished | Exception], events: list[Event]) -> None:
        index, event = item
        if index in self._ended:
            return
        if isinstance(event, Exception):
            self._failure = event
        else:
            events.append((index, event))

    async def _pump(self, index: int, request: StepRequest) -> None:
        try:
            computed = self._prompts_computed[index // self._forks]
            if index % self._forks:
                await computed.wait()
            async with aclosing(self._dispatcher.run(request)) as events:
                async for event in events:
                    if isinstance(event, Finished) or event.tokens:
                        computed.set()
                    await self._queue.put((index, event))
                    if isinstance(event, Finished):
                        return
            raise ClusterError(f"step {request.step} ended without a terminal event")
        except asyncio.CancelledError:
            if self._tasks[index].cancelling():
                raise
            # A wait inside the step was cancelled, and not by us: without an answer the client would wait for ever.
            await self._queue.put((index, ClusterError(f"step {request.step} was cancelled")))
        except Exception as error:
            await self._queue.put((index, error))

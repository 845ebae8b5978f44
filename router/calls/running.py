"""The steps of one call, run at once."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType

from router.dispatch.steps import Dispatcher, Finished, Output, StepRequest
from tracehaul.runtime.patience import Patience
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
    the prompt's KV computed. After ``silence_s`` in which nothing happened that is told; None: never.
    """

    def __init__(
        self, dispatcher: Dispatcher, requests: Sequence[StepRequest], forks: int, silence_s: float | None
    ) -> None:
        self._dispatcher = dispatcher
        self._requests = requests
        self._silence_s = silence_s
        self._patience: Patience | None = None
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

    async def __aenter__(self) -> "Running":
        self._patience = None if self._silence_s is None else Patience(self._silence_s)
        self._tasks = [asyncio.create_task(self._pump(i, request)) for i, request in enumerate(self._requests)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._patience is not None:
            self._patience.close()
        self._failure = None  # it leads to its traceback, and that back here
        for task in self._tasks:
            task.cancel()
        _, stuck = await asyncio.wait(self._tasks, timeout=ABORT_TIMEOUT_S)
        if stuck:
            _log.error("%d steps did not end within %s s of their abort", len(stuck), ABORT_TIMEOUT_S)

    def end(self, index: int) -> None:
        """Abort one step: nothing more is told of it."""
        self._ended.add(index)
        self._tasks[index].cancel()

    async def next(self) -> list[Event]:
        """What happened since the last call, in order; waits for something, and returns nothing after silence.

        Raises:
            Exception: what the first step to fail raised, once everything before it was returned.
        """
        events: list[Event] = []
        while not events and self._failure is None:
            if not self._happened and not await self._something():
                return []
            self._take_all(events)
        if self._failure is not None and not events:
            raise self._failure
        return events

    async def _something(self) -> bool:
        """Wait until something happens; False: nothing did for too long."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            if self._patience is None:
                await waiter
            else:
                with self._patience:
                    await waiter
        except TimeoutError:
            return False
        finally:
            self._waiter = None
        return True

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
            raise ClusterError(f"step {request.step} ended without a terminal event")
        except asyncio.CancelledError:
            if self._tasks[index].cancelling():
                raise
            # A wait inside the step was cancelled, and not by us: without an answer the client would wait for ever.
            await self._put(index, ClusterError(f"step {request.step} was cancelled"))
        except Exception as error:
            await self._put(index, error)

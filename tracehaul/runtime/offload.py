"""Blocking work off the event loop, behind an interface the simulator can run inline."""

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

yield_core = ctypes.CDLL(None).sched_yield
"""Lets whoever waits for this core have it, and lets go of the interpreter lock meanwhile, which :func:`os.sched_yield`
does not. A thread that does nothing but copy or sum is not interrupted before the kernel's next tick, up to 4 ms away,
and an event loop that was woken waits for that. Costs about a microsecond where nobody waits."""


class Offload(Protocol):
    """Runs blocking functions so that the event loop stays free."""

    async def run(self, function: Callable[[], T]) -> T:
        """Result of ``function()``; its exception propagates. Cancelling the wait does not stop the function."""
        ...

    async def turns(self, *work: Iterator[object]) -> None:
        """Exhaust each iterator, all of them beside each other as far as threads go.

        Each ``next`` is a turn: what has waited longer than it comes before the next one, so long work does not
        hold up short. Exceptions propagate, the first one's, once all have ended. Cancelling stops nothing.
        """
        ...

    def close(self) -> None:
        """Let running functions and turns end; start none: who waits for one gets CancelledError."""
        ...


class ThreadOffload:
    """Runs functions on up to ``threads`` daemon threads of its own, in order of arrival."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._name = name
        self._waiting: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads_max = threads
        self._threads = 0
        self._closed = False

    async def run(self, function: Callable[[], T]) -> T:
        return await self._submit(_Job(function))

    async def turns(self, *work: Iterator[object]) -> None:
        futures = [self._submit(_Turns(iterator)) for iterator in work]
        if futures:
            await asyncio.wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        self._closed = True
        self._end()

    def _end(self) -> None:
        """Whatever still waits is not run; every thread that looks for more ends."""
        with contextlib.suppress(Empty):
            while True:
                job = self._waiting.get_nowait()
                if job is not None:
                    job.give_up()
        self._waiting.put(None)

    def _submit(self, job: "_Job") -> "asyncio.Future[Any]":
        if self._closed:
            raise RuntimeError(f"{self._name} was closed")
        if self._threads < self._threads_max:
            self._threads += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._waiting.put(job)
        return job.future

    def _work(self) -> None:
        waiting = self._waiting
        while (job := waiting.get()) is not None:
            while not job.advance():
                if self._closed:
                    job.give_up()
                    break
                if not waiting.empty():
                    waiting.put(job)
                    break
                yield_core()
        self._end()  # for the next thread, and for what was put back meanwhile


class _Job:
    """A function and who waits for its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def advance(self) -> bool:
        """On a thread: do a turn; True if it was the last."""
        try:
            result, error = self._function(), None
        except BaseException as raised:
            result, error = None, raised
        self._tell(result, error)
        return True

    def give_up(self) -> None:
        """It will not be advanced again."""
        self._tell(None, asyncio.CancelledError())

    def _tell(self, result: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if isinstance(error, asyncio.CancelledError):
            self.future.cancel()
        elif error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _Turns(_Job):
    """An iterator to be exhausted."""

    def __init__(self, iterator: Iterator[object]) -> None:
        super().__init__(lambda: next(iterator))

    def advance(self) -> bool:
        try:
            self._function()
        except StopIteration:
            self._tell(None, None)
        except BaseException as raised:
            self._tell(None, raised)
        else:
            return False
        return True


class InlineOffload:
    """Runs functions in place: for the simulator and for tests. Yields once, so that others may run first."""

    async def run(self, function: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        return function()

    async def turns(self, *work: Iterator[object]) -> None:
        for iterator in work:
            await asyncio.sleep(0)
            for _ in iterator:
                await asyncio.sleep(0)

    def close(self) -> None:
        pass

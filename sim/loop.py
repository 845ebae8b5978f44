"""An event loop whose clock is virtual: it jumps to the next timer instead of waiting for it.

An hour's timeout costs microseconds, and the order of everything is a function of the seed alone: callbacks run
in the order they were scheduled, and tasks and futures hash by creation, so that even a set of them iterates the
same way in every process. What it cannot run: threads, sockets, child processes.

Callbacks belong to the simulated process named by :data:`PROCESS` in their context. A frozen process runs none of
them until it thaws, and then finds its timers late, as after SIGSTOP; one that never thaws is one that was killed,
with not even a ``finally`` run.
"""

# Handles, timers and the selector are private in asyncio; this module stands in for them.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false

import asyncio
import gc
import heapq
import random
from asyncio import base_events
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

from blake3 import blake3

T = TypeVar("T")

PROCESS: ContextVar[str] = ContextVar("process", default="")
"""Which simulated process the running code belongs to; empty is the world outside of all of them."""

_TASKS_LEFT_MAX_ROUNDS = 100
_NO_WAY_FORWARD = "no callback is ready and no timer is set: what is awaited can never happen"


class Deadlock(Exception):
    """Everything waits for something that can never happen."""


class LivelockError(Exception):
    """Virtual time stands still while callbacks keep running."""


class _Task(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address."""

    def __init__(self, coro: Any, *, loop: "VirtualLoop", **kwargs: Any) -> None:
        self._number = loop.next_number()  # first: the base class puts the task into a set
        super().__init__(coro, loop=loop, **kwargs)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    """A future whose place in a set does not depend on its address."""

    def __init__(self, *, loop: "VirtualLoop") -> None:
        self._number = loop.next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class _Handle(asyncio.Handle):
    """A callback that waits while its process is frozen."""

    _loop: "VirtualLoop"

    def _run(self) -> None:
        if not (self._loop.frozen and park(self, self._loop)):
            super()._run()


class _Timer(asyncio.TimerHandle):
    """A timer that fires late if its process is frozen when it is due."""

    _loop: "VirtualLoop"

    def _run(self) -> None:
        if not (self._loop.frozen and park(self, self._loop)):
            super()._run()


def park(handle: asyncio.Handle, loop: "VirtualLoop") -> bool:
    """Keep ``handle`` for later if its process is frozen."""
    process = handle._context.get(PROCESS, "")
    if process not in loop.frozen:
        return False
    loop.frozen[process].append(handle)
    return True


class _Selector:
    """Stands where the operating system's selector stands: asked to wait, it moves the clock."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop = loop
        self._still = 0

    def select(self, timeout_s: float | None) -> list[Any]:
        if timeout_s is None:
            raise Deadlock(_NO_WAY_FORWARD)
        if timeout_s > 0:
            self._loop.advance(timeout_s)
            self._still = 0
        self._still += 1
        if self._still > self._loop.rounds_max:
            rounds, self._still = self._still, 0  # what was spinning can still be cancelled
            raise LivelockError(f"{rounds} rounds of callbacks at {self._loop.time():.6f} s")
        return []

    def close(self) -> None:
        """Nothing to close: the base class asks for it."""


class VirtualLoop(base_events.BaseEventLoop):
    """See the module. ``errors`` collects what nobody caught; ``digest`` stands for everything that happened."""

    rounds_max = 100_000
    """Rounds of callbacks without any time passing before that counts as a livelock."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._numbers = 0
        self._history = blake3()
        # The base class leaves waiting to a selector that its subclasses bring.
        self._selector = _Selector(self)
        self.errors: list[str] = []
        self.frozen: dict[str, list[asyncio.Handle]] = {}
        """Callbacks that are due in each frozen process."""
        self.set_exception_handler(self._on_error)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move the clock; only the selector calls this."""
        self._now_s += seconds
        self._history.update(f"{self._now_s:.9f};{self._numbers}\n".encode())

    def record(self, line: str) -> None:
        """Make ``line`` part of the digest."""
        self._history.update(f"{self._now_s:.9f} {line}\n".encode())

    def digest(self) -> str:
        """Hash of every move of the clock, the number of tasks and futures made by then, and recorded lines."""
        return self._history.hexdigest()[:32]

    def freeze(self, process: str) -> None:
        """Run no callback of ``process`` from now on."""
        assert process
        self.frozen.setdefault(process, [])

    def thaw(self, process: str) -> None:
        """Let it go on, with everything that became due meanwhile; harmless if it is not frozen."""
        self._ready.extend(self.frozen.pop(process, []))

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, copy_context() if context is None else context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, copy_context() if context is None else context)
        self._ready.append(handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        """There is one thread; asyncio itself calls this for generators that were left open."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Threads have no virtual time: whoever wants one must take an ``Offload``."""
        raise AssertionError(f"a thread in the simulator, for {func!r}")

    def next_number(self) -> int:
        """Numbers tasks and futures by creation."""
        self._numbers += 1
        return self._numbers

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any], **kwargs: Any
    ) -> asyncio.Task[Any]:
        return _Task(coro, loop=self, **kwargs)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.errors.append(f"{context['message']}: {error!r}")

    def _process_events(self, event_list: list[Any]) -> None:
        """No files, no events."""

    def _write_to_self(self) -> None:
        """No other thread to be woken by."""


def run(main: Callable[[], Coroutine[Any, Any, T]], seed: int = 0) -> T:
    """Result of ``main()`` on a fresh virtual loop; tasks that it left behind are cancelled and awaited.

    Raises:
        Deadlock: ``main`` waits for something that can never happen.
        LivelockError: callbacks keep running while no time passes.
    """
    random.seed(seed)  # for code that draws without a generator of its own, such as a library
    collecting = gc.isenabled()
    gc.disable()  # a collection at another moment would close generators at another moment
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main())
    finally:
        _cancel_all(loop)
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()
        if collecting:
            gc.enable()


def _cancel_all(loop: VirtualLoop) -> None:
    for process in list(loop.frozen):
        loop.thaw(process)
    for _ in range(_TASKS_LEFT_MAX_ROUNDS):
        left = sorted(asyncio.all_tasks(loop), key=hash)
        if not left:
            return
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.wait(left, timeout=1.0))
    raise AssertionError(f"tasks that cannot be cancelled: {asyncio.all_tasks(loop)}")

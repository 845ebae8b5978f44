"""Background tasks with an owner: none is forgotten, none fails in silence, all end with it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn

from tracehaul.runtime.log import Log

log = Log(__name__)


class Tasks:
    """Owns tasks that run beside their starter. Use as ``async with``, or call :meth:`close`.

    A task's exception is logged when it happens; the first one is kept for :meth:`crash`. Other tasks go on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: dict[asyncio.Task[Any], None] = {}
        self._first_error: BaseException | None = None
        self._crashed = asyncio.Event()
        self._closed = False

    async def __aenter__(self) -> "Tasks":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, work: Coroutine[Any, Any, object], name: str) -> asyncio.Task[Any]:
        """Run ``work`` beside the caller; ``name`` appears in logs. Not after :meth:`close`."""
        if self._closed:
            work.close()
        assert not self._closed, f"{self._name} is closed, {name} cannot start"
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}.{name}")
        self._running[task] = None
        task.add_done_callback(self._on_done)
        return task

    async def crash(self) -> NoReturn:
        """Wait until a task fails, then raise what it raised: a process's main waits here."""
        await self._crashed.wait()
        assert self._first_error is not None
        raise self._first_error

    async def close(self) -> None:
        """Cancel all tasks and wait until they ended."""
        self._closed = True
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(list(self._running))
            await asyncio.sleep(0)  # let the callbacks take them off the list

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._running.pop(task, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        log.error("task crashed", task=task.get_name(), error=error)
        if self._first_error is None:
            self._first_error = error
            self._crashed.set()

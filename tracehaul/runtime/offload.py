"""Blocking work off the event loop, behind an interface the simulator can run inline."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Offload(Protocol):
    """Runs a blocking function so that the event loop stays free."""

    async def run(self, function: Callable[[], T]) -> T:
        """Result of ``function()``; its exception propagates. Cancelling the wait does not stop the function."""
        ...

    def close(self) -> None:
        """Let running functions end; start none."""
        ...


class ThreadOffload:
    """Runs functions on up to ``threads`` threads of its own, in order of arrival."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class InlineOffload:
    """Runs functions in place: for the simulator and for tests. Yields once, so that others may run first."""

    async def run(self, function: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        return function()

    def close(self) -> None:
        pass

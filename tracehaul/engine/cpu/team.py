"""Threads that run one compiled function together."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch


class Team:
    """The caller's thread and ``size - 1`` helpers, each with scratch memory of its own."""

    def __init__(self, size: int, scratch_bytes: int) -> None:
        assert size > 0
        self._helpers = ThreadPoolExecutor(size - 1, thread_name_prefix="compute-helper") if size > 1 else None
        self._scratch = [torch.empty(scratch_bytes, dtype=torch.uint8) for _ in range(size)]
        self._running: list[Future[bool]] = []

    def run(self, function: Callable[[int], bool]) -> bool:
        """Call ``function(scratch address)`` on every thread; returns when the caller's own call has, and what it did.

        Helpers may end later, or not have begun: the function shares its work out by itself, and what it touches
        must live until the next call, which waits for them.
        """
        self.settle()
        if self._helpers is not None:
            self._running = [self._helpers.submit(function, own.data_ptr()) for own in self._scratch[1:]]
        return function(self._scratch[0].data_ptr())

    def settle(self) -> None:
        """Wait for helpers of the last call."""
        running, self._running = self._running, []
        wait(running)
        for future in running:
            future.result()

    def close(self) -> None:
        """End the helpers."""
        self.settle()
        if self._helpers is not None:
            self._helpers.shutdown()

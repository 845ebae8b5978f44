"""Waits that follow each other, most of them short, and that others may end.

As a :func:`asyncio.timeout` that is rescheduled, but without a timer for each wait: that costs more than a short wait.
"""

import asyncio
from types import TracebackType


class Interruptible:
    """Waits that others may end: ``with interruptible: await ...``. One at a time, of one task or another."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        """Who waits now."""
        self._cancelling = 0
        self._error: Exception | None = None
        """What the wait was ended with."""

    def __enter__(self) -> None:
        assert self._task is None
        task = asyncio.current_task(self._loop)
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._error is not None:
            assert task is not None
            ended, self._error = self._error, None
            # Where somebody else has cancelled the task too, that counts.
            if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                raise ended from None

    def interrupt(self, error: Exception) -> bool:
        """Who waits now gets ``error`` instead; False: nobody does, or was told already."""
        if self._task is None or self._error is not None:
            return False
        self._error = error
        self._task.cancel()
        return True

"""Waits that follow each other, most of them short, and that may have to end early.

As :func:`asyncio.timeout`, but without a timer for each wait: setting and taking back a timer costs more than a short
wait.
"""

import asyncio
from types import TracebackType


class Interruptible:
    """Waits that others may end: ``with interruptible: await ...``. One at a time, of one task or another."""

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        """Who waits now."""
        self._cancelling = 0
        self._error: Exception | None = None
        """What the wait was ended with."""

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert self._task is None
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

    @property
    def waits(self) -> bool:
        """Somebody does now."""
        return self._task is not None

    def interrupt(self, error: Exception) -> bool:
        """Who waits now gets ``error`` instead; False: nobody does, or was told already."""
        if self._task is None or self._error is not None:
            return False
        self._error = error
        self._task.cancel()
        return True


class Patience(Interruptible):
    """Ends a wait that takes longer than ``seconds`` with TimeoutError: ``with patience: await ...``."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._since_s = 0.0

    def __enter__(self) -> None:
        super().__enter__()
        self._since_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._check)

    def close(self) -> None:
        """No wait follows."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._task is None:
            return
        left_s = self._since_s + self._seconds - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check)
        else:
            self.interrupt(TimeoutError())

"""A timeout for many waits that follow each other, most of them short."""

import asyncio
from types import TracebackType


class Patience:
    """Ends a wait that takes longer than ``seconds`` with TimeoutError: ``with patience: await ...``.

    One at a time, of one task or another. As :func:`asyncio.timeout`, but with one timer for all waits instead of one
    for each: setting and taking back a timer costs more than a short wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        """Who waits now."""
        self._cancelling = 0
        self._since_s = 0.0
        self._expired = False

    def __enter__(self) -> None:
        assert self._task is None
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling, self._since_s = task, task.cancelling(), self._loop.time()
        self._expired = False
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._check)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        # Where somebody else has cancelled the task too, that counts.
        if self._expired and task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

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
            return
        self._expired = True
        self._task.cancel()

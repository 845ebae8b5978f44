"""What all transports share: checking ranges, and waiting for bytes that no one can call back."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tracehaul.runtime import clock
from tracehaul.transfer.base import Copy, TransferTimedOut
from tracehaul.wire.errors import TransferError, TransferLost

T = TypeVar("T")

COPIES_MAX = 65536
"""Most copies in one transfer."""


def check_copies(copies: Sequence[Copy], local_nbytes: int, remote_nbytes: int) -> int:
    """Total bytes of ``copies``, all of them inside both regions.

    Raises:
        TransferError: one is not, or there are too many.
    """
    if len(copies) > COPIES_MAX:
        raise TransferError(f"{len(copies)} copies in one transfer; at most {COPIES_MAX}")
    total = 0
    for local_offset, remote_offset, nbytes in copies:
        if local_offset < 0 or remote_offset < 0 or nbytes < 0:
            raise TransferError(f"negative range: local {local_offset}, remote {remote_offset}, {nbytes} bytes")
        if local_offset + nbytes > local_nbytes:
            raise TransferError(f"local range {local_offset}+{nbytes} is outside a region of {local_nbytes} bytes")
        if remote_offset + nbytes > remote_nbytes:
            raise TransferError(f"remote range {remote_offset}+{nbytes} is outside a region of {remote_nbytes} bytes")
        total += nbytes
    return total


async def land(work: asyncio.Future[T], timeout_s: float, what: str, stop: Callable[[], None]) -> T:
    """Wait until ``work`` (bytes under way) is over, at most ``timeout_s``; its result or exception propagates.

    ``stop`` is called once if the caller gives up, by the deadline or by cancellation, before ``work`` is over:
    it may start nothing new, but what is under way still lands. Hence a cancelled call ends, with
    CancelledError, only when ``work`` does, and at the deadline with TransferTimedOut like any other.
    """
    deadline_s = clock.now_s() + timeout_s
    cancelled = False
    while not work.done():
        left_s = deadline_s - clock.now_s()
        if left_s <= 0:
            if not cancelled:
                stop()
            raise TransferTimedOut(f"{what}: not done after {timeout_s:g} s", settled_after(work))
        try:
            await asyncio.wait({work}, timeout=left_s)
        except asyncio.CancelledError:
            if not cancelled and not work.done():
                stop()
            cancelled = True
    if cancelled:
        if not work.cancelled():
            work.exception()  # seen: nobody is left to tell
        raise asyncio.CancelledError
    if work.cancelled():
        raise TransferLost(f"{what}: this side closed its transport")
    return work.result()


def settled_after(work: asyncio.Future[Any]) -> asyncio.Future[None]:
    """A future that is done when ``work`` is over, whatever its outcome."""
    settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def over(done: asyncio.Future[Any]) -> None:
        if not done.cancelled():
            done.exception()  # seen
        if not settled.done():
            settled.set_result(None)

    work.add_done_callback(over)
    return settled

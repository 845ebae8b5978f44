"""What reading and writing blocks share: transfers whose buffers outlive them, and checksums off the loop."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from kvstore.staging import StagingBuffer
from tracehaul.runtime import clock
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import TransferTimedOut
from tracehaul.wire.errors import ClusterError, DeadlineExceeded
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import Checksum

INLINE_BYTES_MAX = 128 << 10
"""Bytes hashed on the event loop rather than handed to a thread: some ten microseconds."""


async def transfer(
    copying: Coroutine[None, None, None],
    buffers: Sequence[StagingBuffer],
    on_late: Callable[[], None] | None = None,
) -> None:
    """Await a transfer from or into ``buffers``; if it is left behind, hold them until it settles.

    A cancelled wait ends at once; ``on_late`` is called when the transfer that it leaves behind has settled.

    Raises:
        TransferError: as the transfer does.
    """
    task = asyncio.get_running_loop().create_task(copying)
    try:
        await asyncio.shield(task)
    except TransferTimedOut as error:
        for buffer in buffers:
            buffer.hold(error.settled)
        raise
    except asyncio.CancelledError:
        task.cancel()  # starts nothing new; what is under way still lands
        settled = asyncio.get_running_loop().create_task(_settle(task))
        if on_late is not None:
            settled.add_done_callback(lambda _: on_late())
        for buffer in buffers:
            buffer.hold(settled)
        raise


async def _settle(task: asyncio.Task[None]) -> None:
    try:
        await task
    except TransferTimedOut as error:
        await error.settled
    except (ClusterError, asyncio.CancelledError):
        pass


async def checksums(offload: Offload, views: Sequence[memoryview]) -> list[Checksum]:
    """The checksum of each view; on the event loop only if that is short."""
    if sum(view.nbytes for view in views) <= INLINE_BYTES_MAX:
        return [checksum(view) for view in views]
    return await offload.run(lambda: [checksum(view) for view in views])


def left_s(deadline_s: float) -> float:
    """Time until the deadline.

    Raises:
        DeadlineExceeded: none.
    """
    left_s = deadline_s - clock.now_s()
    if left_s <= 0:
        raise DeadlineExceeded("no time left")
    return left_s

"""What reading and writing blocks share: transfers whose buffers outlive them, lanes, checksums off the loop."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from kvstore.client.staging import StagingBuffer
from tracehaul.runtime import clock
from tracehaul.runtime.finish import finish
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import TransferTimedOut
from tracehaul.wire.errors import ClusterError, TimedOut
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import Checksum

INLINE_BYTES_MAX = 128 << 10
"""Bytes hashed on the event loop rather than handed to a thread: some ten microseconds."""
TURN_BYTES = 1 << 20
"""Hashed by a thread before others that wait for it have their turn."""

T = TypeVar("T")


async def transfer(
    copying: Coroutine[None, None, T],
    buffers: Sequence[StagingBuffer],
    on_late: Callable[[], None] | None = None,
) -> T:
    """Result of a transfer from or into ``buffers``; if it is left behind, they are held until it settles.

    A cancelled wait ends at once; ``on_late`` is called when the transfer that it leaves behind has settled.

    Raises:
        TransferError: as the transfer does.
    """
    task = asyncio.get_running_loop().create_task(copying)
    try:
        return await asyncio.shield(task)
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


async def _settle(task: asyncio.Task[Any]) -> None:
    try:
        await task
    except TransferTimedOut as error:
        await error.settled
    except (ClusterError, asyncio.CancelledError):
        pass


def parts_of(items: Sequence[T], nbytes: Callable[[T], int], part_bytes: int) -> list[list[T]]:
    """``items`` in order, in lists that end once they have ``part_bytes``."""
    if sum(map(nbytes, items)) <= part_bytes:
        return [list(items)] if items else []
    parts: list[list[T]] = []
    room = 0
    for item in items:
        if room <= 0:
            parts.append([])
            room = part_bytes
        parts[-1].append(item)
        room -= nbytes(item)
    return parts


async def in_lanes(work: Callable[[T], Coroutine[None, None, None]], parts: Sequence[T], lanes: int) -> None:
    """``work`` on each part, begun in order, up to ``lanes`` at a time.

    After an error no further part is begun; it propagates once those under way have ended. A cancelled call
    cancels those under way.
    """
    if len(parts) == 1:
        await work(parts[0])
        return
    left = iter(parts)
    stopped = False

    async def lane() -> None:
        nonlocal stopped
        for part in left:
            if stopped:
                return
            try:
                await work(part)
            except BaseException:
                stopped = True
                raise

    tasks = [asyncio.get_running_loop().create_task(lane()) for _ in range(min(lanes, len(parts)))]
    if not tasks:
        return
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await finish(asyncio.wait(tasks))
        raise
    for task in tasks:
        task.result()


async def checksums(offload: Offload, views: Sequence[memoryview]) -> list[Checksum]:
    """The checksum of each view; on the event loop only if that is short, else in turns with others."""
    if sum(view.nbytes for view in views) <= INLINE_BYTES_MAX:
        return [checksum(view) for view in views]
    sums: list[Checksum] = []
    await offload.turns(_summing(views, sums))
    return sums


def _summing(views: Sequence[memoryview], sums: list[Checksum]) -> Iterator[None]:
    left = TURN_BYTES
    for view in views:
        if left <= 0:
            yield
            left = TURN_BYTES
        sums.append(checksum(view))
        left -= view.nbytes


def left_s(deadline_s: float) -> float:
    """Time until the deadline.

    Raises:
        TimedOut: none.
    """
    left_s = deadline_s - clock.now_s()
    if left_s <= 0:
        raise TimedOut("no time left")
    return left_s

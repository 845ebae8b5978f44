"""Buffers between the data plane and the engine: where blocks land, and where they leave from."""

import asyncio
from collections import deque
from collections.abc import Sequence

from tracehaul.transfer.base import Memory
from tracehaul.wire.errors import Overloaded, TimedOut

WAITERS_MAX = 1024


class StagingBuffer:
    """One block's room in registered memory."""

    __slots__ = ("_holds", "_view", "nbytes", "offset", "spoilt")

    lent = False
    """Whether it is of memory that others own: there is no other in its place."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self._view = view
        self.offset = offset
        """From the start of the registered memory."""
        self.nbytes = view.nbytes
        """Its room."""
        self.spoilt = False
        """Its bytes may have changed while they were put, which only who puts them knows: they are not published."""
        self._holds: list[asyncio.Future[None]] = []

    def view(self, nbytes: int) -> memoryview:
        """Its first ``nbytes`` bytes."""
        assert nbytes <= self.nbytes
        return self._view[:nbytes]

    def trade(self, other: "StagingBuffer") -> None:
        """Exchange memory with another buffer, and what may still touch it: what was landed here is there."""
        self._view, other._view = other._view, self._view
        self.offset, other.offset = other.offset, self.offset
        self.nbytes, other.nbytes = other.nbytes, self.nbytes
        self._holds, other._holds = other._holds, self._holds

    def hold(self, settled: asyncio.Future[None]) -> None:
        """A transfer may touch these bytes until ``settled`` is done: the pool takes the buffer back only then."""
        self._holds.append(settled)

    def unsettled(self) -> asyncio.Future[None] | None:
        """A transfer that may still touch these bytes, if there is one."""
        while self._holds:
            if not self._holds[-1].done():
                return self._holds[-1]
            self._holds.pop()
        return None


class LentBuffer(StagingBuffer):
    """A block of somebody else's memory, which only a transport that copies by itself knows by its offset."""

    __slots__ = ()

    lent = True

    def __init__(self, nbytes: int, offset: int) -> None:
        super().__init__(memoryview(b""), offset)
        self.nbytes = nbytes


class Staging:
    """A pool of equal buffers over one registered memory, given out first come first served."""

    def __init__(self, memory: Memory, buffer_bytes: int) -> None:
        assert 0 < buffer_bytes <= memory.buffer.nbytes
        offsets = range(0, memory.buffer.nbytes - buffer_bytes + 1, buffer_bytes)
        self._free = deque([StagingBuffer(memory.buffer[at : at + buffer_bytes], at) for at in offsets])
        self._waiters: deque[tuple[int, asyncio.Future[list[StagingBuffer]]]] = deque()
        self.count = len(offsets)
        """Buffers in all."""
        self.quarantined = 0
        """Released buffers that an unsettled transfer may still touch."""

    @property
    def free(self) -> int:
        """Buffers that nobody holds."""
        return len(self._free)

    async def acquire(self, count: int, timeout_s: float) -> list[StagingBuffer]:
        """``count`` buffers, all or none; at most ``self.count``. Give each back with :meth:`release`.

        Raises:
            TimedOut: not within ``timeout_s``.
            Overloaded: too many callers wait.
        """
        assert 0 < count <= self.count
        if not self._waiters and count <= len(self._free):
            return self._take(count)
        if len(self._waiters) >= WAITERS_MAX:
            raise Overloaded("too many wait for staging buffers")
        future: asyncio.Future[list[StagingBuffer]] = asyncio.get_running_loop().create_future()
        waiter = (count, future)
        self._waiters.append(waiter)
        taken = False
        try:
            async with asyncio.timeout(timeout_s):
                buffers = await asyncio.shield(future)
            taken = True
            return buffers
        except TimeoutError:
            raise TimedOut(f"no {count} staging buffers within {timeout_s:g} s") from None
        finally:
            if not taken:
                if future.done():
                    self.release(future.result())  # they came with the cancellation
                else:
                    self._waiters.remove(waiter)
                    self._serve()

    def spare(self) -> StagingBuffer | None:
        """A buffer, if one is free and nobody waits for it. Give it back with :meth:`release`."""
        return self._free.popleft() if self._free and not self._waiters else None

    def release(self, buffers: Sequence[StagingBuffer]) -> None:
        """Give buffers back; one that a transfer may still touch returns to the pool when that settles."""
        for buffer in buffers:
            unsettled = buffer.unsettled()
            if unsettled is None:
                self._free.append(buffer)
            else:
                self.quarantined += 1
                unsettled.add_done_callback(lambda _, buffer=buffer: self._settled(buffer))
        self._serve()

    def _settled(self, buffer: StagingBuffer) -> None:
        self.quarantined -= 1
        self.release([buffer])

    def _take(self, count: int) -> list[StagingBuffer]:
        return [self._free.popleft() for _ in range(count)]

    def _serve(self) -> None:
        while self._waiters and self._waiters[0][0] <= len(self._free):
            count, future = self._waiters.popleft()
            future.set_result(self._take(count))

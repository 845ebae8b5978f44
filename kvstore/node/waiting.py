"""Who waits at a node for blocks that others are writing."""

import asyncio
from collections.abc import Iterable

from tracehaul.wire.errors import Overloaded
from tracehaul.wire.ids import BlockHash


class Waiters:
    """Bounded waits, each for a set of reservations to end."""

    def __init__(self, waiters_max: int) -> None:
        self.waiters_max = waiters_max
        self._waiters: dict[_Waiter, None] = {}
        self._by_hash: dict[BlockHash, dict[_Waiter, None]] = {}

    def __len__(self) -> int:
        """Open waits."""
        return len(self._waiters)

    async def wait(self, hashes: Iterable[BlockHash], timeout_s: float) -> None:
        """Return when the reservation of each of ``hashes`` has ended, or after ``timeout_s``.

        All of them must be reserved now.

        Raises:
            Overloaded: too many wait already.
        """
        waiter = _Waiter(dict.fromkeys(hashes))
        if not waiter.pending or not timeout_s > 0:
            return
        if len(self._waiters) >= self.waiters_max:
            raise Overloaded(f"{len(self._waiters)} requests wait for blocks already")
        self._waiters[waiter] = None
        for block_hash in waiter.pending:
            self._by_hash.setdefault(block_hash, {})[waiter] = None
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.done.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiters[waiter]
            for block_hash in waiter.pending:
                waiting = self._by_hash[block_hash]
                del waiting[waiter]
                if not waiting:
                    del self._by_hash[block_hash]

    def ended(self, hashes: Iterable[BlockHash]) -> None:
        """The reservations of these have ended."""
        for block_hash in hashes:
            for waiter in self._by_hash.pop(block_hash, ()):
                del waiter.pending[block_hash]
                if not waiter.pending:
                    waiter.done.set()


class _Waiter:
    def __init__(self, pending: dict[BlockHash, None]) -> None:
        self.pending = pending
        self.done = asyncio.Event()

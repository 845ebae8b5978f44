"""Blocks between the engine's own pages and stores of the same host, with no copy in between.

Shared memory is copied by this process's own threads, so pages can be had back at once, whatever becomes of the store:
a get that is given up touches no page any more when it returns, and a put publishes nothing that may have changed while
it was read.
"""

import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from engines.blocks.joined import Joined
from engines.blocks.pages import HostPage, Page
from kvstore.client import LentBuffer, OutgoingBlock
from kvstore.client.writer import PutOutcome
from tracehaul.runtime import clock
from tracehaul.transfer.pieces import Pieces
from tracehaul.wire.ids import BlockHash

T = TypeVar("T")

NEAR = frozenset({"shm"})
"""How every store is reached, if all are on this host."""
GOOD = ("published", "present")
"""Outcomes of a put after which a block can be got."""


class Work(Protocol):
    """How a thread has the store's loop do something."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> "concurrent.futures.Future[T] | None":
        """None: the loop has ended."""
        ...


class Beside:
    """A put that nobody waits for, of pages that are read where they are."""

    def __init__(self, buffers: Sequence[LentBuffer]) -> None:
        self._buffers = buffers
        self.count = len(buffers)
        """Of the first pages."""
        self.done = False
        """Whether the pages are read no more."""

    def spoil(self, place: int) -> None:
        """That page is about to change; it is not published unless it was read before. Waits for nothing."""
        self._buffers[place].spoilt = True


class Direct:
    """Of one engine's store; from any thread, but for what says otherwise."""

    def __init__(self, joined: Joined, submit: Work, bytes_max: int) -> None:
        """``bytes_max``: the most pages that are put while nobody waits for it."""
        self._joined = joined
        self._submit = submit
        self._bytes_max = bytes_max
        self._bytes = 0
        self._lock = threading.Lock()

    def lends(self, pages: Sequence[Page]) -> Pieces | None:
        """The pages as they can be lent; None: they cannot, or a store is elsewhere."""
        if self._joined.lending is None or not pages or self._joined.client.kinds() != NEAR:
            return None
        first = pages[0]
        if not isinstance(first, HostPage) or not Pieces.fit(first.sizes):
            return None
        rows: list[Any] = []
        for page in pages:
            if not isinstance(page, HostPage):
                return None
            if page.sizes is not first.sizes and not np.array_equal(page.sizes, first.sizes):
                return None
            rows.append(page.addresses)
        return Pieces(np.stack(rows), first.sizes, pages)

    def get(
        self, hashes: Sequence[BlockHash], pieces: Pieces, wait: Callable[[Any], Any], timeout_s: float
    ) -> list[bool]:
        """Land blocks; whether each did. ``wait`` for the result, which may be None. No page is touched afterwards."""
        buffers = self._lend(pieces)
        try:
            sizes = wait(self._submit(self._joined.client.get(list(hashes), buffers, timeout_s)))
        finally:
            self._end(pieces)
        return [False] * len(hashes) if sizes is None else [size == pieces.nbytes for size in sizes]

    def put(
        self,
        hashes: Sequence[BlockHash],
        parents: Sequence[BlockHash],
        pieces: Pieces,
        tenant: str,
        wait: Callable[[Any], Any],
        timeout_s: float,
    ) -> list[bool]:
        """Publish blocks; whether each can be got. ``wait`` as for :meth:`get`."""
        buffers = self._lend(pieces)
        blocks = _outgoing(hashes, parents, buffers)
        try:
            outcomes: list[PutOutcome] | None = wait(self._submit(self._joined.put(blocks, timeout_s, tenant)))
        finally:
            self._end(pieces)
        return [outcome in GOOD for outcome in outcomes or ["lost"] * len(hashes)]

    def put_beside(
        self,
        hashes: Sequence[BlockHash],
        parents: Sequence[BlockHash],
        pieces: Pieces,
        tenant: str,
        until_s: float,
        told: Callable[[list[bool]], object],
    ) -> Beside:
        """As :meth:`put`, by the loop's clock, for who does not wait; ``told`` there how it ended. It is of the first
        blocks, as many as there may be on their way."""
        with self._lock:
            count = min(len(hashes), (self._bytes_max - self._bytes) // pieces.nbytes)
            self._bytes += count * pieces.nbytes
        buffers = self._lend(pieces)[:count]
        beside = Beside(buffers)

        async def publish() -> None:
            outcomes: list[PutOutcome] = ["lost" for _ in range(count)]
            try:
                blocks = _outgoing(hashes[:count], parents[:count], buffers)
                outcomes = await self._joined.put(blocks, max(0.0, until_s - clock.now_s()), tenant)
            finally:
                over()
                told([outcome in GOOD for outcome in outcomes])

        def over() -> None:
            self._end(pieces)
            beside.done = True
            with self._lock:
                self._bytes -= count * pieces.nbytes

        if not count or self._submit(publish()) is None:
            over()
        return beside

    def _lend(self, pieces: Pieces) -> list[LentBuffer]:
        assert self._joined.lending is not None, "they were found fit to be lent"
        return [LentBuffer(pieces.nbytes, offset) for offset in self._joined.lending.lend(pieces)]

    def _end(self, pieces: Pieces) -> None:
        assert self._joined.lending is not None
        pieces.close()
        self._joined.lending.end(pieces)


def _outgoing(
    hashes: Sequence[BlockHash], parents: Sequence[BlockHash], buffers: Sequence[LentBuffer]
) -> list[OutgoingBlock]:
    whole = zip(hashes, parents, buffers, strict=True)
    return [OutgoingBlock(block_hash, parent, buffer, buffer.nbytes) for block_hash, parent, buffer in whole]

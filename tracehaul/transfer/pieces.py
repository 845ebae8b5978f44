"""Memory of this process that no region has, lent to a call: equal blocks, each in as many pieces as its owner likes.

A transport that copies by itself, as shared memory's does, takes them for a stretch beyond a region's buffer. Nothing
of a peer's reaches them, so whoever lends them can have them back at once, whatever the peer does: see
:meth:`Pieces.close`.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tracehaul.transfer.base import Copy, Region
from tracehaul.transfer.copying import BLOCK_BYTES, SUMMED_BYTES_MIN
from tracehaul.transfer.region import Registered
from tracehaul.wire.errors import TransferError

STRETCH = 1 << 44
"""Offsets of what one call has: no buffer is as long."""

Words = NDArray[np.uint64]


class Pieces:
    """Blocks that are lent until they are closed."""

    def __init__(self, addresses: Words, sizes: Words, memory: object = None) -> None:
        """``addresses``: a row for each block, of its pieces in order; ``sizes``: theirs, the same for all blocks;
        ``memory``: what must live as long."""
        assert addresses.shape[1:] == sizes.shape
        self.addresses = addresses
        self.sizes = sizes
        self.nbytes = int(sizes.sum())
        """Of a block."""
        self.number = 0
        """Which of what is lent they are; 0: none yet."""
        self._memory = memory
        self._news = threading.Condition()
        self._inside = 0
        self._closed = False

    @staticmethod
    def fit(sizes: Words) -> bool:
        """Whether blocks of such pieces can be copied and summed in one pass."""
        rest = sizes[:-1]
        return len(sizes) > 0 and int(sizes[-1]) >= SUMMED_BYTES_MIN and not (rest % BLOCK_BYTES).any() and all(rest)

    def turns(self, work: Iterator[None]) -> Iterator[None]:
        """The same work, of which nothing is done once these are closed."""
        while self._enter():
            try:
                if next(work, self) is self:
                    return
            finally:
                self._leave()
            yield

    @property
    def closed(self) -> bool:
        """Whether work on them may have been left undone."""
        return self._closed

    def close(self) -> None:
        """Have them back: when this returns nobody reads or writes them, and nobody will. From any thread; it waits for
        the turns under way, each of which is some tenths of a millisecond of this process's own work."""
        with self._news:
            self._closed = True
            self._news.wait_for(lambda: not self._inside)

    def _enter(self) -> bool:
        with self._news:
            if self._closed:
                return False
            self._inside += 1
            return True

    def _leave(self) -> None:
        with self._news:
            self._inside -= 1
            self._news.notify_all()


class LendingRegion(Registered):
    """A region that has, beyond its buffer, what is lent to it."""

    def __init__(self, region: Region) -> None:
        super().__init__(region.buffer, region.descriptor)
        self._lent: dict[int, Pieces] = {}
        self._numbers = itertools.count(1)

    def lend(self, pieces: Pieces) -> list[int]:
        """The offset of each block. From any thread."""
        number = pieces.number = next(self._numbers)
        self._lent[number] = pieces
        return [number * STRETCH + at * pieces.nbytes for at in range(len(pieces.addresses))]

    def end(self, pieces: Pieces) -> None:
        """They are lent no more: transfers that begin later find nothing there."""
        self._lent.pop(pieces.number, None)

    def find(self, copies: Sequence[Copy]) -> tuple[Pieces, Words] | None:
        """What the copies are of, and which block each is of; None: of the buffer.

        Raises:
            TransferError: of both, of parts of blocks, or of what is not lent.
        """
        if not any(copy.local_offset >= STRETCH for copy in copies):
            return None
        offsets = np.array([copy.local_offset for copy in copies], dtype=np.uint64)
        numbers = np.unique(offsets // np.uint64(STRETCH))
        pieces = self._lent.get(int(numbers[0])) if len(numbers) == 1 else None
        if pieces is None or any(copy.nbytes != pieces.nbytes for copy in copies):
            raise TransferError("these copies are not of blocks that are lent to one call")
        places, rest = np.divmod(offsets % np.uint64(STRETCH), np.uint64(pieces.nbytes))
        if rest.any() or int(places.max()) >= len(pieces.addresses):
            raise TransferError("these copies are not of whole blocks")
        return pieces, places

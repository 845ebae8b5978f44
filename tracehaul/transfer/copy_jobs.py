"""Copies between two mappings of one process, in turns, with the checksums of what was copied."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from tracehaul.runtime.offload import yield_core
from tracehaul.transfer.base import Copy, Region
from tracehaul.transfer.copying import ROW, SUMMED_BYTES_MIN, compiled_here, rows_of
from tracehaul.transfer.landing import check_copies
from tracehaul.transfer.pieces import LendingRegion, Pieces, Words
from tracehaul.wire.errors import TransferError
from tracehaul.wire.ids import Checksum

STEP_BYTES = 512 << 10
"""Copied without a pause."""
TURN_BYTES = 2 << 20
"""Copied before others that wait for a thread have their turn: some tenths of a millisecond. A transfer of no more is
left in the caches for who asked for it; a longer one would only drive out of them what others left there."""
SHORT_BYTES = 4 << 10
"""A copy counts for at least so much of a step: a short one costs time, too."""
THREADS = 2
"""That share a transfer, if the offload has so many: one does not fill a memory bus."""
SHARED_BYTES = 1 << 20
"""A smaller one is not shared: waking a thread costs as much as copying it."""

Bytes = NDArray[np.uint8]


class CopyJob:
    """One transfer, done in turns by one or more threads; it can be stopped after any step."""

    def __init__(self, ours: Bytes, copies: Sequence[Copy], nbytes: int, *, inward: bool) -> None:
        self._ours = ours
        self._copies = copies
        self._inward = inward
        self._threads = THREADS if nbytes >= SHARED_BYTES and len(copies) > 1 else 1
        self._is_long = nbytes > TURN_BYTES
        self._advance = compiled_here()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether bytes may be missing."""
        return self._stopped

    def stop(self) -> None:
        """Start no further step."""
        self._stopped = True

    def work(self, theirs: Bytes) -> list[Iterator[None]]:
        """What is to be done, for each thread: it yields after each turn. To be advanced in the offload."""
        self._theirs = theirs  # not unmapped while rows name addresses in it
        columns = np.array(self._copies, dtype=np.uint64).reshape(-1, 3)
        here, there, sizes = columns[:, 0] + self._ours.ctypes.data, columns[:, 1] + theirs.ctypes.data, columns[:, 2]
        sources, targets = (there, here) if self._inward else (here, there)
        self._is_row = (sizes >= SUMMED_BYTES_MIN) & (self._advance is not None)
        self._rows = rows_of(sources[self._is_row], targets[self._is_row], sizes[self._is_row])
        self._plain = np.flatnonzero(~self._is_row).tolist()
        self._plain_sums: dict[int, int] = {}
        steps, plain = iter(steps_of(self._rows["nbytes"])), iter(self._plain)
        return [self._turns(steps, plain) for _ in range(self._threads)]

    def sums(self) -> list[Checksum]:
        """Of the bytes of each copy as they were stored; when all turns are over."""
        sums = np.empty(len(self._copies), dtype=np.uint64)
        sums[self._is_row] = self._rows["sums"][:, 0]
        sums[self._plain] = [self._plain_sums[index] for index in self._plain]
        return list(map(Checksum, sums.tolist()))

    def _turns(self, steps: Iterator[tuple[int, int]], plain: Iterator[int]) -> Iterator[None]:
        """Do what no other thread has begun."""
        rows, room = self._rows.ctypes.data, TURN_BYTES
        for at, end in steps:
            while at < end:
                if room <= 0:
                    yield
                    room = TURN_BYTES
                elif self._is_long:
                    yield_core()
                if self._stopped:
                    return
                assert self._advance is not None
                at += self._advance(rows + at * ROW.itemsize, end - at, STEP_BYTES, self._is_long)
                room -= STEP_BYTES
        for index in plain:  # short ones, and all where nothing could be compiled
            local_offset, remote_offset, nbytes = self._copies[index]
            if room <= 0:
                yield
                room = TURN_BYTES
            elif self._is_long and nbytes > SHORT_BYTES:
                yield_core()
            if self._stopped:
                return
            mine = self._ours[local_offset : local_offset + nbytes]
            other = self._theirs[remote_offset : remote_offset + nbytes]
            source, target = (other, mine) if self._inward else (mine, other)
            np.copyto(target, source)
            self._plain_sums[index] = xxh3_64_intdigest(target.data)
            room -= max(nbytes, SHORT_BYTES)


class PiecesJob(CopyJob):
    """One whose blocks are lent, in pieces; closing them stops it, too."""

    def __init__(self, pieces: Pieces, places: Words, copies: Sequence[Copy], nbytes: int, *, inward: bool) -> None:
        """``places``: which of the blocks each copy is of."""
        super().__init__(np.zeros(0, dtype=np.uint8), copies, nbytes, inward=inward)
        self._pieces = pieces
        self._places = places

    @property
    def stopped(self) -> bool:
        return self._stopped or self._pieces.closed

    def work(self, theirs: Bytes) -> list[Iterator[None]]:
        self._theirs = theirs
        pieces, count = self._pieces, len(self._pieces.sizes)
        before = np.cumsum(pieces.sizes) - pieces.sizes
        remote = np.array([copy.remote_offset for copy in self._copies], dtype=np.uint64) + theirs.ctypes.data
        here, there = pieces.addresses[self._places].ravel(), np.add.outer(remote, before).ravel()
        sources, targets = (there, here) if self._inward else (here, there)
        self._rows = rows_of(sources, targets, np.tile(pieces.sizes, len(self._copies)))
        whole = self._rows["nbytes"].reshape(-1, count)
        whole[:, :-1], whole[:, -1] = 0, pieces.nbytes
        blocks = steps_of(np.full(len(self._copies), pieces.nbytes, dtype=np.uint64))
        steps, plain = iter([(count * at, count * end) for at, end in blocks]), iter(list[int]())
        return [pieces.turns(self._turns(steps, plain)) for _ in range(self._threads)]

    def sums(self) -> list[Checksum]:
        count = len(self._pieces.sizes)
        return list(map(Checksum, self._rows["sums"][count - 1 :: count, 0].tolist()))


def job_of(local: Region, remote_nbytes: int, copies: Sequence[Copy], *, inward: bool) -> tuple[CopyJob, int]:
    """What a transfer is, and of how many bytes.

    Raises:
        TransferError: a range is outside a region.
    """
    copies = tuple(copies)
    lent = local.find(copies) if isinstance(local, LendingRegion) else None
    if lent is None:
        nbytes = check_copies(copies, local.buffer.nbytes, remote_nbytes)
        return CopyJob(np.frombuffer(local.buffer, dtype=np.uint8), copies, nbytes, inward=inward), nbytes
    pieces, places = lent
    nbytes = check_copies([Copy(0, copy.remote_offset, copy.nbytes) for copy in copies], pieces.nbytes, remote_nbytes)
    if compiled_here() is None:
        raise TransferError("what is lent in pieces is copied by compiled code alone")
    return PiecesJob(pieces, places, copies, nbytes, inward=inward), nbytes


def steps_of(sizes: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Runs of neighbouring rows, from and to, each of a step's bytes or one row's."""
    costs = np.maximum(sizes.astype(np.int64), SHORT_BYTES)
    before = costs.cumsum() - costs
    starts = np.flatnonzero(np.diff(before // STEP_BYTES, prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(sizes)], strict=False))

"""Blocks in pieces that are lent to a transfer: where they go, and that they can be had back at once."""

import asyncio
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.base import Copy
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.pieces import LendingRegion, Pieces, Words
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.errors import TransferError, TransferLost
from tracehaul.wire.hashing import checksum

SIZES = np.array([1 << 20, 2048, 700_001], dtype=np.uint64)
NBYTES = int(SIZES.sum())
COUNT = 5


class Owner:
    """Memory cut into blocks whose pieces lie apart and out of order."""

    def __init__(self, seed: int | None = None) -> None:
        self.pieces = [[np.zeros(int(size), dtype=np.uint8) for size in SIZES] for _ in range(COUNT)]
        for at, piece in enumerate(piece for block in self.pieces for piece in block):
            if seed is not None:
                piece[:] = np.frombuffer(random.Random(seed + at).randbytes(piece.nbytes), dtype=np.uint8)

    def lend(self) -> Pieces:
        addresses = np.array([[piece.ctypes.data for piece in block] for block in self.pieces], dtype=np.uint64)
        return Pieces(addresses, SIZES, self.pieces)

    def block(self, at: int) -> bytes:
        return b"".join(piece.tobytes() for piece in self.pieces[at])


def test_blocks_go_there_and_back_with_the_sums_of_the_whole() -> None:
    async def main() -> None:
        offload = ThreadOffload("test", 2)
        transfer = ShmTransfer("a#1", offload)
        ours, theirs = allocate(4096, "ours"), allocate(COUNT * NBYTES, "theirs")
        local, remote = LendingRegion(transfer.register(ours)), transfer.register(theirs).descriptor
        source, target = Owner(1), Owner()
        lent = source.lend()
        offsets = local.lend(lent)
        order = [3, 0, 4, 1]
        copies = [Copy(offsets[at], place * NBYTES, NBYTES) for place, at in enumerate(order)]
        sums = await transfer.write(remote, local, copies, timeout_s=10)
        assert sums == [checksum(source.block(at)) for at in order]
        assert all(theirs.buffer[p * NBYTES : (p + 1) * NBYTES] == source.block(at) for p, at in enumerate(order))
        local.end(lent)
        with pytest.raises(TransferError, match="not of blocks that are lent"):
            await transfer.write(remote, local, copies, timeout_s=10)

        landing = target.lend()
        offsets = local.lend(landing)
        copies = [Copy(offsets[at], place * NBYTES, NBYTES) for place, at in enumerate(order)]
        assert await transfer.read(remote, local, copies, timeout_s=10) == sums
        assert [target.block(at) for at in order] == [source.block(at) for at in order]
        assert not any(target.block(2)), "a block that nobody asked for"
        await transfer.close()
        offload.close()

    asyncio.run(main())


@pytest.mark.parametrize("wrong", ["part", "beside", "beyond", "both", "outside"])
def test_only_whole_blocks_of_one_lending_are_found(wrong: str) -> None:
    async def main() -> None:
        offload = ThreadOffload("test", 1)
        transfer = ShmTransfer("a#1", offload)
        ours, theirs = allocate(2 * NBYTES, "ours"), allocate(2 * NBYTES, "theirs")
        local, remote = LendingRegion(transfer.register(ours)), transfer.register(theirs).descriptor
        offsets = local.lend(Owner().lend())
        good = Copy(offsets[0], 0, NBYTES)
        copies = {
            "part": [good, Copy(offsets[1], NBYTES, NBYTES - 1)],
            "beside": [Copy(offsets[0] + 64, 0, NBYTES)],
            "beyond": [Copy(offsets[-1] + NBYTES, 0, NBYTES)],
            "both": [good, Copy(0, NBYTES, NBYTES)],
            "outside": [good, Copy(offsets[1], NBYTES + 1, NBYTES)],
        }[wrong]
        with pytest.raises(TransferError):
            await transfer.read(remote, local, copies, timeout_s=10)
        assert await transfer.read(remote, local, [Copy(0, 0, 4096)], timeout_s=10), "the buffer is there as before"
        await transfer.close()
        offload.close()

    asyncio.run(main())


def test_what_is_closed_is_touched_no_more() -> None:
    """The owner goes on in the middle of a read, and nothing lands in what it has since put there."""

    async def main() -> None:
        offload = ThreadOffload("test", 2)
        transfer = ShmTransfer("a#1", offload)
        ours, theirs = allocate(4096, "ours"), allocate(COUNT * NBYTES, "theirs")
        theirs.buffer[:] = b"\xee" * (COUNT * NBYTES)
        local, remote = LendingRegion(transfer.register(ours)), transfer.register(theirs).descriptor
        target = Owner()
        lent = target.lend()
        copies = [Copy(offset, at * NBYTES, NBYTES) for at, offset in enumerate(local.lend(lent))]
        turns, closed = 0, threading.Event()
        enter = lent._enter  # pyright: ignore[reportPrivateUsage]

        def counted() -> bool:
            nonlocal turns
            turns += 1
            if turns == 2:
                lent.close()
                for block in target.pieces:
                    for piece in block:
                        piece[:] = 7
                closed.set()
            return enter()

        lent._enter = counted  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(TransferLost, match="given up"):
            await transfer.read(remote, local, copies, timeout_s=10)
        assert closed.is_set()
        assert {byte for at in range(COUNT) for byte in set(target.block(at))} == {7}
        await transfer.close()
        offload.close()

    asyncio.run(main())


def test_closing_waits_for_the_turn_under_way() -> None:
    lent = Owner().lend()
    inside, go_on, order = threading.Event(), threading.Event(), list[str]()

    def work() -> Iterator[None]:
        inside.set()
        assert go_on.wait(5)
        order.append("turn")
        yield
        order.append("never")

    def run() -> None:
        for _ in lent.turns(work()):
            pass

    running = threading.Thread(target=run)
    running.start()
    assert inside.wait(5)
    closing = threading.Thread(target=lambda: (lent.close(), order.append("closed")))
    closing.start()
    closing.join(0.1)
    assert closing.is_alive(), "a turn is under way"
    go_on.set()
    closing.join(5)
    running.join(5)
    assert order == ["turn", "closed"]


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ([1024, 2048, 241], True),
        ([3000], True),
        ([1024, 240], False),
        ([1000, 2048], False),
        ([0, 2048], False),
        ([], False),
    ],
)
def test_pieces_fit_where_a_sum_can_go_from_one_to_the_next(sizes: list[int], fits: bool) -> None:
    words: Words = np.array(sizes, dtype=np.uint64)
    assert bool(Pieces.fit(words)) is fits

"""The checksums that shared-memory transfers return. Everything else about them is in the contract suite."""

import asyncio
import random

import pytest

from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer import shm
from tracehaul.transfer.base import Copy
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.hashing import checksum

NBYTES = 4 << 20
COPIES = [Copy(7, 1000, 700_001), Copy(1 << 20, 0, 0), Copy(2 << 20, 1 << 20, shm.STEP_BYTES), Copy(3 << 20, 5, 1)]


@pytest.mark.parametrize("turn_bytes", [1, shm.TURN_BYTES])
def test_sums_are_of_our_bytes_one_per_copy(monkeypatch: pytest.MonkeyPatch, turn_bytes: int) -> None:
    monkeypatch.setattr(shm, "TURN_BYTES", turn_bytes)

    async def main() -> None:
        offload = ThreadOffload("test", 2)
        ours, theirs = allocate(NBYTES, "ours"), allocate(NBYTES, "theirs")
        theirs.buffer[:] = random.Random(1).randbytes(NBYTES)
        transfer = ShmTransfer("a#1", offload)
        local, remote = transfer.register(ours), transfer.register(theirs).descriptor
        sums = await transfer.read(remote, local, COPIES, timeout_s=10)
        assert sums == [checksum(ours.buffer[at : at + nbytes]) for at, _, nbytes in COPIES]
        assert sums == [checksum(theirs.buffer[at : at + nbytes]) for _, at, nbytes in COPIES]

        ours.buffer[:] = random.Random(2).randbytes(NBYTES)
        sums = await transfer.write(remote, local, COPIES, timeout_s=10)
        assert sums == [checksum(ours.buffer[at : at + nbytes]) for at, _, nbytes in COPIES]
        first = COPIES[0]
        assert checksum(theirs.buffer[first.remote_offset :][: first.nbytes]) == sums[0]
        await transfer.close()
        offload.close()

    asyncio.run(main())

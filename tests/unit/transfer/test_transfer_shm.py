"""The checksums that shared-memory transfers return. Everything else about them is in the contract suite."""

import asyncio
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer import copy_jobs
from tracehaul.transfer.base import Copy
from tracehaul.transfer.copying import compiled, compiled_here
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.hashing import checksum

NBYTES = 8 << 20
ODD = [Copy(7, 1000, 700_001), Copy(1 << 20, 0, 0), Copy(2 << 20, 1 << 20, copy_jobs.STEP_BYTES), Copy(3 << 20, 5, 1)]
LONG = [*ODD, Copy(4 << 20, 2 << 20, 3 << 20), *[Copy(7 << 20 | i << 12, 6 << 20 | i << 8, 241 + i) for i in range(9)]]


@pytest.fixture(params=["compiled", "plain"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With llvmlite, and without."""
    if request.param == "plain":
        for module in ("llvmlite", "llvmlite.binding"):
            monkeypatch.setitem(sys.modules, module, None)
        compiled.cache_clear()
        compiled_here.cache_clear()
        assert compiled_here() is None
    yield
    compiled_here.cache_clear()


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("copies", [ODD, LONG, [Copy(5, 9, 240)], []])
@pytest.mark.parametrize("turn_bytes", [1, copy_jobs.TURN_BYTES])
def test_sums_are_of_our_bytes_one_per_copy(
    monkeypatch: pytest.MonkeyPatch, turn_bytes: int, copies: list[Copy]
) -> None:
    monkeypatch.setattr(copy_jobs, "TURN_BYTES", turn_bytes)

    async def main() -> None:
        offload = ThreadOffload("test", 2)
        ours, theirs = allocate(NBYTES, "ours"), allocate(NBYTES, "theirs")
        theirs.buffer[:] = random.Random(1).randbytes(NBYTES)
        transfer = ShmTransfer("a#1", offload)
        local, remote = transfer.register(ours), transfer.register(theirs).descriptor
        sums = await transfer.read(remote, local, copies, timeout_s=10)
        assert sums == [checksum(ours.buffer[at : at + nbytes]) for at, _, nbytes in copies]
        assert sums == [checksum(theirs.buffer[at : at + nbytes]) for _, at, nbytes in copies]

        ours.buffer[:] = random.Random(2).randbytes(NBYTES)
        sums = await transfer.write(remote, local, copies, timeout_s=10)
        assert sums == [checksum(ours.buffer[at : at + nbytes]) for at, _, nbytes in copies]
        assert sums == [checksum(theirs.buffer[at : at + nbytes]) for _, at, nbytes in copies]
        await transfer.close()
        offload.close()

    asyncio.run(main())


def test_threads_are_given_steps_of_equal_work() -> None:
    step = copy_jobs.STEP_BYTES
    assert copy_jobs.steps_of(sizes()) == []
    assert copy_jobs.steps_of(sizes(1000)) == [(0, 1)]
    assert copy_jobs.steps_of(sizes(*[step // 2] * 5)) == [(0, 2), (2, 4), (4, 5)]
    assert copy_jobs.steps_of(sizes(3 * step, 8, 8)) == [(0, 1), (1, 3)]
    # Tiny ones cost time, too.
    assert len(copy_jobs.steps_of(sizes(*[250] * 1000))) == -(-1000 * copy_jobs.SHORT_BYTES // step)


def sizes(*nbytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.array(nbytes, dtype=np.uint64)

"""An S3 tier as a process, for tests: stores, reads and drops until it is killed, and prints every change that it told.

``+ number`` comes after a block is held, ``- number`` before its object is deleted.
"""

import asyncio
import mmap
import os
import random
import sys
from collections.abc import Sequence

import uvloop

from kvstore.tiers.base import Change, TierBlock
from kvstore.tiers.s3 import open_s3
from tracehaul.wire.blocks import Stored
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

SLOT = 16 << 10
SLOTS = 24
ROOT = BlockHash(b"\xff" * 16)


def tell(changes: Sequence[Change]) -> None:
    lines = [f"{'+' if isinstance(change, Stored) else '-'} {int.from_bytes(change.hash)}\n" for change in changes]
    os.write(1, "".join(lines).encode())


async def main(url: str, seed: int) -> None:
    tier = await open_s3(url, "store-0", SLOTS * SLOT, SLOT)
    await tier.recover()
    tier.listen(tell)
    os.write(1, b"ready\n")
    dice = random.Random(seed)

    async def work(lane: int) -> None:
        view = memoryview(mmap.mmap(-1, SLOT))
        for i in range(10_000):
            number = seed * 1_000_000 + lane * 100_000 + i
            data = random.Random(number).randbytes(10_000)
            view[: len(data)] = data
            block = TierBlock(BlockHash(number.to_bytes(16)), ROOT, len(data), checksum(data))
            await tier.store([block], [view])
            if dice.random() < 0.3:
                await tier.drop(dice.choice(tier.held() or (ROOT,)))

    await asyncio.gather(*(work(lane) for lane in range(4)))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))

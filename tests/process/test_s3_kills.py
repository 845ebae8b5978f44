"""A process with an S3 tier, killed at random moments: what it said it holds is there, whole, and within the budget."""

import asyncio
import mmap
import random
import sys
from collections.abc import Callable
from pathlib import Path

from kvstore.tiers.objects import parse_url
from kvstore.tiers.s3 import S3Objects, open_s3
from tracehaul.wire.ids import BlockHash

SLOT = 16 << 10
SLOTS = 24
CYCLES = 12
CHANGES_MAX = 100
"""A life ends after fewer, as it told them, and..."""
MOMENT_S = 0.05
"""...a random moment, at most this long: in the middle of whatever comes then."""


async def life(url: str, seed: int, dice: random.Random, held: set[int]) -> int:
    """One life, to its violent end; ``held`` becomes what it said. Returns how many changes it told."""
    script = Path(__file__).with_name("s3_tier_process.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), url, str(seed), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"ready\n"
    told, doomed = 0, dice.randrange(CHANGES_MAX)
    loop, moment_s = asyncio.get_running_loop(), dice.uniform(0.0, MOMENT_S)
    if doomed == 0:
        loop.call_later(moment_s, process.kill)
    while (line := await process.stdout.readline()).endswith(b"\n"):
        what, number = line.split()
        (held.add if what == b"+" else held.remove)(int(number))
        told += 1
        if told == doomed:
            loop.call_later(moment_s, process.kill)
    await process.wait()
    return told


async def verify(url: str, held: set[int]) -> None:
    bucket, prefix = parse_url(url)
    objects = S3Objects(bucket, f"{prefix}/store-0")
    assert len([each async for page in objects.pages() for each in page]) <= SLOTS
    tier = await open_s3(url, "store-0", SLOTS * SLOT, SLOT)
    await tier.recover()
    found = {int.from_bytes(block_hash) for block_hash in tier.held()}
    assert held <= found, "said to be held, and lost"
    # What is there besides was on its way: a put whose answer, or a deletion whose request, never came.
    numbers = sorted(found)
    views = [memoryview(mmap.mmap(-1, SLOT)) for _ in numbers]
    outcomes = await tier.load([BlockHash(number.to_bytes(16)) for number in numbers], views)
    assert set(outcomes) <= {"loaded"}
    for number, view in zip(numbers, views, strict=True):
        assert bytes(view[:10_000]) == random.Random(number).randbytes(10_000)
    tier.close()
    held.clear()
    held.update(found)


def test_killed_at_random_moments(s3_url: Callable[[], str]) -> None:
    url = s3_url()

    async def main() -> None:
        dice = random.Random(7)
        held: set[int] = set()
        told = 0
        for seed in range(1, CYCLES + 1):
            told += await life(url, seed, dice, held)
            await verify(url, held)
        assert told > 10 * CYCLES, "the test wrote too little to mean anything"

    asyncio.run(main())

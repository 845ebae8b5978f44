"""What reading and writing share."""

import asyncio
import threading

from kvstore.client.moves import TURN_BYTES, checksums
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.hashing import checksum


def test_many_checksums_let_a_few_in_between() -> None:
    """One thread, held up until a long and a short list of blocks wait for it."""

    async def main() -> None:
        offload, held = ThreadOffload("x"), threading.Event()
        block = memoryview(bytes(range(256)) * (TURN_BYTES // 256))
        ended: list[str] = []

        async def work(name: str, count: int) -> None:
            assert await checksums(offload, [block] * count) == [checksum(block)] * count
            ended.append(name)

        blocker = asyncio.ensure_future(offload.run(held.wait))
        await asyncio.sleep(0)
        async with asyncio.TaskGroup() as group:
            group.create_task(work("long", 64))
            group.create_task(work("short", 1))
            await asyncio.sleep(0)
            held.set()
        await blocker
        assert ended == ["short", "long"]
        offload.close()

    asyncio.run(main())

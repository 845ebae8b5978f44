"""A store node that stands still, is taken for dead and replaced, and then returns: fenced by its epoch."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from bench.faults.kill_lane import content, hash_of
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from router.fleet.members import MemberRegistry
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import BlockHash, Generation

SLOT = 16 << 10
ROOT = BlockHash(b"\xff" * 16)
START_S = 30.0
BACK_S = 3.0
"""In which a node that goes on has tried to join again, several times."""


@contextlib.asynccontextmanager
async def start(router: str, disk: str = "") -> AsyncGenerator[asyncio.subprocess.Process, None]:
    told = {
        "name": "s0",
        "router": router,
        "store": {"arena_bytes": 64 * SLOT, "slot_bytes": SLOT},
        "replication": {},
        "disk": disk,
        "disk_bytes": 100 * SLOT,
    }
    script = Path(__file__).with_name("fleet_process.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), json.dumps(told), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ready(process: asyncio.subprocess.Process) -> NodeInfo:
    assert process.stdout is not None
    async with asyncio.timeout(START_S):
        return msgspec.json.decode(await process.stdout.readline(), type=NodeInfo)


@contextlib.asynccontextmanager
async def open_client() -> AsyncGenerator[StoreClient, None]:
    async with contextlib.AsyncExitStack() as stack:
        memory = allocate(16 * SLOT, "client")
        stack.callback(memory.close)
        offload = ThreadOffload("client")
        stack.callback(offload.close)
        transfer = ShmTransfer("client#1", offload)
        stack.push_async_callback(transfer.close)
        peers = Peers(TcpNetwork())
        stack.push_async_callback(peers.close)
        client = StoreClient(peers, [Plane(transfer, transfer.register(memory))], Staging(memory, SLOT), offload)
        stack.push_async_callback(client.aclose)
        yield client


async def put(client: StoreClient, info: NodeInfo, numbers: range) -> set[str]:
    buffers = await client.staging.acquire(len(numbers), 5.0)
    blocks: list[OutgoingBlock] = []
    for number, buffer in zip(numbers, buffers, strict=True):
        data = content(number)
        buffer.view(len(data))[:] = data
        blocks.append(OutgoingBlock(hash_of(number), ROOT, buffer, len(data)))
    try:
        return set(await client.put(info.node, blocks, 3.0))
    finally:
        client.staging.release(buffers)


async def get(client: StoreClient, numbers: range) -> int:
    """How many came; wrong bytes fail the test."""
    buffers = await client.staging.acquire(len(numbers), 5.0)
    try:
        sizes = await client.get([hash_of(number) for number in numbers], buffers, 3.0)
        for number, buffer, size in zip(numbers, buffers, sizes, strict=True):
            assert size is None or bytes(buffer.view(size)) == content(number)
        return sum(size is not None for size in sizes)
    finally:
        client.staging.release(buffers)


def test_who_was_declared_dead_is_not_believed_when_it_returns() -> None:
    async def main() -> None:
        members = MemberRegistry(lambda nodes: None)
        router = await TcpNetwork().listen("127.0.0.1:0", members)
        async with start(router.address) as first, open_client() as client:
            old = await ready(first)
            client.set_nodes([old])
            assert await put(client, old, range(4, 8)) == {"published"}
            # Who takes it for another life takes nothing from it, and gives it nothing.
            client.set_nodes([msgspec.structs.replace(old, generation=Generation(old.generation ^ 1))])
            assert await get(client, range(4, 8)) == 0
            assert await put(client, old, range(12, 16)) == {"lost"}
            client.set_nodes([old])
            assert await get(client, range(4, 8)) == 4
            first.send_signal(signal.SIGSTOP)
            async with start(router.address) as second:
                new = await ready(second)
                assert new.epoch > old.epoch
                assert members.infos() == (new,)
                client.set_nodes(members.infos())
                assert await get(client, range(4, 8)) == 0
                assert await put(client, new, range(8, 12)) == {"published"}
                first.send_signal(signal.SIGCONT)
                async with asyncio.timeout(BACK_S):
                    _, errors = await first.communicate()
                assert b"Fenced: another s0 has taken the place of this one" in errors
                assert members.infos() == (new,)
                assert await get(client, range(8, 12)) == 4
                assert client.stats.corrupt == 0
        await router.close()

    asyncio.run(main())


def test_a_life_that_stands_still_keeps_its_file_to_itself(tmp_path: Path) -> None:
    async def main() -> None:
        members = MemberRegistry(lambda nodes: None)
        router = await TcpNetwork().listen("127.0.0.1:0", members)
        file = str(tmp_path / "s0.blocks")
        async with start(router.address, file) as first:
            old = await ready(first)
            first.send_signal(signal.SIGSTOP)
            async with start(router.address, file) as second:
                async with asyncio.timeout(START_S):
                    _, errors = await second.communicate()
                assert second.returncode != 0
                assert b"another process holds the disk tier" in errors
            first.send_signal(signal.SIGCONT)
            await asyncio.sleep(1.0)
            assert members.infos() == (old,)
        await router.close()

    asyncio.run(main())

"""Store nodes as real processes, killed and frozen under load: misses, never exceptions, never wrong bytes."""

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import BlockHash

SLOT = 256 << 10
BLOCK = 250_000
CONFIG = StoreConfig(arena_bytes=64 * SLOT, slot_bytes=SLOT)
ROOT = BlockHash(b"\xff" * 16)
POOL = random.Random(1).randbytes(2 * BLOCK)


class Node:
    def __init__(self, process: asyncio.subprocess.Process, info: NodeInfo) -> None:
        self.process, self.info = process, info


@asynccontextmanager
async def start(name: str, generation: int = 1) -> AsyncIterator[Node]:
    script = Path(__file__).with_name("store_process.py")
    arguments = [str(script), name, str(generation), msgspec.json.encode(CONFIG).decode()]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        yield Node(process, msgspec.json.decode(line, type=NodeInfo))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def open_client(buffers: int = 16) -> AsyncIterator[StoreClient]:
    async with AsyncExitStack() as stack:
        memory = allocate(buffers * SLOT, "client")
        stack.callback(memory.close)
        offload = ThreadOffload("client")
        stack.callback(offload.close)
        transfer = ShmTransfer("client#1", offload)
        stack.push_async_callback(transfer.close)
        peers = Peers(TcpNetwork())
        stack.push_async_callback(peers.close)
        plane = Plane(transfer, transfer.register(memory))
        client = StoreClient(peers, [plane], Staging(memory, SLOT), offload)
        stack.push_async_callback(client.aclose)
        yield client


def hash_of(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16))


def content(number: int) -> bytes:
    at = random.Random(number).randrange(BLOCK)
    return POOL[at : at + BLOCK]


async def put(client: StoreClient, home: Node, numbers: list[int]) -> list[str]:
    buffers = await client.staging.acquire(len(numbers), 10.0)
    try:
        blocks: list[OutgoingBlock] = []
        for number, buffer in zip(numbers, buffers, strict=True):
            buffer.view(BLOCK)[:] = content(number)
            blocks.append(OutgoingBlock(hash_of(number), ROOT, buffer, BLOCK))
        return list(await client.put(home.info.node, blocks, 2.0))
    finally:
        client.staging.release(buffers)


async def get(client: StoreClient, numbers: list[int]) -> list[bool]:
    """Which of them were got; wrong bytes fail the test."""
    buffers = await client.staging.acquire(len(numbers), 10.0)
    try:
        sizes = await client.get([hash_of(number) for number in numbers], buffers, 2.0)
        for number, buffer, size in zip(numbers, buffers, sizes, strict=True):
            assert size is None or bytes(buffer.view(size)) == content(number)
        return [size is not None for size in sizes]
    finally:
        client.staging.release(buffers)


def play(case: Callable[[Node, Node, StoreClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(90), start("s0") as s0, start("s1") as s1, open_client() as client:
            client.set_nodes([s0.info, s1.info])
            await case(s0, s1, client)

    asyncio.run(main())


FIRST, SECOND = list(range(8)), list(range(100, 108))


async def load(client: StoreClient, home: Node, stop: asyncio.Event, seed: int) -> int:
    """Put and get until told to stop; returns how many rounds."""
    rounds = 0
    while not stop.is_set():
        number = 1000 * seed + rounds % 500
        await put(client, home, [number])
        await get(client, [number, FIRST[rounds % 8], SECOND[rounds % 8]])
        rounds += 1
    return rounds


def test_a_killed_node_costs_misses_and_nothing_else() -> None:
    async def case(s0: Node, s1: Node, client: StoreClient) -> None:
        await put(client, s0, FIRST)
        await put(client, s1, SECOND)
        assert await get(client, FIRST) == await get(client, SECOND) == [True] * 8
        stop = asyncio.Event()
        workers = [asyncio.create_task(load(client, home, stop, seed)) for seed, home in ((1, s0), (2, s0), (3, s1))]
        await asyncio.sleep(0.5)
        s0.process.send_signal(signal.SIGKILL)
        await s0.process.wait()
        await asyncio.sleep(1.0)
        stop.set()
        assert min(await asyncio.gather(*workers)) > 3
        client.set_nodes([s1.info])
        assert await put(client, s1, SECOND) == ["present"] * 8 or await get(client, SECOND) == [True] * 8
        assert await put(client, s0, [999_999]) == ["published"]
        assert client.stats.corrupt == 0
        async with start("s0", generation=2) as again:
            client.set_nodes([again.info, s1.info])
            assert await get(client, [FIRST[0]]) == [False]
            assert await put(client, again, FIRST) == ["published"] * 8
            assert await get(client, FIRST) == [True] * 8
        assert client.staging.quarantined == 0
        assert client.staging.free == client.staging.count

    play(case)


def test_a_frozen_node_is_a_miss_until_it_goes_on() -> None:
    async def case(s0: Node, s1: Node, client: StoreClient) -> None:
        await put(client, s0, FIRST)
        await put(client, s1, SECOND)
        s0.process.send_signal(signal.SIGSTOP)
        start_s = clock.now_s()
        assert await get(client, SECOND + FIRST[:2]) == [True] * 8 + [False] * 2
        assert await client.exists([hash_of(FIRST[0])]) == [None]
        assert clock.now_s() - start_s < 5.0
        assert await put(client, s0, [5000]) == ["published"]
        s0.process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            while await get(client, FIRST) != [True] * 8:  # noqa: ASYNC110 - the state is another process's
                await asyncio.sleep(0.1)

    play(case)


def test_a_client_that_dies_in_mid_write_leaves_nothing_behind() -> None:
    async def case(s0: Node, s1: Node, client: StoreClient) -> None:
        async with open_client() as dying:
            dying.set_nodes([s0.info])
            await put(dying, s0, [7000])
            puts = [asyncio.create_task(put(dying, s0, [n, n + 1])) for n in range(0, 16, 2)]
            await asyncio.sleep(0.02)
            for task in puts:
                task.cancel()
            await asyncio.gather(*puts, return_exceptions=True)
        outcomes = await put(client, s0, FIRST)
        assert set(outcomes) <= {"published", "present"}
        assert await get(client, FIRST) == [True] * 8

    play(case)

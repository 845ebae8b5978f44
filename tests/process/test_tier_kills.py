"""A store node with a disk tier, killed at random moments while it writes, reads and evicts: nothing that was
published on disk is lost, nothing torn is found."""

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from kvstore.client import OutgoingBlock, StoreClient
from kvstore.config import StoreConfig
from kvstore.staging import Staging
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.blocks import Existing, Exists, ListPins, Pin, PinList, TierList, Tiers, Unpin
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.ids import BlockHash, TraceId

SLOT = 64 << 10
BLOCK = 60_000
CONFIG = StoreConfig(arena_bytes=24 * SLOT, slot_bytes=SLOT, pin_half_life_s=600.0)
ROOT = BlockHash(b"\xff" * 16)
POOL = random.Random(1).randbytes(2 * BLOCK)
CYCLES = int(os.environ.get("TRACEHAUL_KILL_CYCLES", "20"))
ATTEMPTS = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 10 * CYCLES)]


class Disk:
    """What the records said so far: block by slot; and what the node answered of pins."""

    def __init__(self) -> None:
        self.slots: dict[int, BlockHash] = {}
        self.pins: dict[str, int] = {}
        """Blocks that each trace's pin covers."""
        self.asked: dict[str, int | None] = {}
        """What was asked of a trace and not answered: either is true."""

    async def pin(self, peers: Peers, info: NodeInfo, dice: random.Random) -> None:
        trace = f"t{dice.randrange(40)}"
        blocks = dice.randrange(1, 30)
        self.asked[trace] = blocks if dice.random() < 0.7 else None
        if self.asked[trace] is None:
            await peers.call(info.address, Unpin(TraceId(trace)), timeout_s=2.0)
            self.pins.pop(trace, None)
        else:
            # The same blocks for all, so that they fit the store's limits, and not so many that it is full of them.
            hashes = tuple(hash_of(number) for number in range(1, blocks + 1))
            await peers.call(info.address, Unpin(TraceId(trace)), timeout_s=2.0)
            self.pins.pop(trace, None)
            await peers.call(info.address, Pin(TraceId(trace), hashes, 3000.0), timeout_s=2.0)
            self.pins[trace] = blocks
        del self.asked[trace]

    async def verify_pins(self, peers: Peers, info: NodeInfo) -> None:
        listed = await peers.call(info.address, ListPins(), timeout_s=5.0)
        assert isinstance(listed, PinList)
        found = {str(pin.trace): pin.blocks for pin in listed.pins}
        for trace in {*found, *self.pins} - self.asked.keys():
            assert found.get(trace) == self.pins.get(trace), f"{trace}: answered {self.pins}, found {found}"
        for trace, blocks in self.asked.items():
            assert found.get(trace) in (None, blocks, self.pins.get(trace))
        self.pins = found
        self.asked.clear()

    def line(self, text: str) -> None:
        what, slot, *rest = text.split()
        if what == "+":
            self.slots[int(slot)] = BlockHash(bytes.fromhex(rest[0]))
        else:
            self.slots.pop(int(slot), None)


@contextlib.asynccontextmanager
async def start(
    generation: int, path: Path, file_bytes: int
) -> AsyncIterator[tuple[asyncio.subprocess.Process, NodeInfo]]:
    script = Path(__file__).with_name("tier_process.py")
    arguments = [str(script), "s0", str(generation), msgspec.json.encode(CONFIG).decode(), str(path), str(file_bytes)]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        yield process, msgspec.json.decode(line, type=NodeInfo)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def open_client(peers: Peers, generation: int) -> AsyncIterator[StoreClient]:
    async with contextlib.AsyncExitStack() as stack:
        memory = allocate(24 * SLOT, "client")
        stack.callback(memory.close)
        offload = ThreadOffload("client")
        stack.callback(offload.close)
        transfer = ShmTransfer(f"client#{generation}", offload)
        stack.push_async_callback(transfer.close)
        client = StoreClient(peers, [Plane(transfer, transfer.register(memory))], Staging(memory, SLOT), offload)
        stack.push_async_callback(client.aclose)
        yield client


def hash_of(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16))


def content(number: int) -> bytes:
    at = random.Random(number).randrange(BLOCK)
    return POOL[at : at + BLOCK]


async def put(client: StoreClient, info: NodeInfo, numbers: list[int], timeout_s: float = 2.0) -> None:
    buffers = await client.staging.acquire(len(numbers), 10.0)
    try:
        blocks: list[OutgoingBlock] = []
        for number, buffer in zip(numbers, buffers, strict=True):
            buffer.view(BLOCK)[:] = content(number)
            blocks.append(OutgoingBlock(hash_of(number), ROOT, buffer, BLOCK))
        await client.put(info.node, blocks, timeout_s)
    finally:
        client.staging.release(buffers)


async def get(client: StoreClient, numbers: list[int], info: NodeInfo | None = None) -> list[bool]:
    """Which of them were got; wrong bytes fail the test."""
    buffers = await client.staging.acquire(len(numbers), 10.0)
    try:
        where = [info.node] * len(numbers) if info is not None else None
        sizes = await client.get([hash_of(number) for number in numbers], buffers, 5.0, where)
        for number, buffer, size in zip(numbers, buffers, sizes, strict=True):
            assert size is None or bytes(buffer.view(size)) == content(number), f"torn: {number}"
        return [size is not None for size in sizes]
    finally:
        client.staging.release(buffers)


async def verify(peers: Peers, client: StoreClient, info: NodeInfo, disk: Disk) -> None:
    """Everything that the records said is there, and everything that is there is whole."""
    numbers = sorted(int.from_bytes(block_hash) for block_hash in disk.slots.values())
    if not numbers:
        return
    existing = await peers.call(info.address, Exists(tuple([hash_of(n) for n in numbers])), timeout_s=5.0)
    assert isinstance(existing, Existing)
    lost = [number for number, held in zip(numbers, existing.held, strict=True) if not held]
    assert not lost, f"published on disk and lost: {lost}"
    for start in range(0, len(numbers), 4):
        part = numbers[start : start + 4]
        got: list[bool] = []
        # A busy machine may cost a deadline, which is a miss; what is lost or torn stays a miss, and is counted below.
        for _ in range(ATTEMPTS):
            got = await get(client, part, info)
            if all(got):
                break
            print(f"not at once: {part} {got} {client.stats.misses}")  # noqa: T201 - shown where the test fails
            await asyncio.sleep(1.5)
        assert got == [True] * len(part), f"not served: {part} {got} {client.stats.misses}"
    tiers = await peers.call(info.address, Tiers(), timeout_s=5.0)
    assert isinstance(tiers, TierList)
    counters = tiers.tiers[1].counters
    assert counters["corrupt"] == counters["unreadable"] == counters["failed"] == 0, "a torn block was found"


async def cycle(generation: int, path: Path, file_bytes: int, disk: Disk, dice: random.Random, next_number: int) -> int:
    async with contextlib.AsyncExitStack() as stack:
        process, info = await stack.enter_async_context(start(generation, path, file_bytes))
        assert process.stdout is not None
        peers = Peers(TcpNetwork())
        stack.push_async_callback(peers.close)
        client = await stack.enter_async_context(open_client(peers, generation))
        client.set_nodes([info])
        await disk.verify_pins(peers, info)
        await verify(peers, client, info, disk)

        async def pin() -> None:
            while True:
                try:
                    await disk.pin(peers, info, dice)
                except Overloaded:
                    disk.asked.clear()
                    await asyncio.sleep(0)

        async def load() -> None:
            nonlocal next_number
            while True:
                numbers = list(range(next_number, next_number + dice.randrange(1, 8)))
                next_number += len(numbers)
                await put(client, info, numbers)
                await get(client, [dice.randrange(1, next_number) for _ in range(2)])

        loading = asyncio.create_task(load())
        pinning = asyncio.create_task(pin())
        reading = asyncio.create_task(follow(process.stdout, disk))
        await asyncio.sleep(dice.uniform(0.0, 0.5))
        process.kill()
        await process.wait()
        await reading
        loading.cancel()
        pinning.cancel()
        await asyncio.gather(loading, pinning, return_exceptions=True)
    return next_number


async def follow(stdout: asyncio.StreamReader, disk: Disk) -> None:
    """Until the process's end; a line cut by it counts for nothing."""
    while (line := await stdout.readline()).endswith(b"\n"):
        disk.line(line.decode())


@pytest.mark.parametrize("slots", [24, 4000], ids=["evicting", "roomy"])
def test_killed_at_random_moments(slots: int, tmp_path: Path) -> None:
    async def main() -> None:
        dice = random.Random(slots)
        disk = Disk()
        number = 1
        for generation in range(1, CYCLES + 1):
            number = await cycle(generation, tmp_path / "s0.blocks", (slots + 2) * (SLOT + 64), disk, dice, number)
        assert len(disk.slots) >= min(slots // 2, CYCLES), "the test wrote too little to mean anything"
        assert disk.pins, "the test pinned too little to mean anything"

    asyncio.run(main())

"""Store nodes that copy to each other as real processes: killed, frozen, drained and joined under a read load."""

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import msgspec

from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from router.fleet.members import MemberRegistry
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.blocks import Drain, DrainState, Pin, Pinned
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad
from tracehaul.wire.hashing import by_weight
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId

SLOT = 128 << 10
SLOTS = 400
ROOT = BlockHash(b"\xff" * 16)
POOL = random.Random(1).randbytes(2 * SLOT)
TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
FAILED_OVER_S = READ_TIMEOUT_S / 3
"""A read that asked another copy has ended long before its deadline; one that waited for the lost copy ends there."""
READS = 8
"""Of each reader before what happens under load, and after it."""
GRACE_S = 1.0
BLOCKS = 24
"""Of one trace."""


class Stores:
    """A router's membership in this process, store nodes in others, one client."""

    def __init__(self, router: str, client: StoreClient, peers: Peers) -> None:
        self.router = router
        self.client = client
        self.peers = peers
        self.infos: dict[str, NodeInfo] = {}
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._stack = contextlib.AsyncExitStack()

    async def start(self, name: str, **changes: object) -> None:
        told = {
            "name": name,
            "router": self.router,
            "store": {"arena_bytes": SLOTS * SLOT, "slot_bytes": SLOT},
            "replication": {"grace_s": GRACE_S},
        }
        script = Path(__file__).with_name("fleet_process.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), json.dumps({**told, **changes}), stdout=asyncio.subprocess.PIPE
        )
        self.processes[name] = process
        assert process.stdout is not None
        async with asyncio.timeout(60):
            self.infos[name] = msgspec.json.decode(await process.stdout.readline(), type=NodeInfo)

    async def end(self) -> None:
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()

    def order(self, trace: str) -> list[str]:
        return [str(node) for node in by_weight([NodeId(name) for name in self.infos], trace)]

    async def write(self, trace: str, home: str, replicas: int) -> list[BlockHash]:
        """A trace's blocks, pinned there."""
        hashes = [h(trace, i) for i in range(BLOCKS)]
        parents = [ROOT, *hashes]
        buffers = await self.client.staging.acquire(BLOCKS, TIMEOUT_S)
        blocks: list[OutgoingBlock] = []
        for block_hash, parent, buffer in zip(hashes, parents, buffers, strict=False):
            buffer.view(SLOT)[:] = content(block_hash)
            blocks.append(OutgoingBlock(block_hash, parent, buffer, SLOT))
        outcomes = await self.client.put(NodeId(home), blocks, TIMEOUT_S)
        self.client.staging.release(buffers)
        assert set(outcomes) <= {"published", "present"}, outcomes
        if replicas:
            pin = Pin(TraceId(trace), tuple(hashes), 600.0, priority=2.0**20, replicas=replicas)
            assert isinstance(await self.peers.call(self.infos[home].address, pin, timeout_s=TIMEOUT_S), Pinned)
        return hashes

    async def read(self, hashes: list[BlockHash]) -> tuple[int, float]:
        """How many blocks came, and after how many seconds; wrong bytes fail the test."""
        buffers = await self.client.staging.acquire(len(hashes), TIMEOUT_S)
        try:
            start_s = clock.now_s()
            sizes = await self.client.get(hashes, buffers, READ_TIMEOUT_S)
            took_s = clock.now_s() - start_s
            for block_hash, buffer, size in zip(hashes, buffers, sizes, strict=True):
                assert size is None or bytes(buffer.view(size)) == content(block_hash)
            return sum(size is not None for size in sizes), took_s
        finally:
            self.client.staging.release(buffers)

    async def held(self, name: str, hashes: list[BlockHash]) -> int:
        """By that node alone."""
        return (await self.client.holdings(hashes)).get(NodeId(name), b"").count(1)

    async def copied(self, hashes: list[BlockHash], *names: str) -> None:
        async with asyncio.timeout(30):
            for name in names:
                while await self.held(name, hashes) < len(hashes):  # noqa: ASYNC110 - the state is another process's
                    await asyncio.sleep(0.05)

    async def drain(self, name: str, within_s: float = 30.0) -> DrainState:
        async with asyncio.timeout(within_s):
            while True:
                state = await self.peers.call(self.infos[name].address, Drain(), timeout_s=TIMEOUT_S)
                assert isinstance(state, DrainState)
                if state.state == "drained":
                    return state
                await asyncio.sleep(0.1)


class Reader:
    """Reads traces, one after another."""

    def __init__(self, fleet: Stores, traces: list[list[BlockHash]], seed: int) -> None:
        self.reads = 0
        self.failed = 0
        """Blocks that did not come."""
        self.slowest_s = 0.0
        self._fleet = fleet
        self._traces = traces
        self._dice = random.Random(seed)

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop."""
        while not stop.is_set():
            hashes = self._dice.choice(self._traces)
            got, took_s = await self._fleet.read(hashes)
            self.reads, self.failed = self.reads + 1, self.failed + len(hashes) - got
            self.slowest_s = max(self.slowest_s, took_s)
            await asyncio.sleep(0.002)


def h(trace: str, index: int) -> BlockHash:
    return BlockHash(f"{trace}{index:06d}".encode().ljust(16, b"."))


def content(block_hash: BlockHash) -> bytes:
    at = random.Random(block_hash).randrange(SLOT)
    return POOL[at : at + SLOT]


@contextlib.asynccontextmanager
async def open_fleet(stores: int) -> AsyncGenerator[Stores, None]:
    async with contextlib.AsyncExitStack() as stack:
        network = TcpNetwork()
        router = await network.listen("127.0.0.1:0", MemberRegistry(lambda _: None))
        memory = allocate(128 * SLOT, "client")
        stack.callback(memory.close)
        offload = ThreadOffload("client", 2)
        stack.callback(offload.close)
        transfer = ShmTransfer(f"client#{clock.wall_ns()}", offload)
        stack.push_async_callback(transfer.close)
        peers = Peers(network)
        stack.push_async_callback(router.close)
        stack.push_async_callback(peers.close)
        plane = Plane(transfer, transfer.register(memory))
        client = StoreClient(peers, [plane], Staging(memory, SLOT), offload)
        stack.push_async_callback(client.aclose)
        fleet = Stores(router.address, client, peers)
        stack.push_async_callback(fleet.end)
        follow = asyncio.create_task(_follow(peers, router.address, client))
        stack.callback(follow.cancel)
        await asyncio.gather(*(fleet.start(f"s{i}") for i in range(stores)))
        await asyncio.sleep(GRACE_S)
        yield fleet


async def _follow(peers: Peers, router: str, client: StoreClient) -> None:
    """The client is a member like any worker."""
    info = NodeInfo(NodeId("client"), Generation(1), "decode", "127.0.0.1:1")

    def on_members(members: Members) -> None:
        client.set_nodes(members.nodes, members.draining)

    await Membership(peers, [router], info, NodeLoad, on_members).run()


def play(stores: int, case: Callable[[Stores], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(110), open_fleet(stores) as fleet:
            await case(fleet)

    asyncio.run(main())


async def under_load(
    fleet: Stores, traces: list[list[BlockHash]], act: Callable[[], Awaitable[object]]
) -> tuple[int, float]:
    """Two readers before, during and after ``act``: failed blocks, and the slowest read's seconds."""
    stop = asyncio.Event()
    readers = [Reader(fleet, traces, seed) for seed in range(2)]
    async with asyncio.TaskGroup() as tasks:
        for reader in readers:
            tasks.create_task(reader.run(stop))
        await _more_reads(readers)
        await act()
        await _more_reads(readers)
        stop.set()
    assert fleet.client.stats.corrupt == 0
    return sum(reader.failed for reader in readers), max(reader.slowest_s for reader in readers)


async def _more_reads(readers: list[Reader]) -> None:
    """Until each has read :data:`READS` times more."""
    wanted = [reader.reads + READS for reader in readers]
    while any(reader.reads < reads for reader, reads in zip(readers, wanted, strict=True)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def replicated(fleet: Stores, count: int = 6) -> list[list[BlockHash]]:
    traces: list[list[BlockHash]] = []
    for i in range(count):
        home, second, *_ = fleet.order(f"t{i}")
        traces.append(await fleet.write(f"t{i}", home, 2))
        await fleet.copied(traces[-1], home, second)
    return traces


def test_a_killed_copy_fails_no_read_and_is_made_again() -> None:
    async def case(fleet: Stores) -> None:
        traces = await replicated(fleet)
        lone = await fleet.write("lone", "s0", 0)

        async def kill() -> None:
            fleet.processes["s0"].send_signal(signal.SIGKILL)
            await fleet.processes["s0"].wait()
            got, took_s = await fleet.read(lone)
            assert got == 0
            assert took_s < FAILED_OVER_S

        failed, slowest_s = await under_load(fleet, traces, kill)
        assert failed == 0
        assert slowest_s < FAILED_OVER_S
        del fleet.infos["s0"]
        for hashes in traces:
            await fleet.copied(hashes, "s1", "s2")

    play(3, case)


def test_a_frozen_copy_fails_no_read() -> None:
    async def case(fleet: Stores) -> None:
        traces = await replicated(fleet)
        frozen = fleet.processes["s0"]
        try:

            async def freeze() -> None:
                frozen.send_signal(signal.SIGSTOP)
                await asyncio.sleep(3.0)  # it is tried again each second

            failed, slowest_s = await under_load(fleet, traces, freeze)
        finally:
            frozen.send_signal(signal.SIGCONT)
        assert failed == 0
        assert slowest_s < FAILED_OVER_S

    play(2, case)


def test_a_drain_under_load_fails_no_read_and_leaves_nothing_behind() -> None:
    async def case(fleet: Stores) -> None:
        # One copy of each: what is not moved is lost.
        traces = [await fleet.write(f"t{i}", "s0", i % 2) for i in range(8)]

        async def drain() -> None:
            writing = asyncio.create_task(fleet.write("late", "s0", 0))
            state = await fleet.drain("s0")
            assert (state.blocks_left, state.pins_left, state.blocks_lost) == (0, 0, 0)
            traces.append(await writing)
            state = await fleet.drain("s0")
            assert state.blocks_left == 0
            fleet.processes["s0"].send_signal(signal.SIGTERM)
            await fleet.processes["s0"].wait()

        failed, slowest_s = await under_load(fleet, traces, drain)
        assert failed == 0
        assert slowest_s < FAILED_OVER_S
        for hashes in traces:
            assert (await fleet.read(hashes))[0] == BLOCKS

    play(3, case)


def test_a_soft_pin_that_nobody_takes_holds_no_drain_up() -> None:
    async def case(fleet: Stores) -> None:
        store = {"arena_bytes": SLOTS * SLOT, "slot_bytes": SLOT, "pins_max": 1}
        await fleet.start("s1", store=store)
        await fleet.write("own", "s1", 1)
        hashes = await fleet.write("other", "s0", 1)
        await asyncio.sleep(1.0)  # until the one has heard of the other
        state = await fleet.drain("s0")
        assert (state.blocks_left, state.pins_left, state.blocks_lost) == (0, 0, 0)
        assert await fleet.held("s1", hashes) == BLOCKS

    play(1, case)


def test_a_node_that_joins_takes_new_homes_and_nothing_else() -> None:
    async def case(fleet: Stores) -> None:
        traces = await replicated(fleet)

        async def join() -> None:
            await fleet.start("s2")
            await asyncio.sleep(2 * GRACE_S)

        failed, _ = await under_load(fleet, traces, join)
        assert failed == 0
        for hashes in traces:
            assert await fleet.held("s2", hashes) == 0
        name = next(f"n{i}" for i in range(100) if fleet.order(f"n{i}")[0] == "s2")
        hashes = await fleet.write(name, "s2", 2)
        await fleet.copied(hashes, *fleet.order(name)[:2])

    play(2, case)

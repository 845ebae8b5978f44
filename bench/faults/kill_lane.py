"""One store node with a disk tier through many lives: loaded, killed, started again, and asked for everything it owes.

What it owes is known from outside: the node says of each record when it is in the file (:mod:`bench.faults.kill_node`).
After each restart all of that must be visible and readable, every byte must be right, and a router's index that follows
the node must end equal to what the node has. While it dies, its clients go on and must see misses and nothing worse.
"""

import asyncio
import contextlib
import random
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec

from bench.faults.kill_node import POINTS, KillNode, Point
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from router.fleet.index import Index
from router.fleet.watch import StoreWatch
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.blocks import Existing, Exists, ListPins, Pin, PinList, TierList, Tiers, Unpin
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError, Overloaded
from tracehaul.wire.ids import BlockHash, TraceId

SLOT = 16 << 10
BLOCK = 15_000
ARENA_SLOTS = 32
BUFFERS = 24
ROOT = BlockHash(b"\xff" * 16)
POOL = random.Random(1).randbytes(2 * BLOCK)
LOAD_MAX_S = 0.4
"""A life is loaded for so long at most before it is killed from outside."""
SELF_KILL_MAX_S = 1.0
"""A node that does not pass its point in this time is killed from outside."""
SETTLE_S = 20.0
"""How long reads and the index may take to come right after a restart, on a busy machine."""
START_S = 30.0
PART = 8
"""Blocks read together."""
PINS = 40
PINNED_MAX = 10
"""Few and the same for all, so that they fit the store's limits."""
PIN_S = 3000.0
EXISTS_PART = 50_000
CHAIN = 4
"""Blocks in one sequence: a prefix with continuations is evicted last."""


def hash_of(number: int) -> BlockHash:
    """The name of block ``number``."""
    return BlockHash(number.to_bytes(16))


def content(number: int) -> bytes:
    """Its bytes."""
    at = random.Random(number).randrange(BLOCK)
    return POOL[at : at + BLOCK]


def parent_of(number: int) -> BlockHash:
    """What it is chained to."""
    return ROOT if number % CHAIN == 0 else hash_of(number - 1)


@dataclass
class Tally:
    """What all lanes have seen."""

    cycles: int = 0
    ends: Counter[str] = field(default_factory=Counter[str])
    """Lives by where they ended."""
    owed: int = 0
    """Blocks that a restarted node had to have, over all restarts."""
    put: int = 0
    got: int = 0
    lost: int = 0
    """Owed and not visible."""
    unread: int = 0
    """Owed, visible, and not readable within ``SETTLE_S``."""
    torn: int = 0
    """Served with wrong bytes: the one thing that must never be."""
    found_bad: int = 0
    """Bad blocks that the node or a reader found and dropped: there should be none, as nothing flips bytes here."""
    index_wrong: int = 0
    """Restarts after which the index did not come to equal the node."""
    pins: int = 0
    """Pins that a restarted node had to have, over all restarts."""
    pins_wrong: int = 0
    """Pins that were promised and are gone or cover something else; or were ended and are back."""
    restart_s: list[float] = field(default_factory=list[float])
    """From starting the process to its answer."""
    complaints: list[str] = field(default_factory=list[str])

    @property
    def violations(self) -> int:
        """What must be 0."""
        return self.lost + self.unread + self.torn + self.found_bad + self.index_wrong + self.pins_wrong

    def complain(self, text: str) -> None:
        """Say what went wrong; the first hundred say enough."""
        if len(self.complaints) < 100:
            self.complaints.append(text)


class Lane:
    """One node, life after life. ``file_slots`` small: the tier evicts all the time; large: it grows."""

    def __init__(self, name: str, folder: Path, file_slots: int, tally: Tally) -> None:
        self._name = name
        self._path = folder / f"{name}.blocks"
        self._file_bytes = (file_slots + 2) * (SLOT + 64) + (16 << 10)
        self._config = StoreConfig(
            arena_bytes=ARENA_SLOTS * SLOT, slot_bytes=SLOT, late_write_s=0.5, pin_half_life_s=PIN_S
        )
        self._dice = random.Random(name)
        self._tally = tally
        self._records: dict[int, BlockHash] = {}
        self._next = CHAIN
        self._generation = 0
        self._began_s = 0.0
        self._index = Index()
        self._pins: dict[TraceId, int] = {}
        """Blocks that each trace's pin was answered to cover."""
        self._asked: dict[TraceId, int | None] = {}
        """What was asked of a trace and not answered: either may be true."""

    async def run(self, cycles: int) -> None:
        """That many lives and deaths, and one life more, which must have all that the last one left."""
        async with contextlib.AsyncExitStack() as stack:
            peers = Peers(TcpNetwork())
            stack.push_async_callback(peers.close)
            client = await stack.enter_async_context(_open_client(peers, f"client-{self._name}"))
            watch = StoreWatch(peers, self._index)
            stack.push_async_callback(watch.close)
            for _ in range(cycles):
                await self._live(peers, client, watch, last=False)
                self._tally.cycles += 1
            await self._live(peers, client, watch, last=True)
            await asyncio.sleep(0.1)  # what the last death left under way
            assert client.staging.quarantined == 0, "a transfer never settled"
            assert client.staging.free == client.staging.count, "a buffer leaked"

    async def _live(self, peers: Peers, client: StoreClient, watch: StoreWatch, *, last: bool) -> None:
        self._generation += 1
        chance = self._dice.random()
        if chance < 0.1 and not last:
            await self._die_starting()
            return
        point = self._dice.choice(POINTS) if chance < 0.6 and not last else None
        process = await self._start(point)
        following: asyncio.Task[None] | None = None
        try:
            info = await self._ready(process)
            client.set_nodes([info])
            watch.set_nodes((info,))
            assert process.stdout is not None
            following = asyncio.create_task(self._follow(process.stdout))
            await self._verify(peers, client, info)
            if not last:
                await self._load_until_dead(process, peers, client, info, point)
        finally:
            await _kill(process)
            if following is not None:
                await following

    async def _start(self, point: Point | None) -> asyncio.subprocess.Process:
        passes = self._dice.choice([0, 0, 1, 2, 5, 10])
        told = KillNode(self._name, self._generation, self._config, str(self._path), self._file_bytes, point, passes)
        self._began_s = clock.perf_s()
        command = (sys.executable, "-m", "bench.faults.kill_node", msgspec.json.encode(told).decode())
        return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)

    async def _ready(self, process: asyncio.subprocess.Process) -> NodeInfo:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        self._tally.restart_s.append(clock.perf_s() - self._began_s)
        return msgspec.json.decode(line, type=NodeInfo)

    async def _die_starting(self) -> None:
        """Killed while it takes over its file, or before."""
        process = await self._start(None)
        await asyncio.sleep(self._dice.uniform(0.0, median(self._tally.restart_s or [0.2])))
        await _kill(process)
        self._tally.ends["starting"] += 1

    async def _follow(self, stdout: asyncio.StreamReader) -> None:
        """Until the process's end; a line cut by it counts for nothing."""
        while (line := await stdout.readline()).endswith(b"\n"):
            what, slot, *rest = line.decode().split()
            if what == "+":
                self._records[int(slot)] = BlockHash(bytes.fromhex(rest[0]))
            else:
                self._records.pop(int(slot), None)

    # --- after a restart ----------------------------------------------------------------------------------

    async def _verify(self, peers: Peers, client: StoreClient, info: NodeInfo) -> None:
        numbers = sorted({int.from_bytes(block_hash) for block_hash in self._records.values()})
        held = await self._exist(peers, info, numbers)
        lost = [number for number in numbers if number not in held]
        for start in range(0, len(numbers), PART):
            await self._read(client, info, [number for number in numbers[start : start + PART] if number in held])
        tiers = await peers.call(info.address, Tiers(), timeout_s=5.0)
        assert isinstance(tiers, TierList)
        bad = sum(tiers.tiers[1].counters[name] for name in ("corrupt", "failed")) + tiers.tiers[0].counters["corrupt"]
        where = f"{self._name}#{self._generation}"
        await self._verify_pins(peers, info, where)
        if lost:
            self._tally.complain(f"{where}: published on disk and lost: {lost}")
        if bad or client.stats.corrupt:
            self._tally.complain(f"{where}: {tiers.tiers} {client.stats}")
        if not await self._index_settles(peers, info):
            self._tally.index_wrong += 1
            self._tally.complain(f"{where}: the index differs from the node")
        self._tally.owed += len(numbers)
        self._tally.lost += len(lost)
        self._tally.found_bad += bad + client.stats.misses.pop("corrupt", 0)

    async def _verify_pins(self, peers: Peers, info: NodeInfo, where: str) -> None:
        listed = await peers.call(info.address, ListPins(), timeout_s=5.0)
        assert isinstance(listed, PinList)
        found = {pin.trace: pin.blocks for pin in listed.pins}
        for trace in {*found, *self._pins, *self._asked}:
            allowed = {self._pins.get(trace)}
            if trace in self._asked:
                allowed |= {None, self._asked[trace]}
            if found.get(trace) not in allowed:
                self._tally.pins_wrong += 1
                self._tally.complain(f"{where}: {trace} pins {found.get(trace)} blocks, not {allowed}")
        self._tally.pins += len(self._pins)
        self._pins = found
        self._asked.clear()

    async def _exist(self, peers: Peers, info: NodeInfo, numbers: Sequence[int]) -> set[int]:
        held: set[int] = set()
        for start in range(0, len(numbers), EXISTS_PART):
            part = numbers[start : start + EXISTS_PART]
            request = Exists(tuple([hash_of(number) for number in part]))
            existing = await peers.call(info.address, request, timeout_s=10.0)
            assert isinstance(existing, Existing)
            held.update(number for number, there in zip(part, existing.held, strict=True) if there)
        return held

    async def _read(self, client: StoreClient, info: NodeInfo, numbers: list[int]) -> None:
        """All of them, as long as it takes within reason: slots may be busy for a moment."""
        left = numbers
        deadline_s = clock.now_s() + SETTLE_S
        while left and clock.now_s() < deadline_s:
            got = await self._get(client, left, info)
            left = [number for number, there in zip(left, got, strict=True) if not there]
            await asyncio.sleep(0.05 if left else 0.0)
        if left:
            self._tally.unread += len(left)
            self._tally.complain(f"{self._name}#{self._generation}: not served: {left} {client.stats.misses}")

    async def _index_settles(self, peers: Peers, info: NodeInfo) -> bool:
        everything = list(range(CHAIN, self._next))
        deadline_s = clock.now_s() + SETTLE_S
        while clock.now_s() < deadline_s:
            before = self._index.held(info.node)
            truth = frozenset(hash_of(number) for number in await self._exist(peers, info, everything))
            if before.keys() == truth:
                return True
            await asyncio.sleep(0.02)
        return False

    # --- until the next death -----------------------------------------------------------------------------

    async def _load_until_dead(
        self,
        process: asyncio.subprocess.Process,
        peers: Peers,
        client: StoreClient,
        info: NodeInfo,
        point: Point | None,
    ) -> None:
        working = [asyncio.create_task(self._write(client, info)), asyncio.create_task(self._read_on(client, info))]
        working.append(asyncio.create_task(self._write(client, info)))
        working.append(asyncio.create_task(self._pin(peers, info)))
        try:
            if point is not None and await _ends(process, SELF_KILL_MAX_S):
                self._tally.ends[point] += 1
            else:
                await asyncio.sleep(self._dice.uniform(0.0, LOAD_MAX_S))
                self._tally.ends["anywhere"] += 1
                await _kill(process)
            await asyncio.sleep(self._dice.choice([0.0, 0.0, 0.05]))  # its clients meet the dead
        finally:
            for task in working:
                task.cancel()
            for task in working:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _write(self, client: StoreClient, info: NodeInfo) -> None:
        while True:
            count = self._dice.randrange(1, PART)
            numbers = list(range(self._next, self._next + count))
            self._next += count
            if self._dice.random() < 0.2:  # some that were evicted, or lost with memory, come again
                numbers += [self._dice.randrange(CHAIN, numbers[0] + 1)]
            await self._put(client, info, list(dict.fromkeys(numbers)))
            await asyncio.sleep(0)

    async def _pin(self, peers: Peers, info: NodeInfo) -> None:
        """Pin and unpin without rest, and remember what was answered."""
        while True:
            trace = TraceId(f"t{self._dice.randrange(PINS)}")
            blocks = self._dice.randrange(1, PINNED_MAX) if self._dice.random() < 0.7 else None
            hashes = tuple([hash_of(number) for number in range(CHAIN, CHAIN + (blocks or 0))])
            self._asked[trace] = blocks
            try:
                await peers.call(info.address, Unpin(trace), timeout_s=2.0)
                self._pins.pop(trace, None)
                if blocks is not None:
                    await peers.call(info.address, Pin(trace, hashes, PIN_S, "soft", 2.0**20), timeout_s=2.0)
                    self._pins[trace] = blocks
                del self._asked[trace]
            except Overloaded:
                del self._asked[trace]
            except ClusterError:
                return  # it is dead, and what became of the last one is not known
            await asyncio.sleep(0)

    async def _read_on(self, client: StoreClient, info: NodeInfo) -> None:
        while True:
            await self._get(client, [self._dice.randrange(CHAIN, self._next) for _ in range(2)], info)
            await asyncio.sleep(0)

    async def _put(self, client: StoreClient, info: NodeInfo, numbers: Sequence[int]) -> None:
        buffers = await client.staging.acquire(len(numbers), 10.0)
        try:
            blocks: list[OutgoingBlock] = []
            for number, buffer in zip(numbers, buffers, strict=True):
                buffer.view(BLOCK)[:] = content(number)
                blocks.append(OutgoingBlock(hash_of(number), parent_of(number), buffer, BLOCK))
            outcomes = await client.put(info.node, blocks, 2.0)
            self._tally.put += outcomes.count("published")
            if "corrupt" in outcomes:
                self._tally.found_bad += 1
                self._tally.complain(f"{self._name}#{self._generation}: a put landed wrong")
        finally:
            client.staging.release(buffers)

    async def _get(self, client: StoreClient, numbers: Sequence[int], info: NodeInfo) -> list[bool]:
        buffers = await client.staging.acquire(len(numbers), 10.0)
        try:
            sizes = await client.get([hash_of(n) for n in numbers], buffers, 5.0, [info.node] * len(numbers))
            for number, buffer, size in zip(numbers, buffers, sizes, strict=True):
                if size is not None and bytes(buffer.view(size)) != content(number):
                    self._tally.torn += 1
                    self._tally.complain(f"{self._name}#{self._generation}: {number} was served torn")
            self._tally.got += sum(size is not None for size in sizes)
            return [size is not None for size in sizes]
        finally:
            client.staging.release(buffers)


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _ends(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        return False
    return True


@contextlib.asynccontextmanager
async def _open_client(peers: Peers, owner: str) -> AsyncGenerator[StoreClient, None]:
    async with contextlib.AsyncExitStack() as stack:
        memory = allocate(BUFFERS * SLOT, owner)
        stack.callback(memory.close)
        offload = ThreadOffload(owner)
        stack.callback(offload.close)
        transfer = ShmTransfer(f"{owner}#1", offload)
        stack.push_async_callback(transfer.close)
        client = StoreClient(peers, [Plane(transfer, transfer.register(memory))], Staging(memory, SLOT), offload)
        stack.push_async_callback(client.aclose)
        yield client

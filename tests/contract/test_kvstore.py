"""The store as workers see it: one suite over the in-process network and over TCP with shared memory."""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import msgspec
import pytest

from kvstore.client import reader, writer
from kvstore.client.client import OutgoingBlock, PutOutcome, StoreClient
from kvstore.client.looks import LOOK_TIMEOUT_S
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.node.assemble import assemble_store
from kvstore.node.node import StoreNode
from tracehaul.rpc.base import NO_CONTEXT, CallContext, Connection, Network, Server
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.offload import InlineOffload, Offload, ThreadOffload
from tracehaul.transfer.base import Copy, Region, Transfer
from tracehaul.transfer.local import Landing, LocalHub, LocalTransfer, PerfectLink
from tracehaul.transfer.memory import FileMemory, allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import (
    Abandon,
    Await,
    Awaited,
    BlockSpec,
    Events,
    Full,
    InFlight,
    Lease,
    Leased,
    ListPins,
    Pin,
    PinList,
    Publication,
    Publish,
    Published,
    RegionDescriptor,
    Release,
    Removed,
    Reserve,
    Reserved,
    Revoke,
    Slot,
    Snapshot,
    Stored,
    Subscribe,
    Unpin,
)
from tracehaul.wire.cluster import Members, NodeInfo
from tracehaul.wire.errors import InvalidRequest, Overloaded
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash, Checksum, Generation, NodeId, SlotGeneration, TraceId
from tracehaul.wire.messages import Reply, Request

SLOT = 8192
ROOT = BlockHash(b"\xff" * 16)
TIMEOUT_S = 5.0


class GateLink(PerfectLink):
    """Bytes arrive when the gate is open; ``flip`` makes one of them wrong."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.flip: int | None = None

    async def carry(self, source: str, target: str, nbytes: int) -> Landing:
        await self.gate.wait()
        return Landing(flipped_byte=self.flip)


class RunningNode:
    def __init__(self, info: NodeInfo, node: StoreNode, server: Server, memory: FileMemory, owner: str) -> None:
        self.info, self.node, self.server, self.memory, self.owner = info, node, server, memory, owner


class World:
    """Nodes and clients over one kind of network and transport."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.link = GateLink()
        self._hub = LocalHub(self.link)
        self.network: Network = LocalNetwork() if kind == "local" else TcpNetwork()
        self._stack = contextlib.AsyncExitStack()
        self.nodes: dict[str, RunningNode] = {}
        self.clients: list[StoreClient] = []

    async def __aenter__(self) -> "World":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def offload(self) -> Offload:
        offload: Offload = InlineOffload() if self.kind == "local" else ThreadOffload("test")
        self._stack.callback(offload.close)
        return offload

    def plane(self, owner: str, memory: FileMemory) -> Plane:
        transfer: Transfer
        transfer = LocalTransfer(owner, self._hub) if self.kind == "local" else ShmTransfer(owner, self.offload())
        self._stack.push_async_callback(transfer.close)
        return Plane(transfer, transfer.register(memory))

    def memory(self, nbytes: int) -> FileMemory:
        memory = allocate(nbytes, "test")
        self._stack.callback(memory.close)
        return memory

    async def start(self, name: str, slots: int = 64, generation: int = 1, **changes: float) -> RunningNode:
        config = msgspec.structs.replace(StoreConfig(arena_bytes=slots * SLOT, slot_bytes=SLOT), **changes)
        memory = self.memory(config.arena_bytes)
        owner = f"{name}#{generation}"
        planes = [self.plane(owner, memory)]
        node = assemble_store(config, Generation(generation), planes, memory, self.offload())
        server = await self.network.listen("127.0.0.1:0", node)
        self._stack.callback(node.close)
        self._stack.push_async_callback(server.close)
        info = NodeInfo(NodeId(name), Generation(generation), "store", server.address)
        self.nodes[name] = RunningNode(info, node, server, memory, owner)
        self._tell()
        for client in self.clients:
            await client.warm(TIMEOUT_S)
        return self.nodes[name]

    async def kill(self, name: str) -> None:
        """The process is gone, and nobody has said so yet."""
        running = self.nodes[name]
        await running.server.close()
        self._hub.remove(running.owner)

    async def client(self, buffers: int = 16, wrap: Callable[[Transfer], Transfer] = lambda t: t) -> StoreClient:
        memory = self.memory(buffers * SLOT)
        peers = Peers(self.network)
        self._stack.push_async_callback(peers.close)
        transfer, region = self.plane(f"client{len(self.clients)}#1", memory)
        client = StoreClient(peers, [Plane(wrap(transfer), region)], Staging(memory, SLOT), self.offload())
        self._stack.push_async_callback(client.aclose)
        self.clients.append(client)
        self._tell()
        await client.warm(TIMEOUT_S)
        return client

    async def connect(self, name: str) -> Connection:
        connection = await self.network.connect(self.nodes[name].info.address, timeout_s=TIMEOUT_S)
        self._stack.push_async_callback(connection.close)
        return connection

    def _tell(self) -> None:
        infos = [running.info for running in self.nodes.values()]
        for client in self.clients:
            client.set_nodes([NodeInfo(NodeId("p0"), Generation(1), "prefill", "127.0.0.1:1"), *infos])


Case = Callable[[World], Awaitable[None]]


MORE = ["tcp", "local in parts", "tcp in parts"]


@pytest.fixture(params=["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)])
def play(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], None]:
    """In parts: every block is a part of its own, as those of a large put or get are."""
    kind, _, parts = request.param.partition(" ")
    if parts:
        monkeypatch.setattr(reader, "READ_PART_BYTES", 1)
        monkeypatch.setattr(writer, "WRITE_PART_BYTES", 1)
    return lambda case: run(kind, case)


def run(kind: str, case: Case) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), World(kind) as world:
            await case(world)
            for running in world.nodes.values():
                running.node.arena.check()

    asyncio.run(main())


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b"."))


def content(name: str, nbytes: int = 5000) -> bytes:
    return random.Random(name).randbytes(nbytes)


async def put(
    client: StoreClient, names: Sequence[str], home: str | None = None, timeout_s: float = TIMEOUT_S
) -> list[PutOutcome]:
    """Put a sequence of blocks, each the next one's parent."""
    buffers = await client.staging.acquire(len(names), TIMEOUT_S)
    parents = [ROOT, *(h(name) for name in names[:-1])]
    blocks: list[OutgoingBlock] = []
    for name, parent, buffer in zip(names, parents, buffers, strict=True):
        data = content(name)
        buffer.view(len(data))[:] = data
        blocks.append(OutgoingBlock(h(name), parent, buffer, len(data)))
    try:
        return await client.put(None if home is None else NodeId(home), blocks, timeout_s)
    finally:
        client.staging.release(buffers)


async def get(
    client: StoreClient, names: Sequence[str], where: Sequence[str] | None = None, timeout_s: float = 30.0
) -> list[bytes | None]:
    buffers = await client.staging.acquire(len(names), TIMEOUT_S)
    try:
        nodes = None if where is None else [NodeId(node) for node in where]
        sizes = await client.get([h(name) for name in names], buffers, timeout_s, nodes)
        return [None if n is None else bytes(b.view(n)) for b, n in zip(buffers, sizes, strict=True)]
    finally:
        client.staging.release(buffers)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is awaited is state of the code under test
            await asyncio.sleep(0.01)


async def lease(connection: Connection, names: Sequence[str], ttl_s: float = 30.0) -> Leased:
    reply = await connection.call(Lease(tuple(h(name) for name in names), ttl_s), timeout_s=TIMEOUT_S)
    assert isinstance(reply, Leased)
    return reply


async def reserve(connection: Connection, name: str) -> object:
    reply = await connection.call(Reserve((BlockSpec(h(name), ROOT, 5000),)), timeout_s=TIMEOUT_S)
    assert isinstance(reply, Reserved)
    return reply.outcomes[0]


# --- the plain way ----------------------------------------------------------------------------------------


def test_what_was_put_is_got(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        writer, reader = await world.client(), await world.client()
        names = ["a", "b", "c"]
        assert await writer.exists([h("a")]) == [None]
        assert await put(writer, names) == ["published"] * 3
        assert await reader.exists([h("a"), h("x"), h("c")]) == ["s0", None, "s0"]
        assert await get(reader, ["a", "x", "c"]) == [content("a"), None, content("c")]
        assert (reader.stats.hits, reader.stats.misses) == (2, {"absent": 1})
        assert reader.stats.get_bytes == 10000
        assert writer.stats.put_bytes == 15000
        assert await put(reader, names) == ["present"] * 3
        await eventually(lambda: world.nodes["s0"].node.arena.leases == 0)
        load = world.nodes["s0"].node.load()
        assert (load.blocks, load.bytes_used, load.bytes_max) == (3, 15000, 64 * SLOT)

    play(case)


def test_blocks_come_from_all_nodes_that_hold_them(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        for name in ("s0", "s1", "s2"):
            await world.start(name)
        client = await world.client()
        await put(client, ["a", "b"], "s0")
        await put(client, ["b", "c"], "s1")
        await put(client, ["d"], "s2")
        names = ["a", "b", "c", "d", "e"]
        assert await client.exists([h(name) for name in names]) == ["s0", "s0", "s1", "s2", None]
        assert await get(client, names) == [content("a"), content("b"), content("c"), content("d"), None]

    play(case)


def test_without_a_home_all_writers_choose_the_same(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        for name in ("s0", "s1", "s2"):
            await world.start(name)
        first, second = await world.client(), await world.client()
        names = [str(i) for i in range(12)]
        for name in names:
            assert await put(first, [name]) == ["published"]
            assert await put(second, [name]) == ["present"]
        assert all(len(running.node.arena) > 0 for running in world.nodes.values())

    play(case)


def test_no_nodes_is_a_miss(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        client = await world.client()
        assert await client.exists([h("a")]) == [None]
        assert await get(client, ["a"]) == [None]
        assert await put(client, ["a"]) == ["lost"]
        assert await client.exists([]) == []
        assert await client.put(None, [], 1.0) == []

    play(case)


# --- loss -------------------------------------------------------------------------------------------------


def test_a_lost_node_is_a_miss_and_its_writes_go_elsewhere(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        await world.start("s1")
        client = await world.client()
        await put(client, ["a"], "s0")
        await put(client, ["b"], "s1")
        await world.kill("s0")
        assert await get(client, ["a", "b"], where=["s0", "s1"]) == [None, content("b")]
        assert client.stats.misses == {"lost": 1}
        assert await put(client, ["a"], "s0") == ["published"]
        assert await get(client, ["a", "b"]) == [content("a"), content("b")]

    play(case)


def test_a_put_fails_over_once(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        for name in ("s0", "s1"):
            await world.start(name)
        client = await world.client()
        await world.kill("s0")
        assert await put(client, ["a"], "s0") == ["published"]
        assert client.stats.failovers == 1
        await world.kill("s1")
        assert await put(client, ["b"], "s0") == ["lost"]

    play(case)


class Mute:
    """A node that takes every call and answers none, as a frozen one does."""

    async def call(self, request: Request, context: CallContext) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        await asyncio.Event().wait()
        yield Ok()

    def disconnected(self, peer: str) -> None:
        pass


class Liar:
    """A node that answers everything with something of no use."""

    async def call(self, request: Request, context: CallContext) -> Reply:
        return Leased(1, (), 1.0) if isinstance(request, Lease) else Members(1, ())  # type: ignore[arg-type]

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        yield Ok()

    def disconnected(self, peer: str) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("service", [Mute, Liar])
def test_a_silent_or_lying_node_delays_no_one_for_long(play: Callable[[Case], None], service: type) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0")
        client = await world.client()
        await put(client, ["a"], "s0")
        server = await world.network.listen("127.0.0.1:0", service())
        bad = NodeInfo(NodeId("s1"), Generation(1), "store", server.address)
        client.set_nodes([running.info, bad])
        start_s = clock.now_s()
        assert await get(client, ["a"]) == [content("a")]
        for _ in range(50):  # the breaker is open
            assert await client.exists([h("a")]) == ["s0"]
        assert clock.now_s() - start_s < 50 * LOOK_TIMEOUT_S / 2, "no look waited for it but the first"
        client.set_nodes([running.info, msgspec.structs.replace(bad, generation=2)])  # forgets the breaker
        assert await get(client, ["a", "b"], where=["s0", "s1"], timeout_s=0.5) == [content("a"), None]
        client.set_nodes([running.info, msgspec.structs.replace(bad, generation=3)])
        assert await put(client, ["b"], "s1", timeout_s=0.5) in (["published"], ["lost"])
        await server.close()

    play(case)


def test_a_new_life_is_a_new_node(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        client = await world.client()
        await put(client, ["a"], "s0")
        await world.kill("s0")
        await world.start("s0", generation=2)
        assert await get(client, ["a"]) == [None]
        assert await put(client, ["a"], "s0") == ["published"]
        assert await get(client, ["a"]) == [content("a")]
        stale = msgspec.structs.replace(world.nodes["s0"].info, generation=Generation(1))
        client.set_nodes([stale])
        assert await put(client, ["b"], "s0") == ["lost"]
        assert len(world.nodes["s0"].node.arena) == 1

    play(case)


# --- wrong bytes ------------------------------------------------------------------------------------------


def test_a_block_that_rots_is_dropped_counted_and_never_returned(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0")
        client = await world.client()
        await put(client, ["a", "b"])
        leased = await lease(await world.connect("s0"), ["a"])
        assert leased.blocks[0] is not None
        running.memory.buffer[leased.blocks[0].offset + 4321] ^= 1
        assert await get(client, ["a", "b"]) == [None, content("b")]
        assert client.stats.corrupt == 1
        await eventually(lambda: running.node.stats.corrupt_held == 1)
        assert await client.exists([h("a"), h("b")]) == [None, "s0"]

    play(case)


def test_a_block_that_is_bad_only_on_arrival_stays_in_the_store() -> None:
    async def case(world: World) -> None:
        running = await world.start("s0")
        client = await world.client()
        await put(client, ["a"])
        world.link.flip = 77
        assert await get(client, ["a"]) == [None]
        world.link.flip = None
        assert client.stats.corrupt == 1
        await eventually(lambda: running.node.arena.leases == 0)
        assert await get(client, ["a"]) == [content("a")]
        assert running.node.stats.corrupt_held == 0

    run("local", case)


def test_bytes_that_land_wrong_are_not_published() -> None:
    async def case(world: World) -> None:
        running = await world.start("s0")
        client = await world.client()
        world.link.flip = 77
        assert await put(client, ["a", "b"]) == ["corrupt", "published"]
        assert await client.exists([h("a")]) == [None]
        assert running.node.arena.slots_quarantined == 1
        world.link.flip = None
        assert await put(client, ["a"]) == ["published"]

    run("local", case)


def test_an_unfounded_accusation_changes_nothing(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        client = await world.client()
        await put(client, ["a"])
        connection = await world.connect("s0")
        for name, generation in (("a", 1), ("a", 9), ("x", 1)):
            assert await connection.call(Revoke(h(name), SlotGeneration(generation)), timeout_s=TIMEOUT_S) == Ok()
        assert await get(client, ["a"]) == [content("a")]

    play(case)


# --- leases and reservations ------------------------------------------------------------------------------


def test_a_lease_keeps_a_block_in_a_full_arena(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0", slots=2)
        client = await world.client()
        connection = await world.connect("s0")
        await put(client, ["a"])
        await put(client, ["b"])
        held = [await lease(connection, ["a"]), await lease(connection, ["b"])]
        assert await put(client, ["c"]) == ["full"]
        assert await connection.call(Release(held[0].lease), timeout_s=TIMEOUT_S) == Ok()
        assert await put(client, ["c"]) == ["published"]
        assert await client.exists([h("a"), h("b"), h("c")]) == [None, "s0", "s0"]
        await connection.close()
        arena = world.nodes["s0"].node.arena
        await eventually(lambda: arena.leases == 0)

    play(case)


def test_leases_expire_by_themselves(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", lease_ttl_max_s=0.2)
        client = await world.client()
        await put(client, ["a"])
        granted = await lease(await world.connect("s0"), ["a"], ttl_s=1000.0)
        assert granted.ttl_s == 0.2
        assert running.node.arena.leases == 1
        await eventually(lambda: running.node.arena.leases == 0)

    play(case)


class Late:
    """A transport that pays no heed to its deadline: the bytes land, after the lease has ended."""

    def __init__(self, inner: Transfer) -> None:
        self._inner = inner
        self.kind = inner.kind
        self.register = inner.register
        self.reaches = inner.reaches
        self.write = inner.write
        self.close = inner.close

    async def read(self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float) -> None:
        await self._inner.read(remote, local, copies, timeout_s=timeout_s)
        if copies:
            await asyncio.sleep(timeout_s + 0.01)


def test_a_read_that_outlives_its_lease_is_refused(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0", lease_ttl_max_s=0.2)
        client = await world.client(wrap=Late)
        await put(client, ["a"])
        assert await get(client, ["a"]) == [None]
        assert client.stats.misses == {"lease_expired": 1}

    play(case)


def test_one_holder_has_only_so_many_leases(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0", leases_max=2)
        client = await world.client()
        await put(client, ["a"])
        connection = await world.connect("s0")
        await lease(connection, ["a"])
        await lease(connection, ["a"])
        with pytest.raises(Overloaded):
            await lease(connection, ["a"])
        assert await get(client, ["a"]) == [content("a")]

    play(case)


def test_a_writer_that_dies_leaves_its_block_to_others(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", slots=2)
        client = await world.client()
        dying = await world.connect("s0")
        slot = await reserve(dying, "a")
        assert isinstance(slot, Slot)
        putting = asyncio.create_task(put(client, ["a"]))
        await eventually(lambda: running.node.stats.waits == 1)
        await dying.close()
        assert await putting == ["published"]
        assert running.node.arena.slots_quarantined == 1
        leased = await lease(await world.connect("s0"), ["a"])
        assert leased.blocks[0] is not None
        assert leased.blocks[0].offset != slot.offset, "a late write may still land there"

    play(case)


def test_a_publish_after_the_reservation_is_fenced(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", reservation_ttl_s=0.1)
        connection = await world.connect("s0")
        slot = await reserve(connection, "a")
        assert isinstance(slot, Slot)
        await eventually(lambda: running.node.arena.slots_quarantined == 1)
        request = Publish((Publication(h("a"), slot.generation, Checksum(0)),))
        assert await connection.call(request, timeout_s=TIMEOUT_S) == Published(("fenced",))

    play(case)


def test_quarantine_ends_by_itself(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", slots=1, reservation_ttl_s=0.05, late_write_s=0.15)
        connection = await world.connect("s0")
        await reserve(connection, "a")
        await eventually(lambda: running.node.arena.slots_quarantined == 1)
        assert isinstance(await reserve(connection, "b"), Full)
        await eventually(lambda: running.node.arena.slots_free == 1)
        assert running.node.arena.next_deadline_s() is None

    play(case)


def test_an_oversized_block_is_refused_and_the_rest_of_its_put_is_not(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0", slots=4, slot_bytes=4096)
        client = await world.client()
        assert await put(client, ["a"]) == ["too_large"]
        (buffer,) = await client.staging.acquire(1, TIMEOUT_S)
        assert await client.put(None, [OutgoingBlock(h("b"), ROOT, buffer, 100)], TIMEOUT_S) == ["published"]

    play(case)


def test_a_block_larger_than_the_readers_buffer_is_a_miss(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0", slots=4, slot_bytes=2 * SLOT)
        connection = await world.connect("s0")
        data = bytes(2 * SLOT)
        reply = await connection.call(Reserve((BlockSpec(h("a"), ROOT, len(data)),)), timeout_s=TIMEOUT_S)
        assert isinstance(reply, Reserved)
        assert isinstance(reply.outcomes[0], Slot)
        publication = Publication(h("a"), reply.outcomes[0].generation, checksum(data))
        assert await connection.call(Publish((publication,)), timeout_s=TIMEOUT_S) == Published(("published",))
        client = await world.client()
        assert await get(client, ["a"]) == [None]
        assert client.stats.misses == {"too_large": 1}

    play(case)


def test_nonsense_is_refused(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        connection = await world.connect("s0")
        assert await connection.call(Ping(), timeout_s=TIMEOUT_S) == Ok()
        short = BlockHash(b"short")
        for request in (
            Subscribe(),
            Reserve((BlockSpec(short, ROOT, 1),)),
            Reserve((BlockSpec(h("a"), short, 1),)),
            Reserve((BlockSpec(h("a"), h("a"), 1),)),
        ):
            with pytest.raises(InvalidRequest):
                await connection.call(request, timeout_s=TIMEOUT_S)
        with pytest.raises(InvalidRequest):
            await anext(connection.stream(Ping(), idle_timeout_s=TIMEOUT_S))

    play(case)


# --- abort ------------------------------------------------------------------------------------------------


def test_an_aborted_get_keeps_its_buffers_until_the_bytes_have_landed() -> None:
    async def case(world: World) -> None:
        running = await world.start("s0")
        client = await world.client(buffers=4)
        await put(client, ["a", "b"])
        world.link.gate.clear()
        getting = asyncio.create_task(get(client, ["a", "b"]))
        await eventually(lambda: running.node.arena.leases == 1)
        await asyncio.sleep(0.01)
        getting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await getting
        assert (client.staging.free, client.staging.quarantined) == (2, 2)
        await eventually(lambda: running.node.arena.leases == 0)
        world.link.gate.set()
        await eventually(lambda: client.staging.free == 4)
        assert client.staging.quarantined == 0

    run("local", case)


@pytest.mark.parametrize("patience", range(4))
def test_an_abort_frees_leases_and_reservations_whenever_it_comes(play: Callable[[Case], None], patience: int) -> None:
    async def case(world: World) -> None:
        arena = (await world.start("s0")).node.arena
        client = await world.client(buffers=4)
        await put(client, ["a"])
        for begin, pending in ((get, lambda: arena.leases), (put, lambda: arena.reservations)):
            for _ in range(5):
                names = ["a"] if begin is get else ["b"]
                task = asyncio.create_task(begin(client, names, timeout_s=30.0))
                while not pending() and not task.done():  # noqa: ASYNC110 - the very next step after it
                    await asyncio.sleep(0)
                for _ in range(patience):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await eventually(lambda: arena.leases == arena.reservations == 0)
                await eventually(lambda: client.staging.free == 4)
                assert arena.slots_quarantined == 0

    play(case)


def test_a_read_past_its_deadline_keeps_its_buffers_until_the_bytes_have_landed() -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        client = await world.client(buffers=2)
        await put(client, ["a", "b"])
        world.link.gate.clear()
        assert await get(client, ["a", "b"], timeout_s=0.1) == [None, None]
        assert client.stats.misses == {"timeout": 2}
        assert client.staging.quarantined == 2
        world.link.gate.set()
        await eventually(lambda: client.staging.free == 2)

    run("local", case)


def test_a_node_with_a_stuck_transfer_cannot_drain_the_staging_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.client.client.BREAK_S", 0.0)

    async def case(world: World) -> None:
        await world.start("s0")
        client = await world.client(buffers=4)
        await put(client, ["a"], "s0")
        world.link.gate.clear()
        for _ in range(3):
            assert await get(client, ["a"], where=["s0"], timeout_s=0.05) == [None]
            assert await put(client, ["b"], "s0", timeout_s=0.05) == ["lost"]
        assert client.staging.quarantined == 1
        world.link.gate.set()
        await eventually(lambda: client.staging.free == 4)
        assert await get(client, ["a"], where=["s0"]) == [content("a")]

    run("local", case)


def test_an_aborted_put_frees_its_slot_once_its_write_is_over() -> None:
    async def case(world: World) -> None:
        arena = (await world.start("s0", slots=1)).node.arena
        client = await world.client(buffers=2)
        world.link.gate.clear()
        putting = asyncio.create_task(put(client, ["a"]))
        await eventually(lambda: arena.reservations == 1)
        await asyncio.sleep(0.01)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        await asyncio.sleep(0.05)
        assert (arena.reservations, client.staging.quarantined) == (1, 1), "its bytes may still land"
        world.link.gate.set()
        await eventually(lambda: arena.slots_free == 1)
        assert arena.slots_quarantined == 0
        assert client.staging.free == 2
        assert await put(client, ["a"]) == ["published"]

    run("local", case)


def test_a_write_past_its_deadline_rests_its_slot() -> None:
    async def case(world: World) -> None:
        arena = (await world.start("s0", reservation_ttl_s=0.3)).node.arena
        client = await world.client(buffers=2)
        world.link.gate.clear()
        assert await put(client, ["a"], timeout_s=0.1) == ["lost"]
        assert client.staging.quarantined == 1
        await eventually(lambda: arena.slots_quarantined == 1)
        world.link.gate.set()
        await eventually(lambda: client.staging.free == 2)

    run("local", case)


# --- events -----------------------------------------------------------------------------------------------


def test_a_second_writer_waits_for_the_first(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        first, second = await world.connect("s0"), await world.connect("s0")
        client = await world.client()
        specs = [BlockSpec(h(name), ROOT, 1) for name in "ab"]
        reserved = await first.call(Reserve(tuple(specs)), timeout_s=TIMEOUT_S)
        assert isinstance(reserved, Reserved)
        told = await second.call(Reserve((specs[0],)), timeout_s=TIMEOUT_S)
        assert isinstance(told, Reserved)
        (in_flight,) = told.outcomes
        assert isinstance(in_flight, InFlight)
        assert in_flight.owner, "by whom"
        waiting = asyncio.create_task(client.wait(NodeId("s0"), [h("a"), h("b"), h("c")], TIMEOUT_S))
        await _publish_zeros(first, specs[:1], Reserved(reserved.outcomes[:1]))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "one of them is still being written"
        slot = reserved.outcomes[1]
        assert isinstance(slot, Slot)
        await first.call(Abandon(((h("b"), slot.generation),)), timeout_s=TIMEOUT_S)
        assert await waiting == ["published", "absent", "absent"]

    play(case)


def test_a_dead_owners_block_passes_on_at_once(play: Callable[[Case], None]) -> None:
    """Its hash at once, its slot not before its writes can no longer land."""

    async def case(world: World) -> None:
        running = await world.start("s0", reservation_ttl_s=100.0, reservation_quiet_s=100.0)
        client = await world.client()
        owner, heir = await world.connect("s0"), await world.connect("s0")
        dead = await reserve(owner, "a")
        waiting = asyncio.create_task(client.wait(NodeId("s0"), [h("a")], TIMEOUT_S))
        await eventually(lambda: running.node.stats.waits == 1)
        await owner.close()
        assert await waiting == ["absent"], "its end is heard: its silence would last longer than the wait"
        slot = await reserve(heir, "a")
        assert isinstance(slot, Slot)
        assert isinstance(dead, Slot)
        assert slot.offset != dead.offset
        assert running.node.arena.slots_quarantined == 1

    play(case)


@pytest.mark.slow
def test_a_frozen_owners_block_passes_on_while_its_connection_stands(play: Callable[[Case], None]) -> None:
    """Its connection stands and it says nothing. What it publishes after all is fenced."""

    async def case(world: World) -> None:
        running = await world.start("s0", reservation_ttl_s=100.0)
        client = await world.client()
        frozen = await world.connect("s0")
        assert running.node.arena.config.reservation_quiet_s < 1.0
        slot = await reserve(frozen, "a")
        assert isinstance(slot, Slot)
        assert await client.wait(NodeId("s0"), [h("a")], 30.0) == ["absent"], "free to be reserved"
        assert await put(client, ["a"]) == ["published"]
        late = Publish((Publication(h("a"), slot.generation, Checksum(0)),))
        assert await frozen.call(late, timeout_s=TIMEOUT_S) == Published(("fenced",))
        assert running.node.arena.passed_on == 1
        assert await get(client, ["a"]) == [content("a")]

    play(case)


@pytest.mark.slow
def test_a_writer_that_is_slow_and_alive_keeps_its_block() -> None:
    """A copy over a thin link takes longer than a silence that ends a reservation."""

    async def case(world: World) -> None:
        running = await world.start("s0", reservation_quiet_s=0.9)
        slow, other = await world.client(), await world.client()
        world.link.gate.clear()
        putting = asyncio.create_task(put(slow, ["a"]))
        await eventually(lambda: running.node.arena.reservations == 1)
        assert await put(other, ["a"], timeout_s=4.0) == ["in_flight"]
        second = asyncio.create_task(put(other, ["a"]))
        await eventually(lambda: running.node.stats.waits == 2)
        world.link.gate.set()
        assert await putting == ["published"]
        assert await second == ["present"]
        assert running.node.arena.passed_on == 0

    run("local", case)


def test_two_writers_that_wait_for_each_other_both_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        one, two = await world.client(), await world.client()
        monkeypatch.setattr(writer, "WRITE_PART_BYTES", 1)
        first, second = await asyncio.gather(put(one, ["a", "b", "c", "d"]), put(two, ["d", "c", "b", "a"]))
        assert {*first, *second} <= {"published", "present"}
        assert await get(one, ["a", "b", "c", "d"]) == [content(name) for name in "abcd"]

    run("local", case)


def test_a_writer_that_was_thought_dead_finds_its_block_there() -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", reservation_quiet_s=0.05)  # shorter than a writer's own pace
        slow, other = await world.client(), await world.client()
        world.link.gate.clear()
        putting = asyncio.create_task(put(slow, ["a"]))
        await eventually(lambda: running.node.arena.reservations == 1)
        await asyncio.sleep(0.1)
        second = asyncio.create_task(put(other, ["a"]))
        await eventually(lambda: running.node.arena.passed_on == 1)
        world.link.gate.set()
        assert sorted([*await putting, *await second]) == ["present", "published"]

    run("local", case)


def test_a_wait_without_end_is_none(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        client = await world.client()
        await reserve(await world.connect("s0"), "a")
        for timeout_s in (float("nan"), -1.0):
            assert await (await world.connect("s0")).call(Await((h("a"),), timeout_s), timeout_s=TIMEOUT_S) == Awaited(
                ("in_flight",)
            )
        assert await client.wait(NodeId("s0"), [], TIMEOUT_S) == []

    play(case)


def test_a_wait_ends_with_its_time_and_with_the_reservations(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", reservation_ttl_s=0.3, waiters_max=1)
        client = await world.client()
        owner, other = await world.connect("s0"), await world.connect("s0")
        await reserve(owner, "a")
        assert await client.wait(NodeId("s0"), [h("a")], 0.05) == ["in_flight"]
        assert await client.wait(NodeId("s0"), [h("a")], 0.0) == ["in_flight"]
        waiting = asyncio.create_task(client.wait(NodeId("s0"), [h("a")], TIMEOUT_S))
        await eventually(lambda: len(running.node.waiters) == 1)
        with pytest.raises(Overloaded):
            await other.call(Await((h("a"),), 1.0), timeout_s=TIMEOUT_S)
        assert await waiting == ["absent"], "a frozen owner keeps it no longer than a reservation lasts"
        await reserve(owner, "b")
        leaver = await world.connect("s0")
        leaving = asyncio.create_task(leaver.call(Await((h("b"),), 60.0), timeout_s=60.0))
        await eventually(lambda: len(running.node.waiters) == 1)
        await leaver.close()
        await asyncio.gather(leaving, return_exceptions=True)
        await eventually(lambda: len(running.node.waiters) == 0)

    play(case)


def test_a_reservation_that_is_granted_too_late_is_given_back() -> None:
    """The caller's time was up: nothing may hold the slot until the reservation would have expired."""

    async def case(world: World) -> None:
        running = await world.start("s0")
        client = await world.client()
        arena, serve = running.node.arena, running.node.call
        late = asyncio.Event()

        async def slow(request: Request, context: CallContext) -> Reply:
            reply = await serve(request, context)
            if isinstance(request, Reserve):
                await late.wait()
            return reply

        running.node.call = slow  # type: ignore[method-assign]
        assert await put(client, ["a"], timeout_s=0.2) == ["lost"]
        assert arena.reservations == 1
        late.set()
        await eventually(lambda: arena.reservations == 0)
        assert arena.slots_quarantined == 0
        running.node.call = serve  # type: ignore[method-assign]
        await eventually(lambda: bool(client._nodes.live()))
        assert await put(client, ["a"]) == ["published"]

    run("local", case)


def test_pins_over_the_wire(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", slots=4, hard_share_max=0.5, hard_tenant_share_max=0.5)
        client = await world.client()
        connection = await world.connect("s0")
        trace = TraceId("t")
        assert await put(client, ["a", "b"]) == ["published", "published"]
        pin = Pin(trace, (h("b"),), ttl_s=0.5, kind="hard")
        pinned = await client.pin(NodeId("s0"), pin, TIMEOUT_S)
        assert pinned is not None
        assert (pinned.blocks, pinned.held) == (2, 2), "its prefix too"
        assert await client.pin(NodeId("s0"), Pin(TraceId("u"), (h("c"),), 1.0, "hard"), TIMEOUT_S) is None
        assert running.node.stats.pins_refused == 1
        assert set(await put(client, ["v", "w", "x"])) == {"published", "full"}
        assert (await client.exists([h("a"), h("b")])) == [NodeId("s0")] * 2
        listed = await connection.call(ListPins(), timeout_s=TIMEOUT_S)
        assert isinstance(listed, PinList)
        (info,) = listed.pins
        assert (info.trace, info.kind, info.blocks, info.held, info.bytes) == (trace, "hard", 2, 2, 10000)
        assert 0 < info.remaining_s <= 0.5
        await eventually(lambda: running.node.arena.pins == 0)
        await client.pin(NodeId("s0"), pin, TIMEOUT_S)
        assert running.node.arena.pins == 1
        assert await connection.call(Unpin(trace), timeout_s=TIMEOUT_S) == Ok()
        assert running.node.arena.pins == 0
        nonsense = [
            Pin(trace, (BlockHash(b"short"),), 1.0),
            Pin(trace, (), 0.0),
            Pin(trace, (), float("nan")),
            Pin(trace, (), 1.0, priority=float("nan")),
            Pin(trace, (), 1.0, priority=0.5),
            Pin(TraceId("t" * 1000), (), 1.0),
            Reserve((), tenant="t" * 1000),
            Await(tuple(h(str(number)) for number in range(5000)), 1.0),
        ]
        for request in nonsense:
            with pytest.raises(InvalidRequest):
                await connection.call(request, timeout_s=TIMEOUT_S)

    play(case)


class Follower:
    """A subscriber's picture of one node, from its messages alone; resubscribes when cut off."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.held: dict[BlockHash, None] = {}
        self.sequence: int | None = None
        self.subscriptions = 0

    async def run(self) -> None:
        while True:
            self.subscriptions += 1
            self.sequence = None
            with contextlib.suppress(Overloaded):
                await self._follow()

    async def _follow(self) -> None:
        parts: list[BlockHash] = []
        stream = self._connection.stream(Subscribe(), idle_timeout_s=10.0)
        async with contextlib.aclosing(stream):
            async for message in stream:
                if isinstance(message, Snapshot):
                    parts += message.hashes
                    if message.last:
                        assert len(set(parts)) == len(parts)
                        self.held, self.sequence = dict.fromkeys(parts), message.sequence
                    continue
                assert isinstance(message, Events)
                assert self.sequence is not None
                assert message.first == self.sequence + 1
                for change in message.changes:
                    if isinstance(change, Stored):
                        assert change.hash not in self.held
                        self.held[change.hash] = None
                    else:
                        assert isinstance(change, Removed)
                        del self.held[change.hash]
                self.sequence += len(message.changes)


def test_snapshot_and_events_tell_the_truth_whenever_one_subscribes(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        rng = random.Random(4)
        running = await world.start("s0", slots=12)
        client = await world.client()
        followers: list[Follower] = []
        tasks: list[asyncio.Task[None]] = []
        for step in range(60):
            if step % 20 == 0:
                followers.append(Follower(await world.connect("s0")))
                tasks.append(asyncio.create_task(followers[-1].run()))
            start = rng.randrange(30)
            await put(client, [str(i) for i in range(start, start + rng.randint(1, 4))])
            await get(client, [str(rng.randrange(30))])
        node = running.node
        assert node.arena.evicted > 10
        await eventually(lambda: all(follower.sequence == node.feed.sequence for follower in followers))
        for follower in followers:
            assert list(follower.held) == sorted(follower.held, key=list(node.arena.published()).index)
            assert set(follower.held) == set(node.arena.published())
            assert follower.subscriptions == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: len(node.feed) == 0)

    play(case)


@pytest.mark.parametrize("kind", ["local", "tcp"])  # not in parts: it is one publish that overflows
def test_a_subscriber_that_falls_behind_is_cut_off_and_starts_anew(kind: str) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", changes_max=4)
        client = await world.client()
        follower = Follower(await world.connect("s0"))
        task = asyncio.create_task(follower.run())
        await put(client, ["a", "b"])
        await eventually(lambda: len(follower.held) == 2)
        await put(client, [str(i) for i in range(6)])
        await eventually(lambda: follower.sequence == running.node.feed.sequence)
        assert follower.subscriptions == 2
        assert running.node.feed.overflows == 1
        assert set(follower.held) == set(running.node.arena.published())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(kind, case)


def test_a_large_snapshot_comes_in_parts_and_misses_nothing_meanwhile() -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", slots=9000, slot_bytes=4096, arena_bytes=9000 * 4096)
        connection = await world.connect("s0")
        specs = [BlockSpec(BlockHash(i.to_bytes(16)), ROOT, 1) for i in range(8195)]
        for at in range(0, len(specs), 4000):
            reply = await connection.call(Reserve(tuple(specs[at : at + 4000])), timeout_s=TIMEOUT_S)
            assert isinstance(reply, Reserved)
            await _publish_zeros(connection, specs[at : at + 4000], reply)
        stream = running.node.stream(Subscribe(), NO_CONTEXT)
        first = await anext(stream)
        assert isinstance(first, Snapshot)
        client = await world.client()
        await client.put(None, [OutgoingBlock(h("a"), ROOT, (await client.staging.acquire(1, 1.0))[0], 10)], TIMEOUT_S)
        parts = [first, await anext(stream), await anext(stream)]
        assert [part.last for part in parts if isinstance(part, Snapshot)] == [False, False, True]
        hashes = [block_hash for part in parts if isinstance(part, Snapshot) for block_hash in part.hashes]
        assert hashes == [spec.hash for spec in specs]
        assert await anext(stream) == Events(Generation(1), 8196, (Stored(h("a")),))
        await stream.aclose()
        assert len(running.node.feed) == 0

    run("local", case)


async def _publish_zeros(connection: Connection, specs: Sequence[BlockSpec], reserved: Reserved) -> None:
    slots = [outcome for outcome in reserved.outcomes if isinstance(outcome, Slot)]
    items = [Publication(s.hash, slot.generation, checksum(b"\0")) for s, slot in zip(specs, slots, strict=True)]
    reply = await connection.call(Publish(tuple(items)), timeout_s=TIMEOUT_S)
    assert reply == Published(("published",) * len(items))


def test_there_are_only_so_many_subscribers(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        await world.start("s0", subscribers_max=1)
        connection = await world.connect("s0")
        first = connection.stream(Subscribe(), idle_timeout_s=5.0)
        assert isinstance(await anext(first), Snapshot)
        with pytest.raises(Overloaded):
            await anext(connection.stream(Subscribe(), idle_timeout_s=5.0))
        await first.aclose()

    play(case)

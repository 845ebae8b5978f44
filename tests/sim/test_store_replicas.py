"""Store nodes that copy to each other, under virtual time: real nodes, in-process network and transfers."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import pytest

from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.copies.config import ReplicationConfig
from kvstore.copies.drain import Drainer
from kvstore.copies.neighbours import Others
from kvstore.index.pin_records import Moment
from kvstore.node.assemble import Backing, assemble_store
from kvstore.node.node import StoreNode
from kvstore.node.pin_journal import PinJournal
from kvstore.tiers.fake import MemoryDevice, MemoryPinFile
from kvstore.tiers.slot_tier import SlotTier
from sim import loop as virtual
from sim.links import SimMemory
from tracehaul.rpc.base import Server
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import InlineOffload
from tracehaul.transfer.local import Landing, LocalHub, LocalTransfer, PerfectLink
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import Drain, DrainState, ListPins, Pin, PinInfo, PinKind, PinList, Unpin
from tracehaul.wire.cluster import Members, NodeInfo
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.hashing import by_weight
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId

SLOT = 4096
ROOT = BlockHash(b"\xff" * 16)
GRACE_S = 4.0
TIMEOUT_S = 5.0
OFFLOAD = InlineOffload()


class SlowLink(PerfectLink):
    """A hundred megabytes per second; counts what it carries, by source and target."""

    def __init__(self) -> None:
        self.carried: dict[tuple[str, str], int] = {}
        self.flip: str | None = None
        """Whose bytes arrive wrong."""

    async def carry(self, source: str, target: str, nbytes: int) -> Landing:
        await asyncio.sleep(nbytes / 100e6)
        key = source.partition("#")[0], target.partition("#")[0]
        self.carried[key] = self.carried.get(key, 0) + nbytes
        return Landing(flipped_byte=7 if source.partition("#")[0] == self.flip else None)


class Life:
    def __init__(
        self,
        info: NodeInfo,
        node: StoreNode,
        memory: SimMemory,
        server: Server,
        peers: Peers,
        running: asyncio.Task[None],
    ):
        self.info, self.node, self.memory, self.server = info, node, memory, server
        self.peers, self.running = peers, running


class World:
    """Store nodes, one client, and whoever tells them who is there."""

    def __init__(self) -> None:
        self.link = SlowLink()
        self.hub = LocalHub(self.link)
        self.network = LocalNetwork()
        self.lives: dict[str, Life] = {}
        self.disks: dict[str, tuple[MemoryDevice, MemoryPinFile]] = {}
        """What survives a node's life."""
        self._generation = 0
        self._version = 0
        self._members: list[NodeInfo] = []
        memory = SimMemory(64 * SLOT)
        transfer = LocalTransfer("client#1", self.hub)
        peers = Peers(self.network.at("client:1"))
        self.client = StoreClient(peers, [Plane(transfer, transfer.register(memory))], Staging(memory, SLOT), OFFLOAD)

    async def start(
        self, name: str, slots: int = 256, disk_slots: int = 0, bytes_s: int = 1 << 30, **changes: float
    ) -> Life:
        self._generation += 1
        generation = Generation(self._generation)
        config = msgspec.structs.replace(StoreConfig(arena_bytes=slots * SLOT, slot_bytes=SLOT), **changes)
        memory = SimMemory(config.arena_bytes)
        transfer = LocalTransfer(f"{name}#{generation}", self.hub)
        address = f"{name}:{generation}"
        peers = Peers(self.network.at(address))
        others = Others(NodeId(name), peers, ReplicationConfig(copy_bytes_s=bytes_s, grace_s=GRACE_S))
        backing: Backing | None = None
        if disk_slots:
            device, pins = self.disks.setdefault(name, (MemoryDevice(disk_slots, SLOT), MemoryPinFile()))
            tier = SlotTier("disk", device, OFFLOAD, OFFLOAD)
            journal = PinJournal(pins, OFFLOAD, lambda: Moment("boot", clock.now_s(), clock.now_s()))
            backing = Backing(tier, journal=journal)
        planes = [Plane(transfer, transfer.register(memory))]
        node = assemble_store(config, generation, planes, memory, OFFLOAD, backing, others)
        server = await self.network.at(address).listen(address, node)
        info = NodeInfo(NodeId(name), generation, "store", address)
        self.lives[name] = Life(info, node, memory, server, peers, asyncio.create_task(node.run()))
        self.tell()
        return self.lives[name]

    async def kill(self, name: str, *, said: bool = True) -> None:
        """It is gone; ``said``: the membership says so at once."""
        life = self.lives.pop(name)
        life.running.cancel()
        self.hub.remove(f"{name}#{life.info.generation}")
        self.network.crash(life.info.address)
        if said:
            self.tell()

    def tell(self, but: Iterable[str] = ()) -> None:
        """What the router would say; it hears of drains as it does of loads."""
        self._version += 1
        nodes = tuple([self.lives[name].info for name in sorted(self.lives) if name not in but])
        draining = tuple([info.node for info in nodes if self.lives[info.node].node.load().draining])
        for life in self.lives.values():
            life.node.set_members(Members(self._version, nodes, draining))
        self.client.set_nodes(nodes, draining)

    async def start_all(self, count: int, slots: int = 256, disk_slots: int = 0, bytes_s: int = 1 << 30) -> None:
        """``s0`` and so on; returns when they know each other for long enough to copy."""
        for i in range(count):
            await self.start(f"s{i}", slots, disk_slots, bytes_s)
        await asyncio.sleep(GRACE_S)

    def occupy(self, name: str, hashes: list[BlockHash]) -> Callable[[], None]:
        """Keep blocks there from being evicted; returns what ends that."""
        arena = self.lives[name].node.arena
        lease, _ = arena.hold(hashes, "test", 1e6, clock.now_s())
        return lambda: arena.release(lease, "test")

    async def ask(self, name: str, request: object) -> object:
        life = self.lives[name]
        return await life.peers.call(life.info.address, request, timeout_s=TIMEOUT_S)  # pyright: ignore

    async def pins(self, name: str) -> dict[str, PinInfo]:
        reply = await self.ask(name, ListPins())
        assert isinstance(reply, PinList)
        return {pin.trace: pin for pin in reply.pins}

    async def drain(self, name: str, *, cancel: bool = False) -> DrainState:
        reply = await self.ask(name, Drain(cancel))
        assert isinstance(reply, DrainState)
        self.tell()
        return reply

    async def drained(self, name: str, within_s: float = 60.0) -> DrainState:
        async with asyncio.timeout(within_s):
            while (state := await self.drain(name)).state != "drained":  # noqa: ASYNC110 - as an operator does
                await asyncio.sleep(0.1)
        return state

    async def put(self, trace: str, count: int, home: str, first: int = 0) -> list[BlockHash]:
        """Blocks ``first`` to ``first + count`` of a trace, each the next one's parent."""
        hashes = [h(trace, i) for i in range(first + count)]
        parents = [ROOT, *hashes]
        for start in range(first, first + count, 32):
            places = range(start, min(start + 32, first + count))
            buffers = await self.client.staging.acquire(len(places), TIMEOUT_S)
            blocks: list[OutgoingBlock] = []
            for place, buffer in zip(places, buffers, strict=True):
                buffer.view(SLOT)[:] = content(hashes[place])
                blocks.append(OutgoingBlock(hashes[place], parents[place], buffer, SLOT))
            outcomes = await self.client.put(NodeId(home), blocks, TIMEOUT_S)
            self.client.staging.release(buffers)
            assert set(outcomes) <= {"published", "present"}, outcomes
        return hashes[first:]

    async def get(self, hashes: list[BlockHash]) -> int:
        """How many of them come; each is checked."""
        got = 0
        for start in range(0, len(hashes), 32):
            part = hashes[start : start + 32]
            buffers = await self.client.staging.acquire(len(part), TIMEOUT_S)
            sizes = await self.client.get(part, buffers, TIMEOUT_S)
            for block_hash, buffer, size in zip(part, buffers, sizes, strict=True):
                if size is not None:
                    assert bytes(buffer.view(size)) == content(block_hash)
                    got += 1
            self.client.staging.release(buffers)
        return got

    async def pin(
        self, trace: str, hashes: list[BlockHash], name: str, replicas: int = 2, kind: PinKind = "soft"
    ) -> None:
        await self.ask(name, Pin(TraceId(trace), tuple(hashes), 3000.0, kind, 2.0**30, replicas=replicas))

    def held(self, name: str, hashes: list[BlockHash]) -> int:
        node = self.lives[name].node
        return sum((node.tiering or node.arena).exists(hashes))

    def holders(self, hashes: list[BlockHash]) -> set[str]:
        """Who has all of them."""
        return {name for name in self.lives if self.held(name, hashes) == len(hashes)}

    async def end(self) -> None:
        for life in self.lives.values():
            life.node.arena.check()
            assert life.node.arena.leases == 0
            assert life.node.arena.reservations == 0
            life.running.cancel()


def h(trace: str, index: int) -> BlockHash:
    return BlockHash(f"{trace}{index:06d}".encode().ljust(16, b"."))


def content(block_hash: BlockHash) -> bytes:
    return random.Random(block_hash).randbytes(SLOT)


def order(world: World, trace: str) -> list[str]:
    return [str(node) for node in by_weight([life.info.node for life in world.lives.values()], trace)]


def play(case: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        async with asyncio.timeout(1000):
            await case(world)
        await asyncio.sleep(1.0)
        await world.end()

    virtual.run(main)


# --- replicas ---------------------------------------------------------------------------------------------------


def test_a_pin_has_its_copies_where_the_router_would_look_for_a_new_home() -> None:
    async def case(world: World) -> None:
        await world.start_all(4)
        home, second, *_ = order(world, "t")
        hashes = await world.put("t", 40, home)
        await world.pin("t", hashes, home)
        await asyncio.sleep(1.0)
        assert world.holders(hashes) == {home, second}
        for name in (home, second):
            pin = (await world.pins(name))["t"]
            assert (pin.replicas, pin.holders, pin.held) == (2, (home, second), 40)
        # What is published later follows, and an unpin reaches the copies.
        later = [h("t", i) for i in range(40, 50)]
        await world.pin("t", hashes + later, home)
        await world.put("t", 10, home, first=40)
        await asyncio.sleep(1.0)
        assert world.holders(hashes + later) == {home, second}
        await world.ask(home, Unpin(TraceId("t")))
        await asyncio.sleep(1.0)
        assert not await world.pins(second)

    play(case)


def test_one_copy_asks_for_no_other_and_idle_nodes_do_nothing() -> None:
    async def case(world: World) -> None:
        await world.start_all(3)
        hashes = await world.put("t", 10, "s0")
        await world.pin("t", hashes, "s0", replicas=1)
        await asyncio.sleep(10.0)
        assert world.holders(hashes) == {"s0"}
        assert not {key for key in world.link.carried if "client" not in key}

    play(case)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_copy_is_made_again_after_the_grace_and_only_there(lost: int) -> None:
    async def case(world: World) -> None:
        await world.start_all(4)
        names = order(world, "t")
        hashes = await world.put("t", 20, names[0])
        await world.pin("t", hashes, names[0])
        await asyncio.sleep(1.0)
        await world.kill(names[lost])
        await asyncio.sleep(GRACE_S - 0.5)
        assert len(world.holders(hashes)) == 1
        assert await world.get(hashes) == 20
        await asyncio.sleep(1.5)
        assert world.holders(hashes) == {names[1 - lost], names[2]}
        # And once more, until one node is left.
        await world.kill(names[1 - lost])
        await asyncio.sleep(GRACE_S + 1.0)
        assert world.holders(hashes) == {names[2], names[3]}
        await world.kill(names[2])
        await asyncio.sleep(GRACE_S + 1.0)
        assert world.holders(hashes) == {names[3]}
        assert world.lives[names[3]].node.load().pins_short == 1
        assert await world.get(hashes) == 20
        # Who joins then is given the copy that lacks, once it has stayed.
        await world.start("late")
        await asyncio.sleep(GRACE_S / 4)
        assert world.holders(hashes) == {names[3]}
        await asyncio.sleep(GRACE_S)
        assert world.holders(hashes) == {names[3], "late"}

    play(case)


def test_pins_that_come_back_with_all_their_nodes_have_their_copies_again() -> None:
    async def case(world: World) -> None:
        await world.start_all(3, disk_slots=300)
        names = order(world, "t")
        hashes = await world.put("t", 20, names[0])
        await world.pin("t", hashes, names[0])
        await asyncio.sleep(3.0)  # the disks have it too
        for name in names:
            await world.kill(name)
        for name in names:
            await world.start(name, disk_slots=300)
        await asyncio.sleep(2 * GRACE_S)
        assert world.holders(hashes) == {names[0], names[1]}
        assert (await world.pins(names[1]))["t"].holders == (names[0], names[1])
        await world.kill(names[0])
        await asyncio.sleep(2 * GRACE_S)
        assert world.holders(hashes) == {names[1], names[2]}

    play(case)


def test_who_joins_gets_nothing_of_what_is_satisfied() -> None:
    async def case(world: World) -> None:
        await world.start_all(2)
        for i in range(30):
            hashes = await world.put(f"t{i}", 4, "s0")
            await world.pin(f"t{i}", hashes, "s0")
        await asyncio.sleep(2.0)
        for i in range(2, 6):
            await world.start(f"s{i}")
        await asyncio.sleep(5 * GRACE_S)
        for i in range(2, 6):
            assert len(world.lives[f"s{i}"].node.arena) == 0
        assert world.link.carried["s0", "s1"] == 30 * 4 * SLOT

    play(case)


def test_a_node_that_comes_and_goes_costs_one_rebuilding() -> None:
    async def case(world: World) -> None:
        await world.start_all(4)
        names = order(world, "t")
        hashes = await world.put("t", 20, names[0])
        await world.pin("t", hashes, names[0])
        await asyncio.sleep(1.0)
        for _ in range(10):  # its connection, not its life
            world.tell(but=[names[1]])
            await asyncio.sleep(GRACE_S / 3)
            world.tell()
            await asyncio.sleep(GRACE_S / 3)
        assert world.holders(hashes) == {names[0], names[1]}
        for _ in range(10):  # its life
            await world.kill(names[1])
            await asyncio.sleep(GRACE_S / 4)
            await world.start(names[1])
            await asyncio.sleep(GRACE_S / 4)
        await asyncio.sleep(3 * GRACE_S)
        assert world.holders(hashes) == {names[0], names[2]}
        between = {key: n for key, n in world.link.carried.items() if "client" not in key}
        assert between == {(names[0], names[1]): 20 * SLOT, (names[0], names[2]): 20 * SLOT}

    play(case)


def test_copies_keep_to_their_rate() -> None:
    async def case(world: World) -> None:
        await world.start_all(2, bytes_s=100 * SLOT)
        hashes = await world.put("t", 200, "s0")
        await world.pin("t", hashes, "s0")
        await asyncio.sleep(1.0)
        assert 60 <= world.held("s1", hashes) <= 170
        assert world.lives["s0"].node.load().copies_waiting > 0
        await asyncio.sleep(2.0)
        assert world.held("s1", hashes) == 200
        assert world.lives["s0"].node.load().copies_waiting == 0

    play(case)


def test_bytes_that_went_bad_do_not_spread() -> None:
    async def case(world: World) -> None:
        await world.start_all(2)
        hashes = await world.put("t", 8, "s0")
        node = world.lives["s0"].node
        block = node.arena.hold([hashes[3]], "test", 1.0, clock.now_s())[1][0]
        assert block is not None
        world.lives["s0"].memory.buffer[block[0].offset] ^= 1  # rot
        await asyncio.sleep(2.0)
        await world.pin("t", hashes, "s0")
        await asyncio.sleep(3.0)
        assert world.holders([*hashes[:3], *hashes[4:]]) == {"s0", "s1"}
        assert world.holders([hashes[3]]) == set()
        assert node.stats.corrupt_held == 1

    play(case)


def test_a_full_node_is_passed_over_and_blocks_below_come_up() -> None:
    async def case(world: World) -> None:
        await world.start_all(3, disk_slots=300, slots=64)
        names = order(world, "t")
        release = world.occupy(names[1], await world.put("other", 60, names[1]))
        hashes = [b for i in range(10) for b in await world.put(f"t{i}", 15, names[0])][:60]
        await asyncio.sleep(2.0)
        assert sum(world.lives[names[0]].node.arena.exists(hashes)) < 20
        await world.pin("t", hashes, names[0])
        await asyncio.sleep(20.0)
        assert world.holders(hashes) == {names[0], names[2]}
        release()

    play(case)


# --- drains -----------------------------------------------------------------------------------------------------


def test_a_drain_moves_everything_and_families_stay_together() -> None:
    async def case(world: World) -> None:
        await world.start_all(4, slots=1000)
        traces = {f"t{i}": await world.put(f"t{i}", 12, "s0") for i in range(30)}
        for i in range(10):
            await world.pin(f"t{i}", traces[f"t{i}"], "s0", replicas=1)
        state = await world.drain("s0")
        assert state.state == "draining"
        state = await world.drained("s0")
        assert (state.blocks_left, state.pins_left, state.blocks_lost, state.held_up) == (0, 0, 0, "")
        assert (state.blocks_moved, state.bytes_moved) == (360, 360 * SLOT)
        assert world.lives["s0"].node.load().copies_waiting == 0
        # Nothing new goes there, and it is still read from.
        more = await world.put("new", 5, "s0")
        assert world.held("s0", more) == 0
        assert await world.get(traces["t3"]) == 12
        for trace, hashes in traces.items():
            assert len(world.holders(hashes) - {"s0"}) == 1, trace
        await world.kill("s0")
        for i, (trace, hashes) in enumerate(traces.items()):
            assert await world.get(hashes) == 12
            if i < 10:
                assert world.holders(hashes) == {order(world, trace)[0]}
                assert (await world.pins(order(world, trace)[0]))[trace].held == 12

    play(case)


def test_a_drain_moves_what_only_the_disk_has() -> None:
    async def case(world: World) -> None:
        await world.start("s0", slots=64, disk_slots=600)
        await world.start("s1", slots=600)
        hashes = [block for i in range(20) for block in await world.put(f"t{i}", 20, "s0")]
        await asyncio.sleep(2.0)
        assert world.held("s0", hashes) == 400
        assert len(world.lives["s0"].node.arena) <= 64
        state = await world.drained("s0")
        assert (state.blocks_moved, state.blocks_lost) == (400, 0)
        assert world.held("s1", hashes) == 400

    play(case)


def test_a_drain_says_what_it_cannot_move_and_goes_on_when_it_can() -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        with pytest.raises(Unavailable):
            await world.drain("s0")
        await world.start("s1", slots=32)
        hashes = await world.put("t", 60, "s0")
        release = world.occupy("s1", await world.put("u", 15, "s1"))
        await world.drain("s0")
        await asyncio.sleep(20.0)
        state = await world.drain("s0")
        assert state.state == "draining"
        assert state.blocks_left > 0
        assert state.held_up == "s1: it has no room"
        assert world.held("s0", hashes) == 60
        await world.start("s2")
        state = await world.drained("s0")
        assert state.blocks_lost == 0
        assert len([b for b in hashes if world.holders([b]) - {"s0"}]) == 60
        release()

    play(case)


def test_what_the_others_throw_out_again_is_counted_as_lost() -> None:
    async def case(world: World) -> None:
        await world.start("s0")
        await world.start("s1", slots=64)
        for i in range(100):
            await world.put(f"t{i}", 1, "s0")
        state = await world.drained("s0")
        assert state.blocks_lost == 36
        assert len(world.lives["s1"].node.arena) == 64
        await world.start("s2")
        await asyncio.sleep(1.0)
        state = await world.drained("s0")
        assert state.blocks_lost == 0
        for i in range(100):
            assert world.holders([h(f"t{i}", 0)]) - {"s0"}

    play(case)


def test_a_cancelled_drain_serves_again() -> None:
    async def case(world: World) -> None:
        await world.start_all(2, bytes_s=20 * SLOT)
        hashes = await world.put("t", 100, "s0")
        await world.drain("s0")
        await asyncio.sleep(1.0)
        state = await world.drain("s0", cancel=True)
        assert state.state == "serving"
        moved = world.held("s1", hashes)
        assert 0 < moved < 100
        await asyncio.sleep(5.0)
        assert world.held("s1", hashes) <= moved + 64
        more = await world.put("new", 5, "s0")
        assert world.held("s0", more) == 5

    play(case)


def test_a_drain_that_is_cancelled_while_it_looks_leaves_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last question is answered when there is no drain any more."""
    real = Drainer._is_all_there

    async def slow(self: Drainer) -> bool:
        await asyncio.sleep(1.0)
        return await real(self)

    monkeypatch.setattr(Drainer, "_is_all_there", slow)

    async def case(world: World) -> None:
        await world.start_all(2)
        hashes = await world.put("t", 5, "s0")
        await world.drain("s0")
        await asyncio.sleep(0.5)
        assert world.held("s1", hashes) == 5
        assert (await world.drain("s0", cancel=True)).state == "serving"
        await asyncio.sleep(2.0)
        assert world.lives["s0"].node.load().copies_waiting == 0

    play(case)


def test_a_drain_survives_the_loss_of_who_takes_its_blocks() -> None:
    async def case(world: World) -> None:
        await world.start_all(3, bytes_s=50 * SLOT)
        traces = [await world.put(f"t{i}", 10, "s0") for i in range(20)]
        await world.drain("s0")
        await asyncio.sleep(2.0)
        await world.kill("s1", said=False)
        await asyncio.sleep(1.0)
        world.tell()
        state = await world.drained("s0")
        assert state.blocks_moved == 200
        for hashes in traces:
            assert world.holders(hashes) == {"s0", "s2"}

    play(case)


def test_replicas_of_a_drained_node_are_made_again() -> None:
    async def case(world: World) -> None:
        await world.start_all(3)
        names = order(world, "t")
        hashes = await world.put("t", 20, names[0])
        await world.pin("t", hashes, names[0])
        await asyncio.sleep(1.0)
        await world.drained(names[0])
        await asyncio.sleep(GRACE_S)
        assert world.holders(hashes) == set(names)
        await world.kill(names[0])
        await asyncio.sleep(3 * GRACE_S)
        assert world.holders(hashes) == {names[1], names[2]}
        assert (await world.pins(names[1]))["t"].holders == (names[1], names[2])

    play(case)


# --- reads ------------------------------------------------------------------------------------------------------


def test_reads_fail_over_to_the_other_copy_and_a_lone_one_is_a_miss_at_once() -> None:
    async def case(world: World) -> None:
        await world.start_all(3)
        home = order(world, "t")[0]
        hashes = await world.put("t", 20, home)
        lone = await world.put("lone", 20, home)
        await world.pin("t", hashes, home)
        await asyncio.sleep(1.0)
        where = await world.client.exists(hashes + lone)
        await world.kill(home, said=False)
        buffers = await world.client.staging.acquire(40, TIMEOUT_S)
        start_s = clock.now_s()
        sizes = await world.client.get(hashes + lone, buffers, TIMEOUT_S, where)
        assert clock.now_s() - start_s < 0.1
        assert sizes == [SLOT] * 20 + [None] * 20
        for block_hash, buffer in zip(hashes, buffers, strict=False):
            assert bytes(buffer.view(SLOT)) == content(block_hash)
        world.client.staging.release(buffers)
        asked_first = sum(node == home for node in where[:20])
        assert world.client.stats.hits_failed_over == asked_first
        assert world.client.stats.misses == {"lost": 20}

    play(case)


def test_a_frozen_holder_costs_patience_not_the_deadline() -> None:
    async def case(world: World) -> None:
        await world.start_all(2)
        hashes = await world.put("t", 20, "s0")
        await world.pin("t", hashes, "s0")
        await asyncio.sleep(1.0)
        assert await world.get(hashes) == 20
        where = await world.client.exists(hashes)
        assert set(where) == {"s0"}
        world.network.freeze(world.lives["s0"].info.address)
        buffers = await world.client.staging.acquire(20, TIMEOUT_S)
        for most_s in (0.4, 0.05):  # then it is left alone for a while
            start_s = clock.now_s()
            assert await world.client.get(hashes, buffers, TIMEOUT_S, where) == [SLOT] * 20
            assert clock.now_s() - start_s < most_s
        world.client.staging.release(buffers)
        world.network.thaw(world.lives["s0"].info.address)
        await asyncio.sleep(10.0)

    play(case)


def test_a_copy_that_hangs_half_way_lands_elsewhere() -> None:
    async def case(world: World) -> None:
        await world.start_all(2)
        hashes = await world.put("t", 4, "s0")
        await world.pin("t", hashes, "s0")
        await asyncio.sleep(1.0)
        where = await world.client.exists(hashes)
        stuck = asyncio.Event()
        carry = world.link.carry

        async def hang(source: str, target: str, nbytes: int) -> Landing:
            if source.startswith("s0"):
                await stuck.wait()
            return await carry(source, target, nbytes)

        world.link.carry = hang  # type: ignore[method-assign]
        buffers = await world.client.staging.acquire(4, TIMEOUT_S)
        start_s = clock.now_s()
        assert await world.client.get(hashes, buffers, TIMEOUT_S, where) == [SLOT] * 4
        assert clock.now_s() - start_s < 0.4
        assert world.client.staging.quarantined == 4
        stuck.set()
        await asyncio.sleep(1.0)
        for block_hash, buffer in zip(hashes, buffers, strict=True):
            assert bytes(buffer.view(SLOT)) == content(block_hash)
        world.client.staging.release(buffers)
        assert world.client.staging.quarantined == 0
        assert world.client.staging.free == world.client.staging.count

    play(case)


def test_a_bad_copy_is_replaced_by_a_good_one() -> None:
    async def case(world: World) -> None:
        await world.start_all(2)
        hashes = await world.put("t", 4, "s0")
        await world.pin("t", hashes, "s0")
        await asyncio.sleep(1.0)
        world.link.flip = "s0"
        assert await world.get(hashes) == 4
        assert world.client.stats.corrupt == 0
        assert world.client.stats.hits_failed_over == 1

    play(case)

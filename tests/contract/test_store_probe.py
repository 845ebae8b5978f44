"""A worker is told that a store serves only after a block of its own has come back from it. Under virtual time."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
import pytest

from kvstore.client.client import StoreClient
from kvstore.client.probe import TENANT, StoreProbe
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.index.tenants import tenant_key
from kvstore.node.assemble import assemble_store
from kvstore.node.node import StoreNode
from sim import loop as virtual
from sim.links import SimMemory
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import InlineOffload
from tracehaul.transfer.local import Landing, LocalHub, LocalTransfer, PerfectLink
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import BlockSpec, Leased, Publication, Slot
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash, Checksum, Generation, NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.operations import Discard

SLOT = 8192
SLOTS = 4
OFFLOAD = InlineOffload()


class Link(PerfectLink):
    """Loses or changes what goes over it, while it is told to."""

    lost = False
    flip: int | None = None

    async def carry(self, source: str, target: str, nbytes: int) -> Landing:
        return Landing(lost=self.lost, flipped_byte=self.flip)


class Store:
    """One life of a store node, which may be another than the membership says, or keep nothing."""

    def __init__(self, world: "World", name: str, generation: int, slots: int) -> None:
        self.name, self.address = name, f"{name}:1"
        self.info = NodeInfo(NodeId(name), Generation(generation), "store", self.address)
        memory = self.memory = SimMemory(slots * SLOT)
        transfer = LocalTransfer(f"{name}#{generation}", world.hub)
        config = StoreConfig(arena_bytes=slots * SLOT, slot_bytes=SLOT)
        planes = [Plane(transfer, transfer.register(memory))]
        self.node: StoreNode = assemble_store(config, Generation(generation), planes, memory, OFFLOAD)
        self.asked: list[str] = []
        self.forgetful = False

    async def call(self, request: Request, context: CallContext) -> Reply:
        self.asked.append(type(request).__name__)
        if self.forgetful and isinstance(request, Discard) and "Publish" in self.asked:
            await asyncio.Event().wait()
        return await self.node.call(request, context)

    def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        return self.node.stream(request, context)

    def disconnected(self, peer: str) -> None:
        self.node.disconnected(peer)

    def fill(self) -> list[BlockHash]:
        """With blocks of somebody's."""
        hashes = [BlockHash(bytes([i]) * 16) for i in range(SLOTS)]
        root = BlockHash(b"r" * 16)
        slots = self.node.arena.reserve([BlockSpec(h, root, SLOT) for h in hashes], "w", clock.now_s())
        for block_hash, slot in zip(hashes, slots, strict=True):
            assert isinstance(slot, Slot)
            self.node.arena.publish([Publication(block_hash, slot.generation, Checksum(1))], "w", clock.now_s())
        return hashes


class World:
    def __init__(self) -> None:
        self.network, self.link = LocalNetwork(), Link()
        self.hub = LocalHub(self.link)
        self.memory = SimMemory(2 * SLOT)
        transfer = LocalTransfer("decode-0#1", self.hub)
        planes = [Plane(transfer, transfer.register(self.memory))]
        self.staging = Staging(self.memory, SLOT)
        self.client = StoreClient(Peers(self.network), planes, self.staging, OFFLOAD)
        self.probe: StoreProbe = self.client.probe("decode-0")

    async def store(self, name: str = "store-0", generation: int = 1, *, listens: bool = True) -> Store:
        store = Store(self, name, generation, SLOTS)
        if listens:
            await self.network.listen(store.address, store)
        return store

    def tell(self, *stores: Store, draining: tuple[NodeId, ...] = ()) -> None:
        nodes = [NodeInfo(NodeId("prefill-0"), Generation(1), "prefill", "prefill-0:1"), *(s.info for s in stores)]
        self.client.set_nodes(nodes, draining)
        self.probe.set_nodes(nodes, draining)


Case = Callable[[World], Awaitable[None]]


def play(case: Case) -> None:
    async def main() -> None:
        world = World()
        running = asyncio.create_task(world.probe.run())
        await case(world)
        assert world.staging.free == 2
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await world.client.aclose()

    virtual.run(main)


def test_without_a_store_it_serves_at_once() -> None:
    async def case(world: World) -> None:
        assert not world.probe.serving
        world.tell()
        assert world.probe.serving

    play(case)


def test_a_block_goes_there_and_back_and_leaves_nothing() -> None:
    async def case(world: World) -> None:
        stores = [await world.store(f"store-{i}") for i in range(3)]
        world.tell(*stores)
        assert not world.probe.serving
        await world.probe.served()
        assert clock.now_s() < 0.5
        await asyncio.sleep(1.0)
        for store in stores:
            asked = [name for name in store.asked if name not in ("Release", "Attach")]
            assert asked == ["Discard", "Reserve", "Publish", "Lease", "Discard"]
            arena = store.node.arena
            assert (len(arena), arena.bytes_used(TENANT), arena.evicted, arena.slots_free) == (0, 0, 0, SLOTS)
            arena.check()
        assert world.client.stats == type(world.client.stats)(), "it is no put or get of the worker's"

    play(case)


def test_a_store_that_is_not_there_is_named_until_it_is() -> None:
    async def case(world: World) -> None:
        there, missing = await world.store("store-0"), await world.store("store-1", listens=False)
        world.tell(there, missing)
        await asyncio.sleep(10.0)
        assert not world.probe.serving
        assert world.probe.fault.startswith("store-1: cannot connect to store-1:1")
        await world.network.listen(missing.address, missing)
        await asyncio.sleep(2.5)
        assert (world.probe.serving, world.probe.fault) == (True, "")
        assert there.asked.count("Publish") == missing.asked.count("Publish") == 1, "who has passed is left alone"

    play(case)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_store_that_leaves_or_drains_holds_nobody_up(leaves: bool) -> None:
    async def case(world: World) -> None:
        missing = await world.store(listens=False)
        world.tell(missing)
        await asyncio.sleep(3.0)
        assert not world.probe.serving
        world.tell(*([] if leaves else [missing]), draining=() if leaves else (missing.info.node,))
        assert (world.probe.serving, world.probe.fault) == (True, "")

    play(case)


def test_who_served_goes_on_and_tells_of_a_new_stores_fault() -> None:
    async def case(world: World) -> None:
        old, new = await world.store("store-0"), await world.store("store-1", listens=False)
        world.tell(old)
        await world.probe.served()
        world.tell(old, new)
        await asyncio.sleep(3.0)
        assert world.probe.serving
        assert world.probe.fault.startswith("store-1: cannot connect")

    play(case)


def test_a_frozen_store_is_not_waited_for_and_passes_when_it_thaws() -> None:
    async def case(world: World) -> None:
        store = await world.store()
        world.network.freeze(store.address)
        world.tell(store)
        await asyncio.sleep(10.0)
        assert not world.probe.serving
        assert world.probe.fault.startswith("store-0: ")
        world.network.thaw(store.address)
        await asyncio.sleep(8.0)
        assert (world.probe.serving, world.probe.fault) == (True, "")

    play(case)


def test_a_store_in_another_life_does_not_pass() -> None:
    async def case(world: World) -> None:
        store = await world.store(generation=2)
        store.info = NodeInfo(NodeId("store-0"), Generation(1), "store", store.address)
        world.tell(store)
        await asyncio.sleep(3.0)
        assert "store-0: store-0 is in life 2, not 1" in world.probe.fault

    play(case)


def test_a_data_plane_that_loses_or_changes_bytes_does_not_pass() -> None:
    async def case(world: World) -> None:
        store = await world.store()
        world.link.lost = True
        world.tell(store)
        await asyncio.sleep(3.0)
        assert (world.probe.serving, world.probe.fault) == (False, "store-0: store-0#1 is gone")
        world.link.lost, world.link.flip = False, 7
        await asyncio.sleep(3.0)
        assert (world.probe.serving, world.probe.fault) == (False, "store-0: it did not take a block: corrupt")
        world.link.flip = None
        await asyncio.sleep(3.0)
        assert (world.probe.serving, world.probe.fault) == (True, "")

    play(case)


def test_bytes_are_compared_and_not_their_checksum_alone() -> None:
    """A store whose word about a block fits other bytes."""

    async def case(world: World) -> None:
        store = await world.store()
        call = store.node.call

        async def lying(request: Request, context: CallContext) -> Reply:
            reply = await call(request, context)
            if not isinstance(reply, Leased):
                return reply
            (block,) = reply.blocks
            assert block is not None
            there = store.memory.buffer[block.offset : block.offset + block.size_bytes]
            there[5] ^= 1
            return msgspec.structs.replace(reply, blocks=(msgspec.structs.replace(block, checksum=checksum(there)),))

        store.node.call = lying  # type: ignore[method-assign]
        world.tell(store)
        await asyncio.sleep(3.0)
        assert not world.probe.serving
        assert world.probe.fault == "store-0: it gave back other bytes than it took"

    play(case)


def test_a_full_store_gives_up_at_most_one_block() -> None:
    async def case(world: World) -> None:
        store = await world.store()
        store.fill()
        world.tell(store)
        await world.probe.served()
        await asyncio.sleep(1.0)
        assert (len(store.node.arena), store.node.arena.evicted) == (SLOTS - 1, 1)

    play(case)


def test_a_store_without_any_room_passes_and_says_so() -> None:
    async def case(world: World) -> None:
        store = await world.store()
        hashes = store.fill()
        store.node.arena.lease(hashes, "reader", 100.0, clock.now_s())
        world.tell(store)
        await world.probe.served()
        assert store.node.arena.evicted == 0

    play(case)


def test_what_a_killed_life_left_is_written_anew() -> None:
    async def case(world: World) -> None:
        store = await world.store()
        store.forgetful = True
        world.tell(store)
        await world.probe.served()
        assert store.node.arena.discardable(store.node.arena.published(), tenant_key(TENANT)) != []
        store.forgetful = False
        again = world.client.probe("decode-0")
        again.set_nodes([store.info])
        running = asyncio.create_task(again.run())
        await again.served()
        assert store.asked.count("Publish") == 2, "not taken for proved by what was there"
        await asyncio.sleep(1.0)
        assert len(store.node.arena) == 0
        running.cancel()

    play(case)

"""A store node with a tier below its memory, as clients and subscribers see it."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.node.assemble import Backing, assemble_store
from kvstore.node.node import StoreNode
from kvstore.node.pin_journal import DiskPinFile, PinJournal, moment
from kvstore.tiers import tiering
from kvstore.tiers.base import StoreOutcome, Tier, TierBlock
from kvstore.tiers.disk import DiskFile
from kvstore.tiers.fake import MemoryDevice, MemoryPinFile
from kvstore.tiers.fake_objects import MemoryObjects
from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.records import Layout
from kvstore.tiers.slot_tier import SlotTier
from kvstore.tiers.stack import Stack
from kvstore.tiers.tiering import Tiering, TieringConfig
from tracehaul.rpc.base import NO_CONTEXT, Connection
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.offload import InlineOffload, ThreadOffload
from tracehaul.transfer.local import LocalHub, LocalTransfer, PerfectLink
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import (
    BlockSpec,
    Events,
    Existing,
    Exists,
    Lease,
    Leased,
    ListPins,
    Moved,
    Pin,
    PinList,
    Pinned,
    Prefetch,
    PrefetchCancel,
    PrefetchPoll,
    PrefetchState,
    Present,
    Removed,
    Reserve,
    Reserved,
    Snapshot,
    Subscribe,
    TierList,
    Tiers,
    Unpin,
)
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import InvalidRequest, Unavailable
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId
from tracehaul.wire.messages import Reply, Request

SLOT = 8192
ROOT = BlockHash(b"\xff" * 16)
ARENA_SLOTS = 4
TIER_SLOTS = 32


class Gated(MemoryObjects):
    """Objects that come when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def get(self, name: str, size_bytes: int) -> memoryview | None:
        await self.gate.wait()
        return await super().get(name, size_bytes)


class Bed:
    """What survives a node's life."""

    def __init__(self, kind: str, folder: Path, slots: int = TIER_SLOTS) -> None:
        self.kind = kind
        self.path = folder / "tier.blocks"
        self.layout = Layout(SLOT, slots)
        self.memory = MemoryDevice(slots, SLOT)
        self.pins = MemoryPinFile()
        self.objects = MemoryObjects()
        self.objects_slots = slots
        self.config = StoreConfig(arena_bytes=ARENA_SLOTS * SLOT, slot_bytes=SLOT)

    def journal(self) -> PinJournal:
        file = DiskPinFile(self.path.with_suffix(".pins")) if self.kind == "file" else self.pins
        return PinJournal(file, InlineOffload(), moment)

    async def tier(self) -> Tier:
        if self.kind == "file":
            return SlotTier("disk", DiskFile(self.path, self.layout), ThreadOffload("r", 2), ThreadOffload("w", 2))
        disk = SlotTier("disk", self.memory, InlineOffload(), InlineOffload())
        if self.kind == "memory":
            return disk
        objects = ObjectTier("s3", self.objects, InlineOffload(), self.objects_slots, SLOT)
        await objects.recover()
        return Stack(disk, objects, SLOT) if self.kind == "stack" else objects


class Life:
    """One life of one node, with a client, a raw connection and a subscriber."""

    def __init__(self, node: StoreNode, tier: Tier, client: StoreClient, raw: Connection) -> None:
        self.node, self.tier, self.client, self.raw = node, tier, client, raw
        self.index: dict[BlockHash, int] = {}

    @property
    def tiering(self) -> Tiering:
        assert self.node.tiering is not None
        return self.node.tiering

    async def call(self, request: Request) -> Reply:
        return await self.raw.call(request, timeout_s=5.0)

    async def put(self, names: Sequence[str], parents: Sequence[str] = (), tenant: str = "") -> list[str]:
        buffers = await self.client.staging.acquire(len(names), 5.0)
        blocks: list[OutgoingBlock] = []
        for name, parent, buffer in zip(names, parents or [""] * len(names), buffers, strict=True):
            data = content(name)
            buffer.view(len(data))[:] = data
            blocks.append(OutgoingBlock(h(name), h(parent), buffer, len(data)))
        try:
            return list(await self.client.put(NodeId("s0"), blocks, 5.0, tenant))
        finally:
            self.client.staging.release(buffers)

    async def get(self, names: Sequence[str]) -> list[bool]:
        buffers = await self.client.staging.acquire(len(names), 5.0)
        try:
            sizes = await self.client.get([h(name) for name in names], buffers, 5.0)
            for name, buffer, size in zip(names, buffers, sizes, strict=True):
                assert size is None or bytes(buffer.view(size)) == content(name)
            return [size is not None for size in sizes]
        finally:
            self.client.staging.release(buffers)

    async def written(self) -> None:
        """Until nothing waits to be written."""
        tier = self.tier
        while self.tiering.behind or (isinstance(tier, Stack) and tier.behind):  # noqa: ASYNC110 - polls a counter
            await asyncio.sleep(0.001)

    async def follow(self) -> None:
        """Be a subscriber: ``index`` is what it knows."""
        async for reply in self.raw.stream(Subscribe(), idle_timeout_s=10.0):
            if isinstance(reply, Snapshot):
                assert not self.index.keys() & set(reply.hashes)
                self.index.update(dict.fromkeys(reply.hashes, reply.tier))
            else:
                assert isinstance(reply, Events)
                for change in reply.changes:
                    if isinstance(change, Removed):
                        del self.index[change.hash]
                        continue
                    assert (change.hash in self.index) == isinstance(change, Moved), "told twice"
                    self.index[change.hash] = change.tier

    def visible(self) -> dict[BlockHash, int]:
        """The fastest tier that has each."""
        visible: dict[BlockHash, int] = {}
        for tier, held in enumerate([self.node.arena.published(), *(part.held() for part in self.tier.parts)]):
            for block_hash in held:
                visible.setdefault(block_hash, tier)
        return visible

    async def check(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert self.index == self.visible()
        self.node.arena.check()
        self.tier.check()


@contextlib.asynccontextmanager
async def live(bed: Bed, config: TieringConfig | None = None) -> AsyncIterator[Life]:
    async with contextlib.AsyncExitStack() as stack:
        hub, network = LocalHub(PerfectLink()), LocalNetwork()
        memory = allocate(bed.config.arena_bytes, "arena")
        stack.callback(memory.close)
        transfer = LocalTransfer("s0#1", hub)
        tier = await bed.tier()
        planes = [Plane(transfer, transfer.register(memory))]
        backing = Backing(tier, config or TieringConfig(), bed.journal())
        node = assemble_store(bed.config, Generation(1), planes, memory, InlineOffload(), backing)
        stack.push_async_callback(node.aclose)
        server = await network.listen("127.0.0.1:0", node)
        stack.push_async_callback(server.close)
        staging = allocate(16 * SLOT, "client")
        stack.callback(staging.close)
        reader = LocalTransfer("c0#1", hub)
        peers = Peers(network)
        stack.push_async_callback(peers.close)
        client = StoreClient(peers, [Plane(reader, reader.register(staging))], Staging(staging, SLOT), InlineOffload())
        stack.push_async_callback(client.aclose)
        client.set_nodes([NodeInfo(NodeId("s0"), Generation(1), "store", server.address)])
        await client.warm(30.0)
        raw = await network.connect(server.address, timeout_s=5.0)
        stack.push_async_callback(raw.close)
        life = Life(node, tier, client, raw)
        tasks = [asyncio.create_task(node.run()), asyncio.create_task(life.follow())]
        try:
            yield life
            await life.check()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


Case = Callable[[Bed], Awaitable[None]]


@pytest.fixture(params=["file", "memory", "objects", "stack"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        async def main() -> None:
            async with asyncio.timeout(30):
                await case(Bed(request.param, tmp_path))

        asyncio.run(main())

    return run


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b".")) if name else ROOT


def content(name: str) -> bytes:
    return random.Random(name).randbytes(5000 + 10 * len(name))


NAMES = [f"n{i}" for i in range(12)]


async def put_all(life: Life, names: Sequence[str] = NAMES) -> None:
    """More than memory holds, in parts."""
    for start in range(0, len(names), 2):
        assert await life.put(names[start : start + 2]) == ["published"] * 2
        await life.written()


def test_what_memory_gave_up_is_still_there(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            assert len(life.node.arena) == ARENA_SLOTS
            held = await life.call(Exists(tuple([h(name) for name in [*NAMES, "nobody"]])))
            assert held == Existing(bytes([1] * 12 + [0]))
            await life.check()
            assert len(life.index) == 12
            for start in range(0, 12, 3):
                assert await life.get(NAMES[start : start + 3]) == [True] * 3
            assert life.tiering.stats.promoted >= 9
            assert life.tiering.stats.demoted >= 8
            assert life.tiering.stats.evicted_unwritten == 0

    play(case)


def test_a_block_on_disk_needs_no_second_write(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            assert life.node.arena.exists([h("n0")]) == b"\0"
            reply = await life.call(Reserve((BlockSpec(h("n0"), ROOT, 5000), BlockSpec(h("new"), ROOT, 5000))))
            assert isinstance(reply, Reserved)
            assert isinstance(reply.outcomes[0], Present)
            assert not isinstance(reply.outcomes[1], Present)
            assert await life.put(["n1"]) == ["present"]

    play(case)


def test_another_life_serves_what_the_last_one_wrote(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
        async with live(bed) as life:
            await life.check()
            assert life.index.keys() == {h(name) for name in NAMES}
            assert await life.get(NAMES[:4]) == [True] * 4
            assert await life.get(NAMES[8:]) == [True] * 4

    play(case)


def test_a_node_that_ends_writes_what_still_waits(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            assert await life.put(NAMES[:4]) == ["published"] * 4
        async with live(bed) as life:
            assert await life.get(NAMES[:4]) == [True] * 4

    play(case)


def test_many_readers_of_one_block_read_the_disk_once(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            asked = [life.call(Lease((h("n0"), h("n1")), 5.0)) for _ in range(10)]
            for reply in await asyncio.gather(*asked):
                assert isinstance(reply, Leased)
                assert None not in reply.blocks
            copied_down = len(NAMES) if bed.kind == "stack" else 0
            assert life.tier.stats.loaded == 2 + copied_down
            assert life.tiering.stats.promoted == 2

    play(case)


def test_more_than_memory_holds_is_a_miss_for_the_rest(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            reply = await life.call(Lease(tuple([h(name) for name in NAMES]), 5.0))
            assert isinstance(reply, Leased)
            assert sum(block is not None for block in reply.blocks) == ARENA_SLOTS
            second = await life.call(Lease((h("n0"),), 5.0))
            assert isinstance(second, Leased)
            assert life.tiering.stats.promote_refused > 0

    play(case)


def test_what_a_lease_names_makes_no_room_for_the_rest_of_it(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            above = life.node.arena.published()
            below = next(h(name) for name in NAMES if h(name) not in above)
            leased = await life.call(Lease((below, above[0]), 5.0))  # the next to be evicted
            assert isinstance(leased, Leased)
            assert None not in leased.blocks

    play(case)


def test_a_prefix_comes_up_before_its_continuation(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            chain = [f"c{i}" for i in range(8)]
            for i, name in enumerate(chain):
                await life.put([name], [chain[i - 1] if i else ""])
                await life.written()
            await put_all(life, [f"x{i}" for i in range(8)])
            got = await life.get(chain)
            assert got[:ARENA_SLOTS] == [True] * ARENA_SLOTS, "the start of a sequence is worth more than its end"

    play(case)


def test_bad_bytes_on_disk_are_a_miss_and_can_be_written_again(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("memory", tmp_path)
        async with live(bed, TieringConfig(scrub_bytes_s=0)) as life:
            await put_all(life)
            before = life.node.arena.exists([h(name) for name in NAMES])
            for at in range(0, len(bed.memory.data), SLOT):
                bed.memory.data[at + 17] ^= 4
            down = [name for name, in_memory in zip(NAMES, before, strict=True) if not in_memory]
            for name in down:
                assert await life.get([name]) == [False]
            assert life.tier.stats.corrupt == len(down) == 8
            await life.check()
            assert await life.put(down[:2]) == ["published"] * 2
            assert await life.get(down[:2]) == [True] * 2

    asyncio.run(main())


def test_the_scrubber_finds_bad_blocks_and_tells_subscribers(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("memory", tmp_path)
        async with live(bed, TieringConfig(scrub_bytes_s=0)) as life:
            await put_all(life)
        bed.memory.data[5 * SLOT + 1] ^= 1
        async with live(bed, TieringConfig(scrub_bytes_s=1 << 30)) as life:
            async with asyncio.timeout(5):
                while not life.tier.stats.corrupt:  # noqa: ASYNC110 - polls a counter
                    await asyncio.sleep(0.01)
            await life.check()
            assert len(life.index) == 11

    asyncio.run(main())


def test_a_full_disk_forgets_the_oldest_and_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("memory", tmp_path, slots=6)
        async with live(bed) as life:
            await put_all(life, [f"m{i}" for i in range(20)])
            await life.check()
            assert len(life.tier) == 6
            assert len(life.index) <= 6 + ARENA_SLOTS
            assert await life.get(["m0"]) == [False]
            assert await life.get(["m19"]) == [True]

    asyncio.run(main())


def test_pins_outlive_the_node_and_keep_blocks_on_its_disk(tmp_path: Path) -> None:
    """What is pinned hard is never given up, what is pinned softly last, in memory and below, in this life and the
    next; and a trace that is unpinned is not pinned again by a restart."""

    async def main() -> None:
        bed = Bed("memory", tmp_path, slots=6)
        bed.config = msgspec.structs.replace(bed.config, hard_share_max=0.5, hard_tenant_share_max=0.5)
        async with live(bed) as life:
            assert await life.put(["hard", "soft", "ended", "plain"]) == ["published"] * 4
            await life.written()
            for name, kind in (("hard", "hard"), ("soft", "soft"), ("ended", "hard")):
                reply = await life.call(Pin(TraceId(name), (h(name),), 1000.0, kind, tenant="acme"))
                assert isinstance(reply, Pinned)
                assert reply.held == 1
                if kind == "hard":
                    assert life.node.arena.rank(h(name)) == float("inf")
                await life.call(Unpin(TraceId("ended"), "acme"))
        async with live(bed) as life:
            assert len(life.node.arena) == 0
            listed = await life.call(ListPins("acme"))
            assert isinstance(listed, PinList)
            assert [(pin.trace, pin.kind, pin.held, pin.bytes) for pin in listed.pins] == [
                ("soft", "soft", 1, len(content("soft"))),
                ("hard", "hard", 1, len(content("hard"))),
            ]
            for round_ in range(3):
                await put_all(life, [f"m{round_}{i}" for i in range(6)])
                await life.check()
            assert life.tier.find(h("plain")) is None
            assert life.tier.find(h("ended")) is None
            assert await life.get(["hard", "soft"]) == [True, True], "nothing else filled the disk with pins"
        async with live(bed) as life:
            more = Pin(TraceId("more"), tuple(h(f"m2{i}") for i in range(3, 6)), 1000.0, "soft", priority=2.0**20)
            assert isinstance(await life.call(more), Pinned)
            await put_all(life, [f"n{i}" for i in range(6)])
            assert await life.get(["hard"]) == [True]

    asyncio.run(main())


def test_a_refused_journal_is_told_and_the_pin_holds(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("memory", tmp_path)
        async with live(bed) as life:
            bed.pins.failing = True
            with pytest.raises(Unavailable, match="restart"):
                await life.call(Pin(TraceId("t"), (h("a"),), 1000.0))
            assert life.node.arena.pins == 1
            bed.pins.failing = False
            assert await life.call(Unpin(TraceId("t"))) == Ok()
        async with live(bed) as life:
            assert life.node.arena.pins == 0

    asyncio.run(main())


def test_a_tenant_keeps_its_quota_on_disk_and_when_it_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("memory", tmp_path, slots=8)
        bed.config = msgspec.structs.replace(bed.config, quota_bytes={"acme": 2 * SLOT})  # half of each tier
        mine = ["a0", "a1", "a2", "a3"]
        async with live(bed) as life:
            for name in mine:
                assert await life.put([name], tenant="acme") == ["published"]
                await life.written()
            assert life.node.arena.bytes_used("acme") == 4 * SLOT, "while others leave it"
            await put_all(life, [f"m{i}" for i in range(20)])
            assert life.node.arena.bytes_used("acme") == 2 * SLOT
            assert all(life.tier.find(h(name)) for name in mine)
        async with live(bed) as life:
            assert life.node.arena.bytes_used("acme") == 0
            await put_all(life, [f"n{i}" for i in range(20)])
            assert all(life.tier.find(h(name)) for name in mine), "another life knows whose they are"
            assert await life.get(mine[:2]) == [True, True]
            assert life.node.arena.bytes_used("acme") == 2 * SLOT, "what comes up is on its own account"
            await put_all(life, [f"o{i}" for i in range(20)])
            assert life.node.arena.exists([h("a0"), h("a1")]) == b"\1\1"

    asyncio.run(main())


def test_what_only_memory_has_is_spared_while_the_disk_is_behind(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("memory", tmp_path)
        async with live(bed) as life:
            assert await life.put(["old", "older"]) == ["published"] * 2
            await life.written()
            assert await life.get(["old", "older"]) == [True, True]
            gate, store = asyncio.Event(), life.tier.store

            async def slow(blocks: Sequence[TierBlock], views: Sequence[memoryview]) -> list[StoreOutcome]:
                await gate.wait()
                return await store(blocks, views)

            life.tier.store = slow  # type: ignore[method-assign]
            for name in ("n0", "n1", "n2", "n3", "n4"):
                await life.get(["old"])  # used more recently than any that is written
                assert await life.put([name]) == ["published"]
            # Two batches of one are under way, and the first of the rest waits: only the fifth cost a block for good.
            assert life.tiering.stats.evicted_unwritten <= 1
            gate.set()
            await life.written()
            found = await life.get(["old", "older"])
            assert found == [True, True]

    asyncio.run(main())


def test_a_disk_that_refuses_costs_nothing_but_itself(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("memory", tmp_path)
        async with live(bed) as life:
            bed.memory.failing = True
            for name in NAMES:
                assert await life.put([name]) == ["published"]
                assert await life.get([name]) == [True]
            await life.check()
            assert len(life.tier) == 0
            bed.memory.failing = False

    asyncio.run(main())


def test_a_bucket_is_not_read_unless_somebody_wants_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiering, "SCRUB_PAUSE_S", 0.05)

    async def main() -> None:
        bed = Bed("stack", tmp_path)
        async with live(bed, TieringConfig(scrub_bytes_s=1 << 30)) as life:
            await put_all(life)
            disk, bucket = life.tier.parts
            async with asyncio.timeout(5):
                while disk.stats.scrubbed < 12:  # noqa: ASYNC110 - polls a counter
                    await asyncio.sleep(0.01)
            assert (bucket.stats.scrubbed, bucket.stats.loaded) == (0, 0)

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["objects", "stack"])
def test_blocks_of_a_service_that_is_gone_are_misses_that_can_be_computed_again(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed(kind, tmp_path, slots=6 if kind == "stack" else TIER_SLOTS)
        bed.objects_slots = TIER_SLOTS
        async with live(bed, TieringConfig(scrub_bytes_s=0)) as life:
            await put_all(life)
            bed.objects.failing = True
            before = len(life.index)
            assert await life.get(["n0"]) == [False], "unreachable"
            for name in ("n1", "n2", "n3"):  # until it is given up
                await life.get([name])
            assert not life.tier.parts[-1].available
            assert len(life.index) == before, "it comes back: nobody is told that it is gone"
            evicted = life.node.arena.evicted
            assert await life.get(["n0"]) == [False]
            assert life.node.arena.evicted == evicted, "nothing makes room for what cannot come"
            assert await life.put(["n0"]) == ["published"], "who computed it again may store it"
            assert await life.get(["n0"]) == [True]
            for name in ("x0", "x1", "x2", "x3", "x4"):
                assert await life.put([name]) == ["published"]
            await life.check()
            bed.objects.failing = False
            async with asyncio.timeout(10):
                while not life.tier.parts[-1].available:  # noqa: ASYNC110 - polls a flag
                    await asyncio.sleep(0.01)
                await life.written()
            assert await life.get(["n0", "n1"]) == [True] * 2
            assert await life.get(["x3", "x4"]) == [True] * 2
            held = life.tier.parts[-1].find
            assert held(h("x4")) is not None, "what came during the outage went down after it"

    asyncio.run(main())


def test_a_slow_bucket_costs_a_bounded_wait_and_its_blocks_come_later(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("objects", tmp_path)
        objects = bed.objects = Gated()
        async with live(bed, TieringConfig(promote_timeout_s=0.05)) as life:
            await put_all(life)
            objects.gate.clear()
            assert await life.get(["n0", "n1"]) == [False] * 2
            assert life.tiering.stats.promote_late >= 1, "it was not the client that gave up"
            assert await life.get([NAMES[-1]]) == [True], "others do not wait"
            objects.gate.set()
            async with asyncio.timeout(10):
                while await life.get(["n0", "n1"]) != [True] * 2:  # noqa: ASYNC110 - each is an attempt
                    await asyncio.sleep(0.05)

    asyncio.run(main())


def test_a_full_disk_gives_way_to_the_bucket(tmp_path: Path) -> None:
    async def main() -> None:
        bed = Bed("stack", tmp_path, slots=6)
        bed.objects_slots = TIER_SLOTS
        async with live(bed, TieringConfig(scrub_bytes_s=0)) as life:
            await put_all(life, [f"m{i}" for i in range(20)])
            await life.check()
            assert [len(part) for part in life.tier.parts] == [6, 20]
            assert await life.get(["m0", "m1"]) == [True] * 2
            assert life.tier.parts[0].find(h("m0")) is not None, "in passing it went to the disk again"
        bed.memory = MemoryDevice(6, SLOT)  # another machine, with an empty disk
        async with live(bed) as life:
            assert await life.get(["m2", "m19"]) == [True] * 2

    asyncio.run(main())


def test_prefetch_brings_blocks_up(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            state = await life.call(Prefetch((h("n0"), h("nobody"), h("n1"))))
            assert isinstance(state, PrefetchState)
            job = state.job
            while state.state == "running":
                await asyncio.sleep(0.001)
                state = await life.call(PrefetchPoll(job))
                assert isinstance(state, PrefetchState)
            assert state == PrefetchState(job, "done", blocks=3, done=3, missed=1)
            assert life.node.arena.exists([h("n0"), h("n1")]) == b"\1\1"
            assert await life.call(PrefetchPoll(99)) == PrefetchState(99, "unknown")

    play(case)


def test_a_cancelled_prefetch_starts_no_more(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            state = await life.call(Prefetch(tuple([h(NAMES[i % 12]) for i in range(6400)])))
            assert isinstance(state, PrefetchState)
            cancelled = await life.call(PrefetchCancel(state.job))
            assert isinstance(cancelled, PrefetchState)
            assert cancelled.state == "cancelled"
            for _ in range(20):
                await asyncio.sleep(0.005)
            later = await life.call(PrefetchPoll(state.job))
            assert isinstance(later, PrefetchState)
            assert later.state == "cancelled"
            assert later.done < 6400

    play(case)


def test_tiers_are_described(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:
            await put_all(life)
            reply = await life.call(Tiers())
            assert isinstance(reply, TierList)
            memory, *below = reply.tiers
            assert (memory.name, memory.blocks, memory.bytes_max) == ("memory", 4, ARENA_SLOTS * SLOT)
            assert [tier.name for tier in below] == [part.name for part in life.tier.parts]
            for tier in below:
                assert (tier.blocks, tier.bytes_max) == (12, TIER_SLOTS * SLOT)
                assert tier.counters["stored"] == 12
                assert tier.counters["waiting"] == 0
            load = life.node.load()
            for held, bytes_max, part in (
                (load.disk_blocks, load.disk_bytes_max, "disk"),
                (load.s3_blocks, load.s3_bytes_max, "s3"),
            ):
                there = any(tier.name == part for tier in below)
                assert (held, bytes_max) == ((12, TIER_SLOTS * SLOT) if there else (0, 0))

    play(case)


def test_readers_and_writers_at_once_agree(play: Callable[[Case], None]) -> None:
    async def case(bed: Bed) -> None:
        async with live(bed) as life:

            async def work(seed: int) -> None:
                dice = random.Random(seed)
                for i in range(25):
                    await life.put([f"w{seed}.{i}"], [f"w{seed}.{i - 1}" if i else ""])
                    await life.get([f"w{dice.randrange(4)}.{dice.randrange(i + 1)}" for _ in range(2)])

            await asyncio.gather(*(work(seed) for seed in range(4)))
            await life.written()
            assert life.client.stats.corrupt == 0

    play(case)


def test_a_node_with_one_tier_has_nothing_to_prefetch(tmp_path: Path) -> None:
    async def main() -> None:
        memory = allocate(SLOT, "arena")
        transfer = LocalTransfer("s0#1", LocalHub(PerfectLink()))
        config = StoreConfig(arena_bytes=SLOT, slot_bytes=SLOT)
        planes = [Plane(transfer, transfer.register(memory))]
        node = assemble_store(config, Generation(1), planes, memory, InlineOffload())
        context = NO_CONTEXT
        with pytest.raises(InvalidRequest):
            await node.call(Prefetch((h("a"),)), context)
        reply = await node.call(Tiers(), context)
        assert isinstance(reply, TierList)
        assert len(reply.tiers) == 1
        await node.aclose()
        memory.close()

    asyncio.run(main())

"""A store node as its operators see it: described, told limits, searched and scrubbed while it serves."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.node.assemble import Backing, assemble_store
from kvstore.node.node import StoreNode
from kvstore.tiers.fake import MemoryDevice
from kvstore.tiers.slot_tier import SlotTier
from kvstore.tiers.tiering import TieringConfig
from tracehaul.rpc.base import Connection
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.offload import InlineOffload
from tracehaul.transfer.local import LocalHub, LocalTransfer, PerfectLink
from tracehaul.transfer.memory import FileMemory, allocate
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import Lease, Leased, TierList, Tiers
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import InvalidRequest, Overloaded
from tracehaul.wire.ids import BlockHash, Generation, NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.operations import (
    Describe,
    Description,
    Limits,
    Locate,
    Located,
    Scrub,
    ScrubbedTier,
    ScrubCancel,
    ScrubPoll,
    ScrubState,
    SetLimits,
)

SLOT = 8192
SLOTS = 8
ROOT = BlockHash(b"\xff" * 16)

T = TypeVar("T")


class GateOffload(InlineOffload):
    """Works while the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, function: Callable[[], T]) -> T:
        await self.gate.wait()
        return await super().run(function)


class Life:
    """One node with a tier or without, a raw connection, and clients."""

    def __init__(
        self,
        node: StoreNode,
        memory: FileMemory,
        device: MemoryDevice | None,
        writes: GateOffload,
        raw: Connection,
        hub: LocalHub,
        network: LocalNetwork,
    ) -> None:
        self.node, self.memory, self.device, self.writes, self.raw = node, memory, device, writes, raw
        self.hub, self.network = hub, network

    async def call(self, request: Request) -> Reply:
        return await self.raw.call(request, timeout_s=5.0)

    async def describe(self) -> Description:
        reply = await self.call(Describe())
        assert isinstance(reply, Description)
        return reply

    async def located(self, names: str) -> dict[str, str]:
        reply = await self.call(Locate(tuple(map(h, names))))
        assert isinstance(reply, Located)
        return {
            tier: "".join(n for n, there in zip(names, held, strict=True) if there) for tier, held in reply.held.items()
        }

    async def written(self) -> None:
        while self.node.tiering is not None and self.node.tiering.behind:  # noqa: ASYNC110 - polls a counter
            await asyncio.sleep(0.001)

    async def scrubbed(self) -> ScrubState:
        state = await self.call(Scrub())
        assert isinstance(state, ScrubState)
        while state.state == "running":
            await asyncio.sleep(0.001)
            state = await self.call(ScrubPoll(state.job))
            assert isinstance(state, ScrubState)
        return state


Put = Callable[[str], Awaitable[list[str]]]


@contextlib.asynccontextmanager
async def live(tiered: bool, tiering: TieringConfig | None = None) -> AsyncIterator[Life]:
    async with contextlib.AsyncExitStack() as stack:
        hub, network = LocalHub(PerfectLink()), LocalNetwork()
        memory = allocate(SLOTS * SLOT, "arena")
        stack.callback(memory.close)
        config = StoreConfig(arena_bytes=SLOTS * SLOT, slot_bytes=SLOT)
        transfer = LocalTransfer("s0#1", hub)
        planes = [Plane(transfer, transfer.register(memory))]
        device = MemoryDevice(32, SLOT) if tiered else None
        writes = GateOffload()
        backing: Backing | None = None
        if device is not None:
            tier = SlotTier("disk", device, InlineOffload(), writes)
            backing = Backing(tier, tiering or TieringConfig(scrub_bytes_s=0))
        node = assemble_store(config, Generation(1), planes, memory, InlineOffload(), backing)
        stack.push_async_callback(node.aclose)
        server = await network.listen("s0:1", node)
        stack.push_async_callback(server.close)
        raw = await network.connect(server.address, timeout_s=5.0)
        stack.push_async_callback(raw.close)
        running = asyncio.create_task(node.run())
        life = Life(node, memory, device, writes, raw, hub, network)
        try:
            yield life
            node.arena.check()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@contextlib.asynccontextmanager
async def client(life: Life, name: str = "c0", tenant: str = "") -> AsyncIterator[Put]:
    async with contextlib.AsyncExitStack() as stack:
        staging = allocate(8 * SLOT, name)
        stack.callback(staging.close)
        transfer = LocalTransfer(f"{name}#1", life.hub)
        peers = Peers(life.network)
        stack.push_async_callback(peers.close)
        planes = [Plane(transfer, transfer.register(staging))]
        store = StoreClient(peers, planes, Staging(staging, SLOT), InlineOffload())
        stack.push_async_callback(store.aclose)
        store.set_nodes([NodeInfo(NodeId("s0"), Generation(1), "store", "s0:1")])
        await store.warm(30.0)

        async def put(names: str) -> list[str]:
            buffers = await store.staging.acquire(len(names), 5.0)
            blocks: list[OutgoingBlock] = []
            for block, buffer in zip(names, buffers, strict=True):
                buffer.view(5000)[:] = random.Random(block).randbytes(5000)
                blocks.append(OutgoingBlock(h(block), ROOT, buffer, 5000))
            try:
                return list(await store.put(NodeId("s0"), blocks, 5.0, tenant))
            finally:
                store.staging.release(buffers)

        yield put


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b"."))


Case = Callable[[Life], Awaitable[None]]


def play(case: Case, tiered: bool = False, tiering: TieringConfig | None = None) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), live(tiered, tiering) as life:
            await case(life)

    asyncio.run(main())


both = pytest.mark.parametrize("tiered", [False, True])


@both
def test_a_node_describes_itself(tiered: bool):
    async def case(life: Life) -> None:
        async with client(life) as put:
            assert await put("abc") == ["published"] * 3
            told = await life.describe()
            assert (told.generation, told.transports) == (1, ("local",))
            assert (told.slots, told.slots_free, told.blocks, told.bytes_used) == (SLOTS, SLOTS - 3, 3, 15000)
            assert told.counters["published"] == 3
            assert [tier.name for tier in told.tiers] == (["memory", "disk"] if tiered else ["memory"])
            assert ("scrub_bytes_s" in told.live) == ("scrub_bytes_s" in told.limits) == tiered
            assert told.limits["leases_max"] == 1024
            assert [(u.tenant, u.used_bytes) for u in told.tenants] == [("", 3 * SLOT)]

    play(case, tiered)


@both
def test_blocks_are_located_by_tier(tiered: bool):
    async def case(life: Life) -> None:
        async with client(life) as put:
            for names in ("abcd", "efgh", "ijkl"):
                await put(names)
                await life.written()
            found = await life.located("abcdefghijklx")
            assert found["memory"] == "efghijkl"
            assert found.get("disk") == ("abcdefghijkl" if tiered else None)

    play(case, tiered)


def test_limits_hold_from_the_next_request_on_and_are_logged(caplog: pytest.LogCaptureFixture):
    async def case(life: Life) -> None:
        async with client(life) as put:
            await put("ab")
            assert isinstance(await life.call(Lease((h("a"),), 5.0)), Leased)
            told = await life.call(SetLimits({"leases_max": 1, "lease_ttl_max_s": 1.0}))
            assert isinstance(told, Limits)
            assert (told.limits["leases_max"], told.limits["lease_ttl_max_s"]) == (1, 1.0)
            with pytest.raises(Overloaded, match="1 leases"):
                await life.call(Lease((h("b"),), 5.0))
            assert (await life.describe()).limits == told.limits

    with caplog.at_level(logging.INFO):
        play(case)
    lines = [record.__dict__["tracehaul_fields"] for record in caplog.records if "limit changed" in record.message]
    assert [(line["limit"], line["old"], line["new"]) for line in lines] == [
        ("leases_max", 1024, 1),
        ("lease_ttl_max_s", 30.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"leases_max": 2, "pins_max": 0}, "pins_max must be at least 1"),
        ({"leases_max": 2, "arena_bytes": 1 << 20}, "fixed for the node's life"),
        ({"leases_max": 2, "nonsense": 1}, "no limit is called nonsense; there are reservation_ttl_s,"),
        ({"leases_max": 2, "scrub_bytes_s": 1}, "no tier below"),
        ({"leases_max": 2, "quota_bytes": {"a": "much"}}, "Expected `int`"),
    ],
)
def test_limits_are_taken_whole_or_not_at_all(changes: dict[str, object], why: str):
    async def case(life: Life) -> None:
        before = (await life.describe()).limits
        with pytest.raises(InvalidRequest, match=why):
            await life.call(SetLimits(changes))
        assert (await life.describe()).limits == before

    play(case)


def test_a_full_node_says_so_once(caplog: pytest.LogCaptureFixture):
    async def case(life: Life) -> None:
        async with client(life) as put:
            await put("abcdefgh")
            leased = await life.call(Lease(tuple(map(h, "abcdefgh")), 20.0))
            assert isinstance(leased, Leased)
            for name in "ijk":
                assert await put(name) == ["full"]

    play(case)
    (line,) = [record for record in caplog.records if "no slot could be freed" in record.message]
    assert {"slots": 8, "blocks": 8, "leases": 1}.items() <= line.__dict__["tracehaul_fields"].items()


def test_a_scrubber_that_was_off_begins_when_it_is_given_a_rate():
    async def case(life: Life) -> None:
        async with client(life) as put:
            await put("ab")
            await life.written()
            await asyncio.sleep(0.02)
            tiers = await life.call(Tiers())
            assert isinstance(tiers, TierList)
            assert tiers.tiers[1].counters["scrubbed"] == 0
            await life.call(SetLimits({"scrub_bytes_s": 1 << 30}))
            while tiers.tiers[1].counters["scrubbed"] < 2:
                await asyncio.sleep(0.001)
                tiers = await life.call(Tiers())
                assert isinstance(tiers, TierList)

    play(case, tiered=True)


@both
def test_a_scrub_finds_what_went_bad_in_each_tier_and_drops_it(tiered: bool, caplog: pytest.LogCaptureFixture):
    async def case(life: Life) -> None:
        async with client(life) as put:
            await put("abcd")
            await life.written()
            clean = await life.scrubbed()
            assert {(t.blocks, t.checked, t.bad) for t in clean.tiers} == {(4, 4, 0)}
            leased = await life.call(Lease((h("b"),), 5.0))
            assert isinstance(leased, Leased)
            assert leased.blocks[0] is not None
            life.memory.buffer[leased.blocks[0].offset + 17] ^= 1
            if life.device is not None:
                life.device.data[2 * SLOT + 5] ^= 1  # the third block written
            dirty = await life.scrubbed()
            assert (dirty.job, dirty.state) == (clean.job + 1, "done")
            assert dirty.tiers[0] == ScrubbedTier("memory", 4, 4, 1)
            found = await life.located("abcd")
            assert found["memory"] == "acd"
            if tiered:
                assert dirty.tiers[1].bad == 1
                assert len(found["disk"]) == 3
            assert (await life.describe()).counters["corrupt_held"] == 1

    play(case, tiered)
    bad = [record.__dict__["tracehaul_fields"] for record in caplog.records if "bad block" in record.message]
    assert [line["tier"] for line in bad] == (["memory", "disk"] if tiered else ["memory"])


def test_a_second_scrub_is_the_first_until_that_one_has_ended():
    async def case(life: Life) -> None:
        async with client(life) as put:
            await put("abcd")
            first, second = await asyncio.gather(life.call(Scrub()), life.call(Scrub()))
            assert isinstance(first, ScrubState)
            assert isinstance(second, ScrubState)
            assert first.job == second.job
            cancelled = await life.call(ScrubCancel(first.job))
            assert isinstance(cancelled, ScrubState)
            assert cancelled.state in ("cancelled", "done")
            assert (await life.scrubbed()).state == "done"
            assert await life.call(ScrubPoll(first.job)) == ScrubState(first.job, "unknown")

    play(case)

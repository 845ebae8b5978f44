"""A live node is measured, and holds afterwards what it held before."""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from cluster.asking import StoreRef
from cluster.store.bench import TENANT, bench
from kvstore.config import StoreConfig
from kvstore.index.tenants import tenant_key
from kvstore.node.assemble import assemble_store
from kvstore.node.node import StoreNode
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.blocks import BlockSpec, Publication, Slot
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.ids import BlockHash, Checksum, Generation, NodeId

SLOT = 64 << 10
SLOTS = 1024
ROOT = BlockHash(b"\xff" * 16)


@contextlib.asynccontextmanager
async def serving(held: int) -> AsyncGenerator[tuple[StoreNode, StoreRef]]:
    """A node with so many blocks of somebody's."""
    async with contextlib.AsyncExitStack() as stack:
        offload = ThreadOffload("node")
        stack.callback(offload.close)
        memory = allocate(SLOTS * SLOT, "node")
        stack.callback(memory.close)
        transfer = ShmTransfer("s0#1", offload)
        stack.push_async_callback(transfer.close)
        config = StoreConfig(arena_bytes=SLOTS * SLOT, slot_bytes=SLOT)
        planes = [Plane(transfer, transfer.register(memory))]
        node = assemble_store(config, Generation(1), planes, memory, offload)
        stack.push_async_callback(node.aclose)
        server = await TcpNetwork().listen("127.0.0.1:0", node)
        stack.push_async_callback(server.close)
        hashes = [BlockHash(random.Random(i).randbytes(16)) for i in range(held)]
        slots = node.arena.reserve([BlockSpec(block, ROOT, SLOT) for block in hashes], "w", 0.0)
        for block, slot in zip(hashes, slots, strict=True):
            assert isinstance(slot, Slot)
            node.arena.publish([Publication(block, slot.generation, Checksum(1))], "w", 0.0)
        yield node, StoreRef(NodeId("s0"), "ready", server.address)


def play(case: Callable[[StoreNode, StoreRef], Awaitable[None]], held: int) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(held) as (node, ref):
            before = node.arena.published()
            await case(node, ref)
            async with asyncio.timeout(5):
                while node.arena.slots_free < SLOTS - held:  # noqa: ASYNC110 - leases end when they are told to
                    await asyncio.sleep(0.01)
            assert node.arena.published() == before
            assert node.arena.evicted == 0
            node.arena.check()

    asyncio.run(main())


def of_bench(node: StoreNode) -> int:
    return len(node.arena.discardable(node.arena.published(), tenant_key(TENANT)))


def test_a_bench_leaves_nothing_behind():
    async def case(node: StoreNode, ref: StoreRef) -> None:
        result = await bench(ref, 48 << 20)
        assert (result.blocks, result.refused) == (768, 0)
        assert min(result.put_gb_s, result.get_gb_s) > 0

    play(case, held=100)


def test_a_bench_uses_free_slots_only():
    async def case(node: StoreNode, ref: StoreRef) -> None:
        result = await bench(ref, 48 << 20)
        assert result.blocks == 24
        with pytest.raises(Unavailable):
            await bench(ref, SLOT - 1)

    play(case, held=SLOTS - 24)


def test_a_bench_that_is_interrupted_leaves_nothing_behind():
    async def case(node: StoreNode, ref: StoreRef) -> None:
        task = asyncio.create_task(bench(ref, 48 << 20))
        while not of_bench(node):
            assert not task.done()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not of_bench(node)

    play(case, held=100)

"""The way to a store node is made when it joins, and whoever waits for that is spared what stalls meanwhile."""

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import pytest

from kvstore.client import nodes as client_nodes
from kvstore.client import warming
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.node.assemble import assemble_store
from kvstore.node.node import StoreNode
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.offload import InlineOffload, ThreadOffload
from tracehaul.transfer.base import Copy, Region
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.transfer.tcp import TcpTransfer
from tracehaul.wire.blocks import Attach, RegionDescriptor
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import TimedOut, TransferLost
from tracehaul.wire.ids import BlockHash, Checksum, Generation, NodeId
from tracehaul.wire.messages import Reply, Request

SLOT = 8192


class Door:
    """A node's service whose first answers to :class:`Attach` a stalled machine delays."""

    def __init__(self, node: StoreNode, stall_s: float) -> None:
        self._node = node
        self._stall_s = stall_s
        self.attached = 0

    async def call(self, request: Request, context: CallContext) -> Reply:
        if isinstance(request, Attach):
            self.attached += 1
            stall_s, self._stall_s = self._stall_s, 0.0
            threading.Event().wait(stall_s)  # the whole machine stands still: both ends are in this loop
        return await self._node.call(request, context)

    def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        return self._node.stream(request, context)

    def disconnected(self, peer: str) -> None:
        self._node.disconnected(peer)


class Counting(TcpTransfer):
    """Knows what it was asked for; fails as often as it is told."""

    def __init__(self, owner: str, failures: int = 0) -> None:
        super().__init__(owner)
        self.reads: list[int] = []
        self.failures = failures

    async def read(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> list[Checksum]:
        self.reads.append(len(copies))
        if self.failures:
            self.failures -= 1
            raise TransferLost("a fault")
        return await super().read(remote, local, copies, timeout_s=timeout_s)


class Bed:
    def __init__(self, client: StoreClient, transfer: Counting, door: Door, info: NodeInfo) -> None:
        self.client, self.transfer, self.door, self.info = client, transfer, door, info

    async def put(self) -> list[str]:
        (buffer,) = await self.client.staging.acquire(1, 5.0)
        buffer.view(5000)[:] = random.Random(1).randbytes(5000)
        block = OutgoingBlock(BlockHash(b"a" * 16), BlockHash(b"b" * 16), buffer, 5000)
        try:
            return list(await self.client.put(self.info.node, [block], 5.0))
        finally:
            self.client.staging.release([buffer])


@contextlib.asynccontextmanager
async def bed(stall_s: float = 0.0, failures: int = 0) -> AsyncIterator[Bed]:
    async with contextlib.AsyncExitStack() as stack:
        arena = allocate(4 * SLOT, "arena")
        stack.callback(arena.close)
        transfer = TcpTransfer("s0#1")
        stack.push_async_callback(transfer.close)
        config = StoreConfig(arena_bytes=4 * SLOT, slot_bytes=SLOT)
        planes = [Plane(transfer, transfer.register(arena))]
        node = assemble_store(config, Generation(1), planes, arena, InlineOffload())
        stack.push_async_callback(node.aclose)
        door = Door(node, stall_s)
        network = TcpNetwork()
        server = await network.listen("127.0.0.1:0", door)
        stack.push_async_callback(server.close)
        memory = allocate(4 * SLOT, "client")
        stack.callback(memory.close)
        ours = Counting("c0#1", failures)
        stack.push_async_callback(ours.close)
        peers = Peers(network)
        stack.push_async_callback(peers.close)
        client = StoreClient(peers, [Plane(ours, ours.register(memory))], Staging(memory, SLOT), InlineOffload())
        stack.push_async_callback(client.aclose)
        yield Bed(client, ours, door, NodeInfo(NodeId("s0"), Generation(1), "store", server.address))


def test_a_stall_at_the_first_attach_fails_no_put_of_who_waited() -> None:
    async def main() -> None:
        async with bed(stall_s=client_nodes.ATTACH_TIMEOUT_S + 0.2) as it:
            it.client.set_nodes([it.info])
            await it.client.warm(10.0)
            assert await it.put() == ["published"]
            assert it.door.attached == 1, "nothing was left for the first put to ask"

    asyncio.run(main())


def test_the_data_planes_way_is_made_before_the_first_transfer() -> None:
    async def main() -> None:
        async with bed() as it:
            it.client.set_nodes([it.info])
            await it.client.warm(10.0)
            assert it.transfer.reads == [0], "nothing is read"
            it.client.set_nodes([it.info])
            await it.client.warm(10.0)
            assert (it.door.attached, it.transfer.reads) == (1, [0]), "once in a node's life"

    asyncio.run(main())


def test_a_way_that_cannot_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "PAUSE_MIN_S", 0.01)

    async def main() -> None:
        async with bed(failures=2) as it:
            it.client.set_nodes([it.info])
            await it.client.warm(10.0)
            assert it.transfer.reads == [0, 0, 0]

    asyncio.run(main())


def test_who_waits_is_told_which_store_and_why() -> None:
    async def main() -> None:
        async with bed(failures=1000) as it:
            it.client.set_nodes([it.info])
            with pytest.raises(TimedOut, match="s0: a fault"):
                await it.client.warm(0.5)
            it.client.set_nodes([])
            await it.client.warm(0.0)
            assert await it.client.exists([BlockHash(b"a" * 16)]) == [None]

    asyncio.run(main())


def test_shared_memory_is_mapped_when_a_node_joins() -> None:
    async def main() -> None:
        offload = ThreadOffload("copy")
        memory = allocate(SLOT, "both")
        near, far = ShmTransfer("near#1", offload), ShmTransfer("far#1", offload)
        offered, ours = far.register(memory).descriptor, near.register(memory)
        await near.read(offered, ours, (), timeout_s=5.0)
        assert near.mapped == 1
        await near.close()
        await far.close()
        offload.close()
        memory.close()

    asyncio.run(main())

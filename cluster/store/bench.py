"""How fast a live store node takes and gives blocks, without disturbing what it holds.

The blocks are a tenant's of their own. There is never more than one batch of them, in slots that were free just
before, and each is discarded when it was read; also when the command is interrupted. What a killed one leaves ages
out as everything does.
"""

import asyncio
import contextlib
import mmap
import os
import statistics
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import msgspec

from cluster.security.secrets import PLAIN, Networks
from cluster.asking import ASK_TIMEOUT_S, StoreRef
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging, StagingBuffer
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.base import Memory
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.opening import open_transport
from tracehaul.transfer.place import LOOPBACK
from tracehaul.transfer.plane import Plane, cost
from tracehaul.wire.base import Ping
from tracehaul.wire.blocks import Attach, Attached
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError, ProtocolError, Unavailable
from tracehaul.wire.hashing import HASH_BYTES
from tracehaul.wire.ids import BlockHash, NodeId
from tracehaul.wire.operations import Describe, Description, Discard

BATCH_BYTES = 16 << 20
MEMCPY_BYTES = 64 << 20
COPY_THREADS = 2
"""As a cluster's workers have."""
ASKED_HASHES = 1000
TIMES = 20
"""Single blocks and single questions timed."""
PUT_TIMEOUT_S = 10.0
TENANT = "store bench"


class BenchResult(msgspec.Struct, frozen=True):
    """What was measured on one node. Rates in GB/s (10^9), latencies as medians in milliseconds."""

    transport: str
    blocks: int
    block_bytes: int
    refused: int
    """Blocks that got no slot: others were faster."""
    put_gb_s: float
    get_gb_s: float
    memcpy_gb_s: float
    """One thread of this machine, memory to memory."""
    put_block_ms: float
    get_block_ms: float
    exists_ms: float
    """Of asking for :data:`ASKED_HASHES` blocks."""
    ping_ms: float


async def bench(ref: StoreRef, bytes_max: int, networks: Networks = PLAIN) -> BenchResult:
    """Measure one node with at most ``bytes_max`` of its free memory.

    Raises:
        Unavailable: it has no free slot, or no transport from here.
        ClusterError: it did not answer, or lost what it had.
    """
    async with AsyncExitStack() as stack:
        peers = Peers(networks.control)
        stack.push_async_callback(peers.close)
        node = await _describe(peers, ref.address)
        count = min(bytes_max // node.slot_bytes, node.slots_free)
        if not count:
            free = f"{node.slots_free} of {node.slots} slots are free, {node.slot_bytes} bytes each"
            raise Unavailable(f"no room to measure in ({free}): nothing stored gives way to a measurement")
        info = NodeInfo(ref.node, node.generation, "store", ref.address)
        batch = max(1, min(count, BATCH_BYTES // node.slot_bytes))
        return await _Bench(peers, info, node, batch, networks).run(stack, count)


class _Bench:
    def __init__(self, peers: Peers, info: NodeInfo, node: Description, batch: int, networks: Networks) -> None:
        self._peers = peers
        self._networks = networks
        self._info = info
        self._block_bytes = node.slot_bytes
        self._batch = batch
        self._root = BlockHash(os.urandom(HASH_BYTES))
        self._held: list[BlockHash] = []
        """What it has put, as far as it knows, and not discarded."""

    async def run(self, stack: AsyncExitStack, count: int) -> BenchResult:
        """All of it; what it opens is closed by ``stack``, after the blocks are discarded."""
        memory = allocate(2 * self._batch * self._block_bytes, "store-bench")
        stack.callback(memory.close)
        offload = ThreadOffload("bench", COPY_THREADS)
        stack.callback(offload.close)
        plane = await self._plane(memory, offload)
        stack.push_async_callback(plane.transfer.close)
        client = StoreClient(self._peers, [plane], Staging(memory, self._block_bytes), offload)
        stack.push_async_callback(client.aclose)
        client.set_nodes([self._info])
        stack.push_async_callback(self._clean_up)
        buffers = await client.staging.acquire(2 * self._batch, PUT_TIMEOUT_S)
        out, back = buffers[: self._batch], buffers[self._batch :]
        pattern = os.urandom(self._block_bytes)
        for buffer in buffers:
            buffer.view(self._block_bytes)[:] = pattern
        memcpy_gb_s = await asyncio.to_thread(_memcpy_gb_s)
        singles = max(1, min(TIMES, count // 4))
        put_block_s, get_block_s = await self._singles(client, singles, out, back)
        put_s, get_s, blocks, refused = await self._batches(client, count - singles, out, back)
        if count == singles:
            put_s, get_s, blocks, singles = put_block_s, get_block_s, 1, 0
        if not blocks:
            raise Unavailable("it took no block: others took its free slots meanwhile")
        exists_s = await _median_s(lambda: client.exists([_hash() for _ in range(ASKED_HASHES)]), TIMES)
        ping_s = await _median_s(lambda: self._peers.call(self._info.address, Ping(), timeout_s=ASK_TIMEOUT_S), TIMES)
        nbytes = blocks * self._block_bytes
        return BenchResult(
            transport=plane.transfer.kind,
            blocks=blocks + singles,
            block_bytes=self._block_bytes,
            refused=refused,
            put_gb_s=nbytes / put_s / 1e9,
            get_gb_s=nbytes / get_s / 1e9,
            memcpy_gb_s=memcpy_gb_s,
            put_block_ms=put_block_s * 1e3,
            get_block_ms=get_block_s * 1e3,
            exists_ms=exists_s * 1e3,
            ping_ms=ping_s * 1e3,
        )

    async def _plane(self, memory: Memory, offload: ThreadOffload) -> Plane:
        """The nearest way from here to the node."""
        attached = await self._peers.call(self._info.address, Attach(), timeout_s=ASK_TIMEOUT_S)
        if not isinstance(attached, Attached):
            raise ProtocolError(f"{self._info.node} answered Attach with {type(attached).__name__}")
        owner = f"store-bench-{os.getpid()}#{clock.wall_ns()}"
        for remote in sorted(attached.regions, key=lambda region: cost(region.kind)):
            transfer = open_transport(remote.kind, owner, LOOPBACK, offload, self._networks.data).transfer
            if transfer.reaches(remote):
                return Plane(transfer, transfer.register(memory))
            await transfer.close()
        raise Unavailable(
            f"it offers no transport from here: {', '.join(region.kind for region in attached.regions) or 'none'}"
        )

    async def _singles(
        self, client: StoreClient, times: int, out: Sequence[StagingBuffer], back: Sequence[StagingBuffer]
    ) -> tuple[float, float]:
        """Medians of putting and getting one block."""
        puts: list[float] = []
        gets: list[float] = []
        for _ in range(times):
            hashes = [_hash()]
            puts.append((await self._put(client, hashes, out[:1]))[0])
            gets.append(await self._get(client, hashes, back[:1]))
            await self._discard()
        first = min(1, times - 1)  # in which both sides map each other
        return statistics.median(puts[first:]), statistics.median(gets[first:])

    async def _batches(
        self, client: StoreClient, count: int, out: Sequence[StagingBuffer], back: Sequence[StagingBuffer]
    ) -> tuple[float, float, int, int]:
        """Seconds of putting, of getting; blocks that were; blocks that got no slot."""
        put_s = get_s = 0.0
        blocks = refused = 0
        while count > 0:
            size = min(count, self._batch)
            count -= size
            if (await _describe(self._peers, self._info.address)).slots_free < size:
                refused += size
                break
            hashes = [_hash() for _ in range(size)]
            took_s, held = await self._put(client, hashes, out)
            refused += len(hashes) - len(held)
            if not held:
                break
            if len(held) == len(hashes):  # a batch cut short would not be a fair one
                put_s += took_s
                get_s += await self._get(client, held, back)
                blocks += len(held)
            await self._discard()
        return put_s, get_s, blocks, refused

    async def _put(
        self, client: StoreClient, hashes: Sequence[BlockHash], buffers: Sequence[StagingBuffer]
    ) -> tuple[float, list[BlockHash]]:
        blocks = [OutgoingBlock(h, self._root, b, self._block_bytes) for h, b in zip(hashes, buffers, strict=False)]
        self._held += hashes
        began_s = clock.perf_s()
        outcomes = await client.put(self._info.node, blocks, PUT_TIMEOUT_S, TENANT)
        took_s = clock.perf_s() - began_s
        if bad := [outcome for outcome in outcomes if outcome not in ("published", "full")]:
            raise ClusterError(f"a put ended with {bad[0]}: can this process reach its memory?")
        return took_s, [h for h, outcome in zip(hashes, outcomes, strict=True) if outcome == "published"]

    async def _discard(self) -> None:
        await self._peers.call(self._info.address, Discard(tuple(self._held), TENANT), timeout_s=PUT_TIMEOUT_S)
        self._held.clear()

    async def _clean_up(self) -> None:
        if self._held:
            with contextlib.suppress(ClusterError):  # it has said already that it does not answer
                await self._discard()

    async def _get(self, client: StoreClient, hashes: Sequence[BlockHash], buffers: Sequence[StagingBuffer]) -> float:
        began_s = clock.perf_s()
        where: list[NodeId | None] = [self._info.node] * len(hashes)
        sizes = await client.get(hashes, buffers[: len(hashes)], PUT_TIMEOUT_S, where)
        took_s = clock.perf_s() - began_s
        if any(size != self._block_bytes for size in sizes):
            raise Unavailable(f"blocks gave way before they were read ({client.stats.misses}): the node is full")
        return took_s


async def _describe(peers: Peers, address: str) -> Description:
    node = await peers.call(address, Describe(), timeout_s=ASK_TIMEOUT_S)
    if not isinstance(node, Description):
        raise ProtocolError(f"it answered Describe with {type(node).__name__}")
    return node


def _hash() -> BlockHash:
    return BlockHash(os.urandom(HASH_BYTES))


def _memcpy_gb_s() -> float:
    """Of memory that no cache holds, each page touched before: the best of three."""
    source, target = (memoryview(mmap.mmap(-1, MEMCPY_BYTES)) for _ in range(2))
    source[:] = bytes(1) * MEMCPY_BYTES
    target[:] = source
    took: list[float] = []
    for _ in range(3):
        began_s = clock.perf_s()
        target[:] = source
        took.append(clock.perf_s() - began_s)
    return MEMCPY_BYTES / min(took) / 1e9


async def _median_s(work: Callable[[], Awaitable[object]], times: int) -> float:
    took: list[float] = []
    for _ in range(times):
        began_s = clock.perf_s()
        await work()
        took.append(clock.perf_s() - began_s)
        await asyncio.sleep(0)
    return statistics.median(took)

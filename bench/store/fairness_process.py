"""The client process of the fairness bench: one large pull and many small ones, through the same two processes.

Told by JSON lines like those of the store's bench, whose node it pulls from.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import uvloop

from bench.common.lines import listen, say
from bench.store.process import COPY_THREADS, TIMEOUT_S, planes
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging, StagingBuffer
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.base import Copy
from tracehaul.wire.blocks import Attach, Attached
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import HASH_BYTES, checksum
from tracehaul.wire.ids import BlockHash

BLOCK_BYTES = 1 << 20
LARGE_BLOCKS = 384
"""Blocks that the large pull goes round and round: no cache holds them."""
SMALL_BLOCKS = 64
"""Blocks that the small pulls take turns with."""
GAP_S = 0.002
"""From one small pull's end to the next."""

Pull = Callable[[], Awaitable[None]]


class Client:
    """Pulls blocks, by the transport alone or from the store."""

    def __init__(self, kind: str) -> None:
        blocks = LARGE_BLOCKS + SMALL_BLOCKS
        self._offload = ThreadOffload("copy", COPY_THREADS)
        ways, memory = planes(kind, f"client#{clock.wall_ns()}", "127.0.0.1", blocks * BLOCK_BYTES, self._offload)
        memory.buffer[:] = os.urandom(BLOCK_BYTES) * blocks
        self._plane = ways[0]
        self._peers = Peers(TcpNetwork())
        self._client = StoreClient(self._peers, ways, Staging(memory, BLOCK_BYTES), self._offload)
        offsets = range(0, blocks * BLOCK_BYTES, BLOCK_BYTES)
        self._buffers = [StagingBuffer(memory.buffer[at : at + BLOCK_BYTES], at) for at in offsets]
        self._hashes = [BlockHash(checksum(b"%d" % i).to_bytes(8, "little") + i.to_bytes(8, "little")) for i in offsets]

    async def do(self, command: dict[str, Any]) -> Any:
        """Carry out one command."""
        match command["do"]:
            case "attach":
                return await self._attach(msgspec.convert(command["info"], NodeInfo))
            case "alone":
                small, _ = self._pulls(command["level"], 0)
                return {"ms": [await _timed(small) for _ in range(command["times"])]}
            case "beside":
                return await self._beside(*self._pulls(command["level"], command["nbytes"]), command["nbytes"])
            case other:
                raise AssertionError(other)

    async def _attach(self, info: NodeInfo) -> None:
        self._client.set_nodes([info])
        parents = [BlockHash(b"\xff" * HASH_BYTES), *self._hashes]
        blocks = [
            OutgoingBlock(own, parent, buffer, BLOCK_BYTES)
            for own, parent, buffer in zip(self._hashes, parents, self._buffers, strict=False)
        ]
        assert set(await self._client.put(info.node, blocks, TIMEOUT_S)) == {"published"}
        attached = await self._peers.call(info.address, Attach(), timeout_s=TIMEOUT_S)
        assert isinstance(attached, Attached)
        self._remote = attached.regions[0]

    def _pulls(self, level: str, nbytes: int) -> tuple[Pull, Pull]:
        """One small pull and the large one."""
        large = [i % LARGE_BLOCKS for i in range(nbytes // BLOCK_BYTES)]
        turn = 0

        def next_small() -> list[int]:
            nonlocal turn
            turn += 1
            return [LARGE_BLOCKS + turn % SMALL_BLOCKS]

        pull = self._read if level == "transfer" else self._get
        return (lambda: pull(next_small())), (lambda: pull(large))

    async def _read(self, blocks: list[int]) -> None:
        copies = [Copy(i * BLOCK_BYTES, i * BLOCK_BYTES, BLOCK_BYTES) for i in blocks]
        transfer, region = self._plane
        await transfer.read(self._remote, region, copies, timeout_s=TIMEOUT_S)

    async def _get(self, blocks: list[int]) -> None:
        sizes = await self._client.get([self._hashes[i] for i in blocks], [self._buffers[i] for i in blocks], TIMEOUT_S)
        assert set(sizes) == {BLOCK_BYTES}, self._client.stats

    async def _beside(self, small: Pull, large: Pull, nbytes: int) -> dict[str, Any]:
        start_s = clock.perf_s()
        pulling = asyncio.ensure_future(large())
        await asyncio.sleep(0.1)  # until it is in full swing
        times_ms: list[float] = []
        while True:
            took_ms = await _timed(small)
            if pulling.done():
                break
            times_ms.append(took_ms)
        await pulling
        return {"ms": times_ms, "gb_per_s": nbytes / (clock.perf_s() - start_s) / 1e9}


async def _timed(pull: Pull) -> float:
    await asyncio.sleep(GAP_S)
    start_s = clock.perf_s()
    await pull()
    return (clock.perf_s() - start_s) * 1e3


async def main(kind: str) -> None:
    """Be the client."""
    client = Client(kind)
    say("ready")
    await listen(client.do)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        uvloop.run(main(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the parent wants nothing more; threads of native libraries need not be waited for

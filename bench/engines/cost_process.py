"""The processes of the cost bench: a store node with the router that knows it, and an engine's side of the store.

The engine's runs in the engine's interpreter, with pages laid out as its KV cache is, and no model. Each is told by one
JSON command per line and answers with one JSON line; it ends when its input does.
"""

import asyncio
import contextlib
import os
import sys
import time  # noqa: TID251 - it has no loop to wait on
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.common.lines import cpu_s, listen, say
from engines.blocks import EngineConfig, EngineStore, HostPage, Page
from kvstore.config import StoreConfig
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.log import setup
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.hashing import HASH_BYTES, KVLayout, checksum
from tracehaul.wire.ids import BlockHash, NodeId

LAYERS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, ELEMENT_BYTES = 30, 3, 64, 32, 2
"""As the default model has them."""
BLOCK_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * BLOCK_TOKENS * ELEMENT_BYTES
BLOCKS = 128
"""Of a batch: 94 MB, the KV of 4,096 tokens."""
BATCHES = 4
"""Batches of pages: what is touched next was last touched three batches ago, so no cache has it."""
LATER_BLOCKS = 64
"""Of a step of 2,048 tokens."""
TIMEOUT_S = 30.0
PATTERN_BYTES = 64 << 10

Span = tuple[float, float]


async def node(arena_bytes: str) -> None:
    """Says the router's address and the node's NodeInfo once it is a member."""
    from bench.store.process import COPY_THREADS, planes
    from kvstore.node.assemble import assemble_store
    from router.fleet.members import MemberRegistry
    from tracehaul.rpc.member import new_generation
    from tracehaul.rpc.membership import Membership
    from tracehaul.rpc.peers import Peers
    from tracehaul.runtime.offload import ThreadOffload

    network, generation, offload = TcpNetwork(), new_generation(), ThreadOffload("node", COPY_THREADS)
    router = await network.listen("127.0.0.1:0", MemberRegistry(lambda _: None))
    ways, memory = planes("shm", f"store-0#{generation}", "127.0.0.1", int(arena_bytes), offload)
    config = StoreConfig(arena_bytes=int(arena_bytes), slot_bytes=BLOCK_BYTES, late_write_s=1.0)
    store = assemble_store(config, generation, ways, memory, offload)
    server = await network.listen("127.0.0.1:0", store)
    info = NodeInfo(NodeId("store-0"), generation, "store", server.address)
    membership = Membership(Peers(network), [router.address], info, NodeLoad, lambda _: None)
    async with asyncio.TaskGroup() as group:
        member = group.create_task(membership.run())
        await membership.joined.wait()
        say({"router": router.address, "info": msgspec.to_builtins(info)})
        await listen(lambda _: None)
        member.cancel()


class EngineSide:
    """What a plugin does, as often as it is told."""

    def __init__(self, kind: str, router: str) -> None:
        layout = KVLayout("bench", "bfloat16", LAYERS, KV_HEADS, HEAD_DIM, ELEMENT_BYTES, BLOCK_TOKENS)
        config = EngineConfig(routers=(router,), name="bench", revision="1", transports=("shm",), timeout_s=TIMEOUT_S)
        self._pages = _tensor_pages() if kind == "vllm" else _host_pages()
        assert self._pages[0].nbytes == BLOCK_BYTES == layout.block_bytes
        self._store = EngineStore(config, layout, BLOCK_BYTES)
        assert self._store.ready
        self._root = self._store.root

    def do(self, command: dict[str, Any]) -> Any:
        """Carry out one command."""
        if command["do"] == "cpu":
            return cpu_s()
        batch = command.get("batch", 0)
        hashes = _hashes(batch)
        parents = [self._root, *hashes[:-1]]
        match command["do"]:
            case "put":
                pages = self._batch(batch)
                start_s = clock.perf_s()
                goods = self._store.put(hashes, parents, pages)
            case "get":
                pages = self._batch(batch + 1)
                start_s = clock.perf_s()
                goods = self._store.get(hashes, pages)
            case "over":
                while not self._beside.done:
                    time.sleep(0.001)
                return None
            case "later":
                pages = self._batch(batch)[:LATER_BLOCKS]
                start_s = clock.perf_s()
                beside = self._store.put_beside(hashes[:LATER_BLOCKS], parents[:LATER_BLOCKS], pages)
                assert beside is not None
                self._beside, goods = beside, [beside.count == LATER_BLOCKS]
            case other:
                raise AssertionError(other)
        end_s = clock.perf_s()
        assert all(goods), self._store.stats
        return start_s, end_s

    def close(self) -> None:
        """Leave."""
        self._store.close()

    def _batch(self, batch: int) -> Sequence[Page]:
        at = batch % BATCHES * BLOCKS
        return self._pages[at : at + BLOCKS]


def _tensor_pages() -> list[Page]:
    """As vLLM's: a tensor a layer, a block a part of each."""
    import torch

    from engines.vllm.paging import Pages

    shape = (BATCHES * BLOCKS, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM * ELEMENT_BYTES)
    layers = [torch.randint(0, 255, shape, dtype=torch.uint8) for _ in range(LAYERS)]
    pages = Pages(layers)
    return [pages.of(block) for block in range(BATCHES * BLOCKS)]


def _host_pages() -> list[Page]:
    """As SGLang's ``page_first_direct``: keys in one piece, values in another."""
    half = BLOCK_BYTES // 2
    pattern = (os.urandom(PATTERN_BYTES) * (half // PATTERN_BYTES + 1))[:half]
    keys, values = ([memoryview(bytearray(pattern)) for _ in range(BATCHES * BLOCKS)] for _ in range(2))
    return [HostPage.of([key, value]) for key, value in zip(keys, values, strict=True)]


def _hashes(batch: int) -> list[BlockHash]:
    prefix = checksum(f"bench/{batch}".encode()).to_bytes(8, "little")
    return [BlockHash((prefix + at.to_bytes(8, "little")).ljust(HASH_BYTES, b"\0")) for at in range(BLOCKS)]


async def engine(kind: str, router: str) -> None:
    """An engine's side; says when blocks move."""
    setup("engine", "warning")
    side = EngineSide(kind, router)
    say("ready")
    await listen(side.do)
    side.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        asyncio.run({"node": node, "engine": engine}[sys.argv[1]](*sys.argv[2:]))
    sys.stdout.flush()
    os._exit(0)  # the parent wants nothing more

"""The processes of the store's bench: a node, its clients, a raw TCP peer, an index without bytes.

Each is told by one JSON command per line and answers with one JSON line; it ends when its input does.
"""

import asyncio
import contextlib
import os
import sys
import threading
from statistics import median
from typing import Any
from unittest.mock import patch

import msgspec
import uvloop

from bench.common.lines import cpu_s, listen, resident_bytes, say
from bench.store.baselines_copy import Copier
from bench.store.baselines_tcp import RawClient, serve_raw
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging, StagingBuffer
from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from kvstore.node.assemble import assemble_store
from tracehaul.rpc.member import new_generation
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer import copy_jobs
from tracehaul.transfer.copying import compiled
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.opening import open_transport
from tracehaul.transfer.place import Place
from tracehaul.transfer.plane import Plane
from tracehaul.wire.base import Ping
from tracehaul.wire.blocks import BlockSpec, Publication, Slot
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import HASH_BYTES, checksum
from tracehaul.wire.ids import BlockHash, NodeId

BATCH_BYTES = 64 << 20
BATCHES = 4
"""Batches of memory at each side: what is touched next was last touched three batches ago, so no cache has it."""
COPY_THREADS = 2
"""As a cluster's nodes have."""
PATTERN_BYTES = 64 << 10
"""After so many the bytes repeat, so all blocks of one size have one checksum."""
TIMEOUT_S = 30.0

Span = tuple[float, float]
"""Start and end on the machine's monotonic clock: comparable across processes."""


def planes(transfer_kind: str, owner: str, host: str, nbytes: int, offload: ThreadOffload) -> tuple[list[Plane], Any]:
    """One transport and its memory."""
    memory = allocate(nbytes, owner.replace("#", "-"))
    transfer = open_transport(transfer_kind, owner, Place(host), offload).transfer
    return [Plane(transfer, transfer.register(memory))], memory


async def node(transfer_kind: str, host: str, arena_bytes: int, slot_bytes: int) -> None:
    """A store node; answers any line with the CPU seconds it has used and its resident bytes."""
    offload = ThreadOffload("node", COPY_THREADS)
    config = StoreConfig(arena_bytes=arena_bytes, slot_bytes=slot_bytes, late_write_s=1.0)
    generation = new_generation()
    ways, memory = planes(transfer_kind, f"store-0#{generation}", host, arena_bytes, offload)
    store = assemble_store(config, generation, ways, memory, offload)
    server = await TcpNetwork().listen(f"{host}:0", store)
    say(msgspec.to_builtins(NodeInfo(NodeId("store-0"), generation, "store", server.address)))
    await listen(lambda _: {"cpu_s": cpu_s(), "rss": resident_bytes()})


class Client:
    """One client process: the store through :class:`StoreClient`, and the baselines over the same memory."""

    def __init__(self, transfer_kind: str, host: str, name: str) -> None:
        self._offload = ThreadOffload("copy", COPY_THREADS)
        nbytes = BATCH_BYTES * BATCHES
        ways, self._memory = planes(transfer_kind, f"{name}#{clock.wall_ns()}", host, nbytes, self._offload)
        self._memory.buffer[:] = os.urandom(PATTERN_BYTES) * (nbytes // PATTERN_BYTES)
        self._name = name
        self._planes = ways
        self._peers = Peers(TcpNetwork())
        self._copier: Copier | None = None
        self._raw: RawClient | None = None
        self._size = 0

    async def do(self, command: dict[str, Any]) -> Any:
        """Carry out one command."""
        match command["do"]:
            case "attach":
                return self._attach(msgspec.convert(command["info"], NodeInfo), command["size"])
            case "memcpy":
                self._copier = self._copier or Copier(self._memory.buffer)
                return self._copier.copy(command["batch"] % BATCHES, BATCH_BYTES, self._size)
            case "put":
                return await self._put(command["batch"])
            case "get":
                return await self._get(command["batch"], command.get("blocks"))
            case "unsummed":
                with self._unsummed():
                    return await (self._put if command["way"] == "put" else self._get)(command["batch"])
            case "raw":
                self._raw = self._raw or RawClient(command["address"], self._memory.buffer)
                return self._raw.move(command["way"], command["batch"] % BATCHES, BATCH_BYTES, self._size)
            case "exists":
                return await self._exists(command["count"], command["times"])
            case "cpu":
                return cpu_s()
            case "lookups":
                return await self._lookups(command["count"], command["seconds"])
            case other:
                raise AssertionError(other)

    def _attach(self, info: NodeInfo, size: int) -> None:
        self._info = info
        self._size = size
        self._client = StoreClient(self._peers, self._planes, Staging(self._memory, size), self._offload)
        self._client.set_nodes([info])
        count = BATCH_BYTES // size
        self._buffers: list[list[StagingBuffer]] = []
        for batch in range(BATCHES):
            offsets = range(batch * BATCH_BYTES, batch * BATCH_BYTES + count * size, size)
            self._buffers.append([StagingBuffer(self._memory.buffer[at : at + size], at) for at in offsets])

    def _hashes(self, batch: int) -> list[BlockHash]:
        prefix = checksum(f"{self._name}/{self._size}/{batch}".encode()).to_bytes(8, "little")
        return [BlockHash(prefix + i.to_bytes(8, "little")) for i in range(BATCH_BYTES // self._size)]

    async def _put(self, batch: int) -> Span:
        hashes = self._hashes(batch)
        parents = [BlockHash(b"\xff" * HASH_BYTES), *hashes]
        buffers = self._buffers[batch % BATCHES]
        blocks = [OutgoingBlock(h, p, b, self._size) for h, p, b in zip(hashes, parents, buffers, strict=False)]
        start_s = clock.perf_s()
        outcomes = await self._client.put(self._info.node, blocks, TIMEOUT_S)
        end_s = clock.perf_s()
        assert set(outcomes) == {"published"}, set(outcomes)
        return start_s, end_s

    async def _get(self, batch: int, blocks: int | None = None) -> Span:
        """A batch, or the first so many blocks of it."""
        hashes = self._hashes(batch)[:blocks]
        buffers = self._buffers[(batch + 1) % BATCHES][:blocks]
        start_s = clock.perf_s()
        sizes = await self._client.get(hashes, buffers, TIMEOUT_S)
        end_s = clock.perf_s()
        assert set(sizes) == {self._size}, self._client.stats
        return start_s, end_s

    def _unsummed(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the shared-memory transport copies as always, and knows every checksum without looking."""
        known = checksum(self._buffers[0][0].view(self._size))
        sums = [known] * (BATCH_BYTES // self._size)
        copying_only = compiled(summing=False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(copy_jobs, "compiled_here", lambda: copying_only))
            stack.enter_context(patch.object(copy_jobs.CopyJob, "sums", return_value=sums))
            return stack.pop_all()

    async def _exists(self, count: int, times: int) -> dict[str, float]:
        """Medians in ms of asking for ``count`` blocks, half of them there, and of an empty round trip."""
        hashes = self._mixed(count)
        asked: list[float] = []
        pinged: list[float] = []
        for _ in range(times):
            start_s = clock.perf_s()
            await self._client.exists(hashes)
            middle_s = clock.perf_s()
            await self._peers.call(self._info.address, Ping(), timeout_s=TIMEOUT_S)
            asked.append(middle_s - start_s)
            pinged.append(clock.perf_s() - middle_s)
        return {"exists_ms": median(asked) * 1e3, "ping_ms": median(pinged) * 1e3}

    async def _lookups(self, count: int, seconds: float) -> int:
        """How many lookups were answered: four requests of ``count`` at a time, so that the node is never idle."""
        hashes = self._mixed(count)
        end_s = clock.perf_s() + seconds
        answered = 0

        async def ask() -> None:
            nonlocal answered
            while clock.perf_s() < end_s:
                await self._client.exists(hashes)
                answered += count

        await asyncio.gather(*(ask() for _ in range(4)))
        return answered

    def _mixed(self, count: int) -> list[BlockHash]:
        held = self._hashes(0)
        return [held[i // 2 % len(held)] if i % 2 else BlockHash(i.to_bytes(HASH_BYTES, "big")) for i in range(count)]


def index(blocks: int) -> dict[str, float]:
    """Bytes by which an index of ``blocks`` blocks in one chain makes a process grow; and a bare dict's."""
    page = 4096
    before = resident_bytes()
    arena = Arena(StoreConfig(arena_bytes=blocks * page, slot_bytes=page))
    parent = BlockHash(b"\xff" * HASH_BYTES)
    for start in range(0, blocks, 1000):
        specs: list[BlockSpec] = []
        for i in range(start, min(start + 1000, blocks)):
            own = BlockHash(checksum(i.to_bytes(8, "little")).to_bytes(8, "little") + i.to_bytes(8, "little"))
            specs.append(BlockSpec(own, parent, page))
            parent = own
        slots = [slot for slot in arena.reserve(specs, "bench", 0.0) if isinstance(slot, Slot)]
        arena.publish(
            [Publication(s.hash, slot.generation, checksum(s.hash)) for s, slot in zip(specs, slots, strict=True)],
            "bench",
            0.0,
        )
        arena.take_changes()
    assert len(arena) == blocks
    grown = resident_bytes() - before
    hashes = arena.published()
    before = resident_bytes()
    bare = {bytes(bytearray(h)): slot for slot, h in enumerate(hashes)}
    return {"arena": grown, "dict": resident_bytes() - before, "blocks": len(bare)}


def lookup_rate(blocks: int = 100_000) -> float:
    """Lookups per second of a bare dict in this process."""
    keys = [i.to_bytes(HASH_BYTES, "big") for i in range(blocks)]
    held = dict.fromkeys(keys[::2], 0)
    start_s = clock.perf_s()
    bytes([key in held for key in keys])
    return blocks / (clock.perf_s() - start_s)


async def client(transfer_kind: str, host: str, name: str) -> None:
    """A client process."""
    work = Client(transfer_kind, host, name)
    say("ready")
    await listen(work.do)


def main(role: str, *arguments: str) -> None:
    """Be one of the processes."""
    match role:
        case "node":
            kind, host, arena_bytes, slot_bytes = arguments
            uvloop.run(node(kind, host, int(arena_bytes), int(slot_bytes)))
        case "client":
            uvloop.run(client(*arguments))
        case "raw":
            threading.Thread(target=serve_raw, args=(arguments[0], BATCH_BYTES * BATCHES, say), daemon=True).start()
            sys.stdin.read()
        case "index":
            say(index(int(arguments[0])) | {"dict_lookups": lookup_rate()})
        case other:
            raise AssertionError(other)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the parent wants nothing more; threads of native libraries need not be waited for

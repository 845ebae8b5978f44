"""The processes of the failover bench: the router's membership, a store node, a reader.

The reader is told by one JSON command per line and answers with one JSON line; all end when their input does.
"""

import asyncio
import contextlib
import os
import random
import sys
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec
import uvloop

from bench.common.lines import listen, say
from bench.store.process import COPY_THREADS, planes
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.copies.config import ReplicationConfig
from kvstore.copies.neighbours import Others
from kvstore.node.assemble import assemble_store
from router.fleet.members import MemberRegistry
from tracehaul.rpc.member import Member, Phase, new_generation, serving
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.log import setup
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.blocks import Pin, Pinned
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad
from tracehaul.wire.hashing import HASH_BYTES, checksum
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId

BLOCK = 256 << 10
BLOCKS = 16
"""Of one trace: what a read asks for."""
ARENA_BYTES = 512 << 20
GRACE_S = 1.0
TIMEOUT_S = 5.0
"""Of one read."""
PIN_S = 3600.0
BUFFERS = 4 * BLOCKS
ROOT = BlockHash(b"\xff" * HASH_BYTES)

Read = tuple[float, float, int, str]
"""Start on the machine's monotonic clock, seconds, blocks that did not come, and whether it was pinned or lone."""


async def router() -> None:
    """Says its address."""
    server = await TcpNetwork().listen("127.0.0.1:0", MemberRegistry(lambda _: None))
    say(server.address)
    await listen(lambda _: None)


async def node(name: str, router: str) -> None:
    """A store node; says its NodeInfo when it is a member."""
    setup(name, "error")
    generation = new_generation()
    offload = ThreadOffload("node", COPY_THREADS)
    ways, memory = planes("shm", f"{name}#{generation}", "127.0.0.1", ARENA_BYTES, offload)
    network = TcpNetwork()
    peers = Peers(network)
    others = Others(NodeId(name), peers, ReplicationConfig(grace_s=GRACE_S))
    config = StoreConfig(arena_bytes=ARENA_BYTES, slot_bytes=BLOCK)
    store = assemble_store(config, generation, ways, memory, offload, others=others)
    info = NodeInfo(NodeId(name), generation, "store", "127.0.0.1:0")
    member = Member(info, store, store.load, store.set_members, (store.run,))
    async with serving(member, network, peers, [router]) as served:

        def tell(phase: Phase) -> None:
            if phase == "ready":
                say(msgspec.to_builtins(served.info))

        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(served.run(stopping, drain_timeout_s=0.0, told=tell))
            await listen(lambda _: None)
            stopping.set()


class Reader:
    """A client that is a member, as a worker is."""

    def __init__(self, name: str, router: str) -> None:
        offload = ThreadOffload("copy", COPY_THREADS)
        ways, memory = planes("shm", f"{name}#{clock.wall_ns()}", "127.0.0.1", BUFFERS * BLOCK, offload)
        self._memory = memory
        self._name = name
        self._router = router
        self._peers = Peers(TcpNetwork())
        self._client = StoreClient(self._peers, ways, Staging(memory, BLOCK), offload)
        self._dice = random.Random(name)
        self._addresses: dict[NodeId, str] = {}

    async def follow(self) -> None:
        """Be a member for ever."""
        info = NodeInfo(NodeId(self._name), Generation(1), "decode", "127.0.0.1:1")
        await Membership(self._peers, [self._router], info, NodeLoad, self._on_members).run()

    def _on_members(self, members: Members) -> None:
        self._addresses = {info.node: info.address for info in members.nodes}
        self._client.set_nodes(members.nodes, members.draining)

    async def do(self, command: dict[str, Any]) -> Any:
        """Carry out one command."""
        match command["do"]:
            case "write":
                return await self._write(command["trace"], NodeId(command["home"]), command["replicas"])
            case "copies":
                return await self._copies(command["traces"])
            case "read":
                return await self._read_for(command["seconds"], command["traces"], command["lone"])
            case other:
                raise AssertionError(other)

    async def _write(self, trace: str, home: NodeId, replicas: int) -> None:
        hashes = hashes_of(trace)
        buffers = await self._client.staging.acquire(BLOCKS, TIMEOUT_S)
        blocks: list[OutgoingBlock] = []
        for block_hash, parent, buffer in zip(hashes, [ROOT, *hashes], buffers, strict=False):
            buffer.view(BLOCK)[:] = random.Random(block_hash).randbytes(BLOCK)
            blocks.append(OutgoingBlock(block_hash, parent, buffer, BLOCK))
        outcomes = await self._client.put(home, blocks, TIMEOUT_S)
        self._client.staging.release(buffers)
        assert set(outcomes) <= {"published", "present"}, outcomes
        if replicas > 1:
            pin = Pin(TraceId(trace), tuple(hashes), PIN_S, priority=2.0**32, replicas=replicas)
            reply = await self._peers.call(self._addresses[home], pin, timeout_s=TIMEOUT_S)
            assert isinstance(reply, Pinned), reply

    async def _copies(self, traces: list[str]) -> list[int]:
        """Blocks of these that each member says it holds."""
        hashes = [block_hash for trace in traces for block_hash in hashes_of(trace)]
        held = await self._client.holdings(hashes)
        return [flags.count(1) for flags in held.values()]

    async def _read_for(self, seconds: float, traces: list[str], lone: list[str]) -> list[Read]:
        """One read after the other, every fourth of what has one copy."""
        reads: list[Read] = []
        end_s = clock.perf_s() + seconds
        while clock.perf_s() < end_s:
            kind = "lone" if len(reads) % 4 == 3 else "pinned"
            trace = self._dice.choice(lone if kind == "lone" else traces)
            buffers = await self._client.staging.acquire(BLOCKS, TIMEOUT_S)
            start_s = clock.perf_s()
            sizes = await self._client.get(hashes_of(trace), buffers, TIMEOUT_S)
            reads.append((start_s, clock.perf_s() - start_s, sizes.count(None), kind))
            self._client.staging.release(buffers)
            await asyncio.sleep(0.001)
        return reads


class Event(StrEnum):
    """What happens to a node."""

    KILL = "kill"
    FREEZE = "freeze"


class Round(NamedTuple):
    """What the readers saw."""

    event: Event
    at_s: float
    """When it happened, on the machine's monotonic clock."""
    readers: list[list[Read]]
    rebuilt_s: float
    """From the node's return to the last copy's."""


def hashes_of(trace: str) -> list[BlockHash]:
    """A trace's blocks."""
    prefix = checksum(trace.encode()).to_bytes(8, "little")
    return [BlockHash(prefix + i.to_bytes(8, "little")) for i in range(BLOCKS)]


async def reader(name: str, router: str) -> None:
    """Says when it is there."""
    setup(name, "error")
    work = Reader(name, router)
    following = asyncio.ensure_future(work.follow())
    say("ready")
    await listen(work.do)
    following.cancel()


def main(role: str, *arguments: str) -> None:
    """Be one of the processes."""
    match role:
        case "router":
            uvloop.run(router())
        case "node":
            uvloop.run(node(*arguments))
        case "reader":
            uvloop.run(reader(*arguments))
        case other:
            raise AssertionError(other)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the parent wants nothing more

"""A store node that joins a fleet, as a process, for tests: prints its NodeInfo as JSON, serves until killed."""

import asyncio
import sys
from pathlib import Path

import msgspec
import uvloop

from kvstore.config import StoreConfig
from kvstore.copies.config import ReplicationConfig
from kvstore.copies.neighbours import Others
from kvstore.node.assemble import Backing, assemble_store
from kvstore.tiers.disk import open_disk
from tracehaul.rpc.member import Member, Phase, new_generation, serving
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.log import setup
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import NodeId


class Told(msgspec.Struct):
    name: str
    router: str
    store: StoreConfig
    replication: ReplicationConfig
    disk: str = ""
    disk_bytes: int = 0


async def main(told: Told) -> None:
    setup(told.name)
    generation = new_generation()
    memory = allocate(told.store.arena_bytes, told.name)
    offload = ThreadOffload(told.name, 2)
    transfer = ShmTransfer(f"{told.name}#{generation}", offload)
    network = TcpNetwork()
    peers = Peers(network)
    backing: Backing | None = None
    if told.disk:
        backing = Backing(await open_disk(Path(told.disk), told.disk_bytes, told.store.slot_bytes))
    others = Others(NodeId(told.name), peers, told.replication)
    planes = [Plane(transfer, transfer.register(memory))]
    node = assemble_store(told.store, generation, planes, memory, offload, backing, others)
    info = NodeInfo(NodeId(told.name), generation, "store", "127.0.0.1:0")
    member = Member(info, node, node.load, node.set_members, (node.run, transfer.broken))
    async with serving(member, network, peers, [told.router], heartbeat_s=0.2) as served:

        def tell(phase: Phase) -> None:
            sys.stdout.buffer.write(msgspec.json.encode(served.info) + b"\n")
            sys.stdout.flush()

        await served.run(asyncio.Event(), drain_timeout_s=0.0, told=tell)


if __name__ == "__main__":
    uvloop.run(main(msgspec.json.decode(sys.argv[1], type=Told)))

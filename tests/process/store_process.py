"""A store node as a process of its own, for tests: prints its NodeInfo as JSON, serves until killed."""

import asyncio
import sys

import msgspec
import uvloop

from kvstore.config import StoreConfig
from kvstore.node.assemble import assemble_store
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import Generation, NodeId


async def main(name: str, generation: int, config: StoreConfig) -> None:
    memory = allocate(config.arena_bytes, name)
    offload = ThreadOffload(name)
    transfer = ShmTransfer(f"{name}#{generation}", offload)
    planes = [Plane(transfer, transfer.register(memory))]
    node = assemble_store(config, Generation(generation), planes, memory, offload)
    server = await TcpNetwork().listen("127.0.0.1:0", node)
    info = NodeInfo(NodeId(name), Generation(generation), "store", server.address)
    sys.stdout.buffer.write(msgspec.json.encode(info) + b"\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=StoreConfig)))

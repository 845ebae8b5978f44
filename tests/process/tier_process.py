"""A store node with a disk tier as a process, for tests: prints its NodeInfo, then every record that it wrote.

``+ slot hash`` comes after a record is in the file, ``- slot`` before one is erased: whatever moment the process is
killed at, what was printed and not taken back must be found by the next one.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import uvloop

from kvstore.config import StoreConfig
from kvstore.node import StoreNode
from kvstore.pin_journal import open_journal
from kvstore.tiers.disk import DiskFile
from kvstore.tiers.records import ERASED, Layout
from kvstore.tiers.slot_tier import SlotTier
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import Generation, NodeId


class LoudFile(DiskFile):
    """Says what it did to records."""

    def write_records(self, records: Mapping[int, bytes]) -> None:
        erased = [f"- {slot}\n" for slot, record in records.items() if record == ERASED]
        written = [f"+ {slot} {record[:16].hex()}\n" for slot, record in records.items() if record != ERASED]
        if erased:
            os.write(1, "".join(erased).encode())
        super().write_records(records)
        if written:
            os.write(1, "".join(written).encode())


async def main(name: str, generation: int, config: StoreConfig, path: Path, file_bytes: int) -> None:
    memory = allocate(config.arena_bytes, name)
    offload = ThreadOffload(name)
    transfer = ShmTransfer(f"{name}#{generation}", offload)
    planes = [Plane(transfer, transfer.register(memory))]
    layout = Layout.within(file_bytes, config.slot_bytes)
    assert layout is not None
    tier = SlotTier("disk", LoudFile(path, layout), ThreadOffload("r", 4), ThreadOffload("w", 2))
    journal = await open_journal(path.with_suffix(".pins"))
    node = StoreNode(config, Generation(generation), planes, memory, offload, tier, journal=journal)
    server = await TcpNetwork().listen("127.0.0.1:0", node)
    info = NodeInfo(NodeId(name), Generation(generation), "store", server.address)
    sys.stdout.buffer.write(msgspec.json.encode(info) + b"\n")
    sys.stdout.flush()
    await node.run()


if __name__ == "__main__":
    _, name, generation, config, path, file_bytes = sys.argv
    arguments = (int(generation), msgspec.json.decode(config, type=StoreConfig), Path(path), int(file_bytes))
    uvloop.run(main(name, *arguments))

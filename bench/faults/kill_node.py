"""A store node with a disk tier that can be killed anywhere: says what it wrote, dies where it is told to.

It prints its NodeInfo, then every record that it writes: ``+ slot hash`` after a record is in the file, ``- slot``
before one is erased. Whatever moment it ends at, what was printed and not taken back must be found by its next life.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import uvloop

from kvstore.config import StoreConfig
from kvstore.node.assemble import Backing, assemble_store
from kvstore.node.pin_journal import open_journal
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

Point = Literal["erasing", "erased", "half-written", "written", "half-recorded", "recorded"]
"""Between two system calls: before and after a record is erased, in the middle of a block's bytes, after them, in the
middle of several records, and after the last before anybody is told."""
POINTS: tuple[Point, ...] = ("erasing", "erased", "half-written", "written", "half-recorded", "recorded")


class KillNode(msgspec.Struct, frozen=True):
    """What the process is told, as JSON."""

    name: str
    generation: int
    store: StoreConfig
    path: str
    file_bytes: int
    point: Point | None = None
    """Where it ends itself, as by ``kill -9``; None: nowhere."""
    passes: int = 0
    """How often it passes there before."""


class DyingFile(DiskFile):
    """Says what it did to records, and ends the process at the chosen point."""

    def __init__(self, path: Path, layout: Layout, point: Point | None, passes: int) -> None:
        super().__init__(path, layout)
        self._point = point
        self._passes = passes

    def write(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        if self._dies("half-written"):
            last = views[-1]
            half = -(-last.nbytes // 8192) * 4096
            super().write(slots, [*views[:-1], last[:half]])
            _die()
        super().write(slots, views)
        self._pass("written")

    def write_records(self, records: Mapping[int, bytes]) -> None:
        erased = [f"- {slot}\n" for slot, record in records.items() if record == ERASED]
        written = [f"+ {slot} {record[:16].hex()}\n" for slot, record in records.items() if record != ERASED]
        if erased:
            os.write(1, "".join(erased).encode())
            self._pass("erasing")
        if len(records) > 1 and self._dies("half-recorded"):
            super().write_records(dict(list(records.items())[: len(records) // 2]))
            _die()
        super().write_records(records)
        if erased:
            self._pass("erased")
        if written:
            self._pass("recorded")
        if written:
            os.write(1, "".join(written).encode())

    def _pass(self, point: Point) -> None:
        if self._dies(point):
            _die()

    def _dies(self, point: Point) -> bool:
        if point != self._point:
            return False
        self._passes -= 1
        return self._passes < 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def serve(told: KillNode) -> None:
    """Be that node until killed."""
    memory = allocate(told.store.arena_bytes, told.name)
    offload = ThreadOffload(told.name)
    transfer = ShmTransfer(f"{told.name}#{told.generation}", offload)
    planes = [Plane(transfer, transfer.register(memory))]
    layout = Layout.within(told.file_bytes, told.store.slot_bytes)
    assert layout is not None
    file = DyingFile(Path(told.path), layout, told.point, told.passes)
    tier = SlotTier("disk", file, ThreadOffload("r", 4), ThreadOffload("w", 2))
    generation = Generation(told.generation)
    journal = await open_journal(Path(told.path).with_suffix(".pins"))
    node = assemble_store(told.store, generation, planes, memory, offload, Backing(tier, journal=journal))
    server = await TcpNetwork().listen("127.0.0.1:0", node)
    info = NodeInfo(NodeId(told.name), generation, "store", server.address)
    os.write(1, msgspec.json.encode(info) + b"\n")
    await node.run()


if __name__ == "__main__":
    uvloop.run(serve(msgspec.json.decode(sys.argv[1], type=KillNode)))

"""Store nodes with a disk tier, killed at random moments and started again, hundreds of times; and how fast one that
owes a hundred thousand blocks is back. Ends with exit code 1 if anything published on disk was lost or torn.
"""

import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from bench.common.report import Result, finish
from bench.faults import kill_lane
from bench.faults.kill_lane import Lane, Tally, hash_of
from bench.faults.kill_node import KillNode
from kvstore.config import StoreConfig
from kvstore.tiers.base import TierBlock
from kvstore.tiers.disk import DiskFile
from kvstore.tiers.records import Layout, Record, pack_record
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Existing, Exists
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import checksum

FILE_SLOTS = (48, 200, 1000)
"""Of the lanes in turn: a tier that evicts all the time, one that does later, one that only grows."""
CYCLES = 500
QUICK_CYCLES = 24
RESTART_BLOCKS = 100_000
RESTART_SLOT = 4096
RESTART_ROUNDS = 3

console = Console()


async def cycle(cycles: int, lanes: int, folder: Path, tally: Tally) -> None:
    """Run ``cycles`` kills over ``lanes`` nodes at once."""
    runs = [
        Lane(f"s{i}", folder, FILE_SLOTS[i % len(FILE_SLOTS)], tally).run(cycles // lanes + (i < cycles % lanes))
        for i in range(lanes)
    ]
    async with asyncio.TaskGroup() as group:
        for run in runs:
            group.create_task(run)


async def restart_s(folder: Path, blocks: int) -> list[float]:
    """Seconds from starting a process to its answer, with that many blocks in its file, all of which it must have."""
    layout = Layout(RESTART_SLOT, blocks)
    path = folder / "many.blocks"
    device = DiskFile(path, layout)
    parent = kill_lane.ROOT
    records: dict[int, bytes] = {}
    zeros = checksum(bytes(RESTART_SLOT))  # what a new file holds: scrubbing finds nothing wrong
    for slot in range(blocks):
        own = hash_of(slot)
        records[slot] = pack_record(Record(slot, slot + 1, TierBlock(own, parent, RESTART_SLOT, zeros)))
        parent = own if slot % 100 else kill_lane.ROOT
    device.write_records(records)
    device.close()
    store = StoreConfig(arena_bytes=64 * RESTART_SLOT, slot_bytes=RESTART_SLOT)
    took: list[float] = []
    for generation in range(1, RESTART_ROUNDS + 1):
        told = KillNode("many", generation, store, str(path), layout.file_bytes)
        command = (sys.executable, "-m", "bench.faults.kill_node", msgspec.json.encode(told).decode())
        began_s = clock.perf_s()
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        try:
            info = msgspec.json.decode(await process.stdout.readline(), type=NodeInfo)
            took.append(clock.perf_s() - began_s)
            await _has_all(info, blocks)
        finally:
            process.kill()
            await process.wait()
    path.unlink()
    return took


async def _has_all(info: NodeInfo, blocks: int) -> None:
    peers = Peers(TcpNetwork())
    try:
        for start in range(0, blocks, kill_lane.EXISTS_PART):
            part = tuple([hash_of(number) for number in range(start, min(start + kill_lane.EXISTS_PART, blocks))])
            existing = await peers.call(info.address, Exists(part), timeout_s=30.0)
            assert isinstance(existing, Existing)
            assert 0 not in existing.held, "blocks in the file are not visible"
    finally:
        await peers.close()


def results_of(tally: Tally, back_s: list[float]) -> list[Result]:
    """The figures under their names."""
    starts = sorted(tally.restart_s)
    results = [
        Result("store.kill.cycles", tally.cycles, "kills"),
        Result("store.kill.owed", tally.owed, "blocks"),
        Result("store.kill.lost", tally.lost, "blocks"),
        Result("store.kill.unread", tally.unread, "blocks"),
        Result("store.kill.torn", tally.torn, "blocks"),
        Result("store.kill.found_bad", tally.found_bad, "blocks"),
        Result("store.kill.index_wrong", tally.index_wrong, "restarts"),
        Result("store.kill.pins", tally.pins, "pins"),
        Result("store.kill.pins_wrong", tally.pins_wrong, "pins"),
        Result("store.kill.put", tally.put, "blocks"),
        Result("store.kill.got", tally.got, "blocks"),
        Result("store.kill.restart_p50", starts[len(starts) // 2], "s"),
        Result("store.kill.restart_max", starts[-1], "s"),
    ]
    results += [Result(f"store.kill.ended.{where}", count, "kills") for where, count in sorted(tally.ends.items())]
    if back_s:
        results.append(Result("store.restart_100k", sorted(back_s)[len(back_s) // 2], "s"))
    return results


async def _watch(tally: Tally, cycles: int) -> None:
    with Progress(console=console) as progress:
        task = progress.add_task("kills", total=cycles)
        while True:
            wrong = f", {tally.violations} WRONG" if tally.violations else ""
            progress.update(task, completed=tally.cycles, description=f"{tally.owed} blocks owed{wrong}")
            await asyncio.sleep(1.0)


def main(
    cycles: Annotated[int, typer.Option(help="Kills in all.")] = CYCLES,
    lanes: Annotated[int, typer.Option(help="Nodes at a time.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the files are; a temporary folder if not given.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    quick: Annotated[bool, typer.Option(help="A few kills, and no large file to come back with.")] = False,
) -> None:
    """Kill store nodes and see what is left."""
    cycles = min(cycles, QUICK_CYCLES) if quick else cycles
    tally = Tally()

    async def run(place: Path) -> list[float]:
        progress = asyncio.create_task(_watch(tally, cycles))
        try:
            await cycle(cycles, lanes, place, tally)
        finally:
            progress.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await progress
        return [] if quick else await restart_s(place, RESTART_BLOCKS)

    with tempfile.TemporaryDirectory(dir=folder, prefix="tracehaul-kill-") as place:
        back_s = asyncio.run(run(Path(place)))
    for line in tally.complaints:
        console.print(line)
    config = {"cycles": cycles, "lanes": lanes, "quick": quick, "file_slots": FILE_SLOTS, "slot_bytes": kill_lane.SLOT}
    finish(config, results_of(tally, back_s), json, console)
    if tally.violations:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""The disk tier against fio: blocks of 256 KiB, the same depth, the same file system, turn by turn in one run.

The tier's figures include all that a block costs: its checksum verified after every read; on write the record that
names it, and the erased record of the block that made room. fio moves bytes and nothing else.
"""

import asyncio
import json as jsonlib
import mmap
import os
import random
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.common.report import Result, finish
from kvstore.tiers.base import TierBlock
from kvstore.tiers.disk import READ_THREADS, WRITE_THREADS, open_disk
from kvstore.tiers.records import Layout
from kvstore.tiers.slot_tier import SlotTier
from tracehaul.runtime import clock
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

BLOCK = 256 << 10
BATCH = 16
"""Blocks in one load or store: what a node moves together at this block size."""
CALLS = {"read": 4, "write": WRITE_THREADS}
"""Loads or stores at once."""
DEPTHS = {"read": READ_THREADS, "write": WRITE_THREADS * BATCH}
"""Blocks under way at once in the device, ours and fio's: a thread reads one of random blocks, or writes a batch."""
PATTERNS = {"read": "randread", "write": "write"}
"""What fio does beside us: a reader's blocks lie anywhere; a tier chooses where it writes, and takes neighbours."""
ROOT = BlockHash(b"\xff" * 16)
FIO_TIMEOUT_S = 300

console = Console()


class Bench:
    """A full tier in ``folder``, and a file of the same size for fio."""

    def __init__(self, folder: Path, tier: SlotTier, slots: int, moved: int) -> None:
        self._tier = tier
        self._fio_file = folder / "fio.data"
        self._slots = slots
        self._moved = moved
        memory = memoryview(mmap.mmap(-1, CALLS["write"] * BATCH * BLOCK))
        memory[:] = random.Random(0).randbytes(len(memory))
        self._views = [memory[at : at + BLOCK] for at in range(0, len(memory), BLOCK)]
        self._sums = [checksum(view) for view in self._views]
        self._number = 0
        self._dice = random.Random(1)

    async def fill(self) -> None:
        """Write every slot once, so that neither side writes to room that was never written before."""
        for _ in range(0, self._slots, BATCH):
            await self._store(0, BATCH)
        self.fio("write", self._slots)

    async def read(self) -> float:
        """Bytes per second over random blocks."""
        held = list(self._tier.held())
        wanted = self._dice.sample(held, self._moved)
        views = [memoryview(mmap.mmap(-1, BATCH * BLOCK)) for _ in range(CALLS["read"])]
        for view in views:
            view[:: mmap.PAGESIZE] = bytes(len(view) // mmap.PAGESIZE)  # present before the clock starts

        async def load(lane: int, part: list[BlockHash]) -> None:
            slots = [views[lane][i * BLOCK : (i + 1) * BLOCK] for i in range(len(part))]
            outcomes = await self._tier.load(part, slots)
            assert set(outcomes) == {"loaded"}, outcomes

        parts = [wanted[at : at + BATCH] for at in range(0, len(wanted), BATCH)]
        return await self._timed(lambda lane, turn: load(lane, parts[turn]), len(parts), CALLS["read"])

    async def write(self) -> float:
        """Bytes per second of new blocks, each taking the place of another."""
        return await self._timed(lambda lane, _: self._store(lane, BATCH), self._moved // BATCH, CALLS["write"])

    def fio(self, name: str, blocks: int) -> float:
        """Bytes per second that fio reports."""
        command = ["fio", "--name=x", f"--filename={self._fio_file}", f"--rw={PATTERNS[name]}", f"--bs={BLOCK}"]
        command += [f"--iodepth={DEPTHS[name]}", f"--ioengine={self._engine()}", "--direct=1", "--overwrite=1"]
        command += [f"--size={self._slots * BLOCK}", f"--io_size={blocks * BLOCK}", "--output-format=json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=FIO_TIMEOUT_S)
        job = jsonlib.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        return float(job[name]["bw_bytes"])

    def _engine(self) -> str:
        return "io_uring" if os.path.exists("/proc/sys/kernel/io_uring_disabled") else "libaio"

    async def _timed(self, work: Callable[[int, int], Awaitable[None]], turns: int, lanes: int) -> float:
        async def lane(number: int) -> None:
            for turn in range(number, turns, lanes):
                await work(number, turn)

        start_s = clock.perf_s()
        await asyncio.gather(*(lane(number) for number in range(lanes)))
        return turns * BATCH * BLOCK / (clock.perf_s() - start_s)

    async def _store(self, lane: int, count: int) -> None:
        blocks: list[TierBlock] = []
        at = lane * BATCH
        for i in range(count):
            self._number += 1
            blocks.append(TierBlock(BlockHash(self._number.to_bytes(16)), ROOT, BLOCK, self._sums[at + i]))
        outcomes = await self._tier.store(blocks, self._views[at : at + count])
        assert set(outcomes) == {"stored"}, outcomes


async def measure(folder: Path, slots: int, moved: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Per figure, of each round: ours and fio's bytes per second."""
    tier = await open_disk(folder / "tier.blocks", Layout(BLOCK, slots).file_bytes, BLOCK)
    try:
        bench = Bench(folder, tier, slots, moved)
        await bench.fill()
        found: dict[str, list[tuple[float, float]]] = {"read": [], "write": []}
        for turn in range(rounds):
            # A disk behind a hypervisor may be quick for whoever comes first after a pause: take turns in that too.
            for name, ours in (("read", bench.read), ("write", bench.write)):
                if turn % 2:
                    mine = await ours()
                    theirs = await asyncio.to_thread(bench.fio, name, moved)
                else:
                    theirs = await asyncio.to_thread(bench.fio, name, moved)
                    mine = await ours()
                found[name].append((mine, theirs))
                console.print(f"{name}: {mine / 1e9:.2f} GB/s, fio {theirs / 1e9:.2f} GB/s")
        return found
    finally:
        tier.close()


def main(
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure. Default: the temporary folder.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 7,
    quick: Annotated[bool, typer.Option(help="Small and few: does it run at all?")] = False,
    json: Annotated[Path | None, typer.Option(help="Where to write the results.")] = None,
) -> None:
    """Measure the disk tier beside fio."""
    if shutil.which("fio") is None:
        console.print("fio is not installed: there is nothing to compare with (apt-get install fio)", style="red")
        raise typer.Exit(1)
    slots, moved, rounds = (256, 128, 1) if quick else (4096, 2048, rounds)
    with tempfile.TemporaryDirectory(dir=folder, prefix="tracehaul-disk-") as made:
        found = asyncio.run(measure(Path(made), slots, moved, rounds))
    results = [_result(name, pairs) for name, pairs in found.items()]
    config: dict[str, Any] = {"block_bytes": BLOCK, "depths": DEPTHS, "slots": slots, "blocks": moved, "rounds": rounds}
    finish(config, results, json, console)


def _result(name: str, pairs: list[tuple[float, float]]) -> Result:
    """The median of our figures, and the median of the ratios within a round."""
    ours = statistics.median([mine for mine, _ in pairs]) / 1e9
    ratio = statistics.median([mine / theirs for mine, theirs in pairs])
    return Result(f"store.disk.{name}.256K", ours, "GB/s", f"fio {PATTERNS[name]} 256K QD{DEPTHS[name]}", ratio)


if __name__ == "__main__":
    typer.run(main)

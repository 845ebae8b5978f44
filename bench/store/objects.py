"""The S3 tier against its own client library: the same server, the same requests at once, turn by turn in one run.

The library moves bytes and nothing else. The tier's figures include what a block costs: its index, the copy to where
it is wanted and its checksum verified there; on write the deletion of the objects that made room.

The server is the one that the environment names (``AWS_ENDPOINT_URL``), or moto on this machine, which is slow: beside
it the tier looks better than beside a real one.
"""

import asyncio
import mmap
import os
import random
import statistics
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import obstore
import typer
from obstore.store import S3Store
from rich.console import Console

from bench.common.report import Result, finish
from cluster.launch import free_port
from kvstore.tiers.base import TierBlock
from kvstore.tiers.object_tier import IN_FLIGHT_BYTES, IN_FLIGHT_MAX, IN_FLIGHT_MIN, STORES_MAX, ObjectTier
from kvstore.tiers.objects import parse_url
from kvstore.tiers.s3 import open_s3
from tracehaul.runtime import clock
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

SIZES = {"256K": 256 << 10, "1M": 1 << 20, "4M": 4 << 20}
BATCH_BYTES = 4 << 20
"""In one load or store: what a node moves together."""
ROOT = BlockHash(b"\xff" * 16)
SERVER_START_S = 30.0

console = Console()


class Bench:
    """A full tier of one block size, and as many objects of the library's own."""

    def __init__(self, tier: ObjectTier, raw: S3Store, size: int, slots: int, moved: int) -> None:
        self._tier = tier
        self._raw = raw
        self._size = size
        self._slots = slots
        self._moved = moved
        self._batch = max(1, BATCH_BYTES // size)
        self._lanes = STORES_MAX
        self.at_once = min(
            max(IN_FLIGHT_MIN, min(IN_FLIGHT_MAX, IN_FLIGHT_BYTES // size)), self._batch * self._lanes, moved
        )
        memory = memoryview(mmap.mmap(-1, self._lanes * self._batch * size))
        memory[:] = random.Random(0).randbytes(len(memory))
        self._views = [memory[at : at + size] for at in range(0, len(memory), size)]
        self._sums = [checksum(view) for view in self._views]
        into = memoryview(mmap.mmap(-1, len(memory)))
        into[:: mmap.PAGESIZE] = bytes(len(into) // mmap.PAGESIZE)  # present before the clock starts
        self._into = [into[at : at + size] for at in range(0, len(into), size)]
        self._number = 0
        self._dice = random.Random(1)

    async def fill(self) -> None:
        """Until every write makes another block go; and the library's own objects."""
        while len(self._tier) < self._slots:
            await self._store(0, min(self._batch, self._slots - len(self._tier)))
        await asyncio.gather(*(self._put(i % len(self._views), i) for i in range(self._moved)))

    async def read(self) -> float:
        """Bytes per second over random blocks."""
        wanted = self._dice.sample(list(self._tier.held()), self._moved)

        async def load(lane: int, turn: int) -> None:
            part = wanted[turn * self._batch : (turn + 1) * self._batch]
            outcomes = await self._tier.load(part, self._into[lane * self._batch :][: len(part)])
            assert set(outcomes) == {"loaded"}, outcomes

        return await self._timed(load)

    async def write(self) -> float:
        """Bytes per second of new blocks, each taking the place of another."""
        return await self._timed(lambda lane, _: self._store(lane, self._batch))

    async def raw_read(self) -> float:
        """Bytes per second of the library, of bodies that nobody looks at."""

        async def get(number: int) -> None:
            found = await obstore.get_async(self._raw, str(number))
            assert len(await found.buffer_async()) == self._size

        return await self._spread(get)

    async def raw_write(self) -> float:
        """Bytes per second of the library, over objects that are there already."""
        return await self._spread(lambda number: self._put(number % len(self._views), number))

    async def _put(self, view: int, number: int) -> None:
        await obstore.put_async(self._raw, str(number), self._views[view], use_multipart=False)

    async def _store(self, lane: int, count: int) -> None:
        blocks: list[TierBlock] = []
        at = lane * self._batch
        for i in range(count):
            self._number += 1
            blocks.append(TierBlock(BlockHash(self._number.to_bytes(16)), ROOT, self._size, self._sums[at + i]))
        outcomes = await self._tier.store(blocks, self._views[at : at + count])
        assert set(outcomes) == {"stored"}, outcomes

    async def _timed(self, work: Callable[[int, int], Awaitable[None]]) -> float:
        turns = self._moved // self._batch

        async def lane(number: int) -> None:
            for turn in range(number, turns, self._lanes):
                await work(number, turn)

        start_s = clock.perf_s()
        await asyncio.gather(*(lane(number) for number in range(self._lanes)))
        return turns * self._batch * self._size / (clock.perf_s() - start_s)

    async def _spread(self, work: Callable[[int], Awaitable[None]]) -> float:
        async def lane(first: int) -> None:
            for number in range(first, self._moved, self.at_once):
                await work(number)

        start_s = clock.perf_s()
        await asyncio.gather(*(lane(number) for number in range(self.at_once)))
        return self._moved * self._size / (clock.perf_s() - start_s)


async def measure(url: str, size: int, total: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Per figure, of each round: ours and the library's bytes per second."""
    moved = max(STORES_MAX, total // size)
    slots = moved + STORES_MAX * max(1, BATCH_BYTES // size)
    tier = await open_s3(url, f"tier-{size}", slots * size, size)
    running = asyncio.create_task(tier.run())
    try:
        while not tier.available:  # noqa: ASYNC110 - polls a flag
            await asyncio.sleep(0.01)
        bucket, prefix = parse_url(url)
        options = {"allow_http": True}
        raw = S3Store(bucket, prefix=f"{prefix}/raw-{size}", unsigned_payload=True, client_options=options)  # pyright: ignore[reportArgumentType]
        bench = Bench(tier, raw, size, slots, moved)
        await bench.fill()
        found: dict[str, list[tuple[float, float]]] = {"read": [], "write": []}
        for turn in range(rounds):
            for name, ours, theirs in (
                ("read", bench.read, bench.raw_read),
                ("write", bench.write, bench.raw_write),
            ):
                if turn % 2:
                    mine, raws = await ours(), await theirs()
                else:
                    raws, mine = await theirs(), await ours()
                found[name].append((mine, raws))
                console.print(f"{size >> 10}K {name}: {mine / 1e9:.3f} GB/s, library {raws / 1e9:.3f} GB/s")
        return found
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        tier.close()


@contextmanager
def moto() -> Generator[None, None, None]:
    """A server on this machine, named in the environment."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    names = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "bench", "SECRET_ACCESS_KEY": "bench", "REGION": "us-east-1"}
    os.environ.update({f"AWS_{name}": value for name, value in names.items()})
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            began_s = clock.now_s()
            while clock.now_s() - began_s < SERVER_START_S:
                try:
                    httpx.get(endpoint, trust_env=False, timeout=5.0)
                    break
                except httpx.TransportError:
                    continue
            yield
        finally:
            server.kill()


def main(
    url: Annotated[str | None, typer.Option(help="s3://bucket/prefix to use, of the environment's endpoint.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    quick: Annotated[bool, typer.Option(help="Small and few: does it run at all?")] = False,
    json: Annotated[Path | None, typer.Option(help="Where to write the results.")] = None,
) -> None:
    """Measure the S3 tier beside its client library."""
    total, rounds = (32 << 20, 1) if quick else (256 << 20, rounds)
    if url is not None:
        results = _all(url, total, rounds)
    else:
        with moto():
            endpoint, bucket = os.environ["AWS_ENDPOINT_URL"], f"bench-{uuid.uuid4().hex[:8]}"
            httpx.put(f"{endpoint}/{bucket}", trust_env=False).raise_for_status()
            results = _all(f"s3://{bucket}/bench", total, rounds)
    server = "moto" if url is None else os.environ.get("AWS_ENDPOINT_URL", "AWS")
    finish({"server": server, "bytes": total, "rounds": rounds}, results, json, console)


def _all(url: str, total: int, rounds: int) -> list[Result]:
    results: list[Result] = []
    for label, size in SIZES.items():
        for name, pairs in asyncio.run(measure(url, size, total, rounds)).items():
            ours = statistics.median([mine for mine, _ in pairs]) / 1e9
            ratio = statistics.median([mine / theirs for mine, theirs in pairs])
            results.append(Result(f"store.s3.{name}.{label}", ours, "GB/s", "obstore alone", ratio))
    return results


if __name__ == "__main__":
    typer.run(main)

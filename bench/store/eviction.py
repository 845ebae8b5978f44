"""Which eviction policy keeps the right blocks: recordings replayed against a store node's arena.

A request finds the leading run of its blocks that is there and writes the rest. What a model answers is not recorded
as blocks, so it counts as new in the next request of its trace, under every policy.

Prints, per recording, capacity and policy, the share of prompt tokens found (`hits`) and the cost of computing the
rest (`recompute`), as a share of computing everything, where a token at position p costs 1 + p / 32768.
"""

import json
import lzma
import random
import tarfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.common.report import Result, finish
from bench.store.eviction_policies import GreedyDual, S3Fifo, lru
from kvstore.config import PAGE_BYTES, StoreConfig
from kvstore.index.arena import Arena
from kvstore.index.eviction import Policy
from tracehaul.wire.blocks import BlockSpec, Publication, Slot
from tracehaul.wire.ids import BlockHash, Checksum

CAPACITIES = (0.05, 0.1, 0.25, 0.5)
"""Of the distinct blocks of a recording."""
ATTENTION_TOKENS = 32768
"""Where computing attention for a token costs as much as the rest of a model (8 billion parameters, about)."""
SPREAD_S = 6 * 3600.0
"""Traces without a common clock start at random within this time."""
QUICK_TRACES = 60
FILES = ("weka_full_dev.tar.xz", "weka_scaled16_dev.tar.xz", "mooncake_synthetic.jsonl.xz")
TRACE_BLOCK_TOKENS = {"weka_full_dev.tar.xz": 1024, "weka_scaled16_dev.tar.xz": 64}


class Recording(msgspec.Struct):
    """Requests in the order of their times; each a row of block numbers, equal numbers for equal prefixes."""

    name: str
    block_tokens: int
    requests: "list[array[int]]"
    blocks: int
    """Distinct ones, numbered from 0."""

    def costs(self) -> "array[float]":
        """Per block, what computing one of its tokens costs, by its position."""
        costs = array("d", bytes(8 * self.blocks))
        for request in self.requests:
            for depth, block in enumerate(request):
                costs[block] = 1 + depth * self.block_tokens / ATTENTION_TOKENS
        return costs


class Outcome(msgspec.Struct, frozen=True):
    """What one replay found."""

    hits: float
    recompute: float


def policies(slots_max: int, costs: "array[float]") -> dict[str, Callable[[], Policy]]:
    """What is compared, by name."""

    def cost(block_hash: BlockHash) -> float:
        return costs[int.from_bytes(block_hash, "little")]

    return {
        "lru": lambda: lru(slots_max),
        "s3-fifo": lambda: S3Fifo(slots_max),
        "greedy-dual": lambda: GreedyDual(lambda uses, block: cost(block)),
        "greedy-dual-frequency": lambda: GreedyDual(lambda uses, block: uses * cost(block)),
        "frequency-only": lambda: GreedyDual(lambda uses, block: float(uses)),
    }


def replay(recording: Recording, slots_max: int, policy: Policy | None) -> Outcome:
    """One arena serves all requests in turn: each reads the run that is there, then writes the rest."""
    config = StoreConfig(arena_bytes=slots_max * PAGE_BYTES, slot_bytes=PAGE_BYTES, reservations_max=1 << 30)
    arena = Arena(config, policy)
    root = BlockHash(b"root")
    found = asked = 0
    spent = total = 0.0
    for number, request in enumerate(recording.requests):
        hashes = [BlockHash(block.to_bytes(8, "little")) for block in request]
        run = (arena.exists(hashes) + b"\0").index(0)
        leased = arena.lease(hashes[:run], "reader", 1.0, float(number))
        assert leased is not None
        for place in range(run, len(hashes)):
            parent = hashes[place - 1] if place else root
            (slot,) = arena.reserve([BlockSpec(hashes[place], parent, 1)], "writer", float(number))
            if not isinstance(slot, Slot):
                break
            arena.publish([Publication(hashes[place], slot.generation, Checksum(0))], "writer", float(number))
        arena.release(leased.lease, "reader")
        arena.take_changes()
        arena.take_ended()
        found += run
        asked += len(hashes)
        spent += _cost(run, len(hashes), recording.block_tokens)
        total += _cost(0, len(hashes), recording.block_tokens)
    return Outcome(found / asked, spent / total)


def _cost(start: int, end: int, block_tokens: int) -> float:
    """Of computing blocks ``start`` to ``end`` of a sequence, in blocks at its beginning."""
    return (end - start) + (end**2 - start**2) / 2 * block_tokens / ATTENTION_TOKENS


def load(folder: Path, name: str, quick: bool) -> Recording:
    """Read one recording from the folder that holds it.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = folder / name
    if name.endswith(".jsonl.xz"):
        return _load_requests(path, quick)
    return _load_traces(path, TRACE_BLOCK_TOKENS[name], quick)


def _load_requests(path: Path, quick: bool) -> Recording:
    with lzma.open(path) as file:
        rows = [json.loads(line) for line in file]
    rows = rows[: len(rows) // 4] if quick else rows
    numbers: dict[int, int] = {}
    rows.sort(key=lambda row: row["timestamp"])
    requests = [array("I", [numbers.setdefault(block, len(numbers)) for block in row["hash_ids"]]) for row in rows]
    return Recording(path.name.partition(".")[0], 512, requests, len(numbers))


def _load_traces(path: Path, block_tokens: int, quick: bool) -> Recording:
    """Blocks of ``block_tokens`` are chained from the recording's own, which are local to a trace."""
    rng = random.Random(path.name)
    timed: list[tuple[float, array[int]]] = []
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".json")), key=lambda m: m.name)
        for trace, member in enumerate(members[:QUICK_TRACES] if quick else members):
            content = archive.extractfile(member)
            assert content is not None
            document = json.loads(content.read())
            width = block_tokens // document["block_size"]
            start_s = rng.uniform(0, SPREAD_S)
            for at_s, ids in _steps(document["requests"]):
                row = array("I")
                parent = -1 - trace
                for start in range(0, len(ids) - len(ids) % width, width):
                    parent = numbers.setdefault((parent, tuple(ids[start : start + width])), len(numbers))
                    row.append(parent)
                if row:
                    timed.append((start_s + at_s, row))
    timed.sort(key=lambda item: item[0])
    return Recording(path.name.partition(".")[0], block_tokens, [row for _, row in timed], len(numbers))


def _steps(requests: list[dict[str, Any]]) -> Iterator[tuple[float, list[int]]]:
    for request in requests:
        if request["type"] == "subagent":
            yield from _steps(request["requests"])
        else:
            yield request["t"], request["hash_ids"]


def main(
    recordings: Annotated[Path, typer.Option(help="the folder with the recordings, or one of them")],
    quick: Annotated[bool, typer.Option(help="fewer traces, two capacities")] = False,
    json: Annotated[Path | None, typer.Option(help="write the results there")] = None,
) -> None:
    """Replay recordings under every policy and capacity."""
    console = Console()
    results: list[Result] = []
    folder, names = (recordings, FILES) if recordings.is_dir() else (recordings.parent, (recordings.name,))
    for name in names:
        recording = load(folder, name, quick)
        costs = recording.costs()
        bound = replay(recording, recording.blocks, None)
        table = Table(
            "capacity",
            "policy",
            "hits",
            "of the bound",
            "recompute",
            title=f"{recording.name}: {recording.blocks} blocks",
        )
        table.add_row("unlimited", "any", f"{bound.hits:.3f}", "", f"{bound.recompute:.3f}")
        for share in CAPACITIES[::2] if quick else CAPACITIES:
            slots_max = int(recording.blocks * share)
            baseline: float | None = None
            for policy, make in policies(slots_max, costs).items():
                outcome = replay(recording, slots_max, make())
                baseline = baseline or outcome.hits
                key = f"eviction.{recording.name}.{round(share * 100)}.{policy}"
                results.append(Result(f"{key}.hits", outcome.hits, "share", "lru", outcome.hits / baseline))
                results.append(Result(f"{key}.recompute", outcome.recompute, "share"))
                table.add_row(
                    f"{share:.0%}",
                    policy,
                    f"{outcome.hits:.3f}",
                    f"{outcome.hits / bound.hits:.3f}",
                    f"{outcome.recompute:.3f}",
                )
        console.print(table)
    config = {"quick": quick, "capacities": CAPACITIES, "spread_s": SPREAD_S, "attention_tokens": ATTENTION_TOKENS}
    if json is not None:
        finish(config, results, json, console)


if __name__ == "__main__":
    typer.run(main)

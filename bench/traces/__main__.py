"""Traces as the unit of work: how fast the router decides, and what its decisions give on recorded agents.

``index.match.100k``: matching a prompt of 100,000 tokens against an index of a million blocks on 16 nodes, announced as
stores announce them: each trace's blocks in groups, others' between. ``index.match.100k.scattered``: a prompt whose
blocks are anywhere in memory. ``index.events``: blocks per second that one core takes in, decoding included.
``placement.1000``: one placement among a thousand decode and a thousand prefill workers, the books kept.

More parts, most of them on recorded agents: :mod:`bench.traces.replay`, :mod:`bench.traces.peers`,
:mod:`bench.traces.fork`, :mod:`bench.traces.resume`, :mod:`bench.traces.hits`, :mod:`bench.traces.ablation`.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from bench.common.report import Result, finish, percentile
from bench.replay.choose import Limits, choose
from bench.replay.command import RECORDINGS_VARIABLE, read_traces
from bench.replay.schedule import Pacing
from bench.traces.ablation import ablation_results
from bench.traces.fork import fork_results
from bench.traces.hits import kill_results, mooncake_results
from bench.traces.peers import peers_results
from bench.traces.replay import replay_results
from bench.traces.resume import resume_results
from router.fleet.index import Index
from router.fleet.load import Warm, WorkerTable
from router.policy.cost import StoredRun
from router.policy.placement import Ask, place
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Events, Removed, Snapshot, Stored
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.hashing import HASH_BYTES
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId

BLOCKS = 1_000_000
PROMPT_BLOCKS = 3125
"""100,000 tokens in blocks of 32."""
NODES = 16
GROUP_BLOCKS = 16
TRACES_AT_ONCE = 32
TIMES = 100
EVENT_MESSAGES = 64
MESSAGE_BLOCKS = 4096
WORKERS = 1000
PLACEMENTS = 500
G = Generation(1)

PEERS = Path(__file__).parents[2] / ".peers"
WORKLOAD = "weka_scaled16"
FULL = Limits(traces_max=12, skip_steps=6, steps_min=8, steps_max=8, context_min=3500)
QUICK = Limits(traces_max=8, skip_steps=1, steps_min=4, steps_max=4, context_min=1500, context_max=2600, output_max=32)
PACING = Pacing(concurrency=12, time_scale=8.0, gap_max_s=8.0, stagger_s=1.0)
QUICK_PACING = Pacing(concurrency=12, time_scale=30.0, gap_max_s=1.0, stagger_s=0.3)
"""So few short steps keep nobody busy through longer gaps, and every policy would look the same."""

PARTS = ("index", "placement", "fork", "resume", "replay", "ample", "peers", "kill", "mooncake", "ablation")

console = Console()


def index_results(blocks: int) -> list[Result]:
    """Matching and events."""
    index = Index()
    chains = [[_hash() for _ in range(PROMPT_BLOCKS)] for _ in range(blocks // PROMPT_BLOCKS)]
    nodes = [NodeId(f"store-{n}") for n in range(NODES)]
    for node in nodes:
        index.snapshot(node, Snapshot(G, 0, (), last=True))
    sequences = dict.fromkeys(nodes, 0)
    for start in range(0, len(chains), TRACES_AT_ONCE):
        together = chains[start : start + TRACES_AT_ONCE]
        for group in range(0, PROMPT_BLOCKS, GROUP_BLOCKS):
            for number, chain in enumerate(together):
                node = nodes[(start + number) % NODES]
                told = tuple(Stored(block) for block in chain[group : group + GROUP_BLOCKS])
                assert index.events(node, Events(G, sequences[node] + 1, told))
                sequences[node] += len(told)
    everything = [block for chain in chains for block in chain]
    chance = random.Random(1)
    together = _times(lambda: _fresh(chance.choice(chains)), lambda asked: index.match(asked).blocks)
    scattered = _times(
        lambda: _fresh(chance.sample(everything, PROMPT_BLOCKS)), lambda asked: index.match(asked).blocks
    )
    node = nodes[0]
    messages: list[bytes] = []
    for number in range(EVENT_MESSAGES):
        first = sequences[node] + 1 + number * MESSAGE_BLOCKS
        old = chains[0] if number % 2 else chains[NODES]  # both are this node's, and come back the next time
        changes: list[Stored | Removed] = [Stored(_hash()) for _ in range(MESSAGE_BLOCKS // 2)]
        changes += [Removed(block) if number < 2 else Stored(block) for block in old[: MESSAGE_BLOCKS // 2]]
        messages.append(msgspec.msgpack.encode(Events(G, first, tuple(changes))))
    decoder = msgspec.msgpack.Decoder(Events)
    began_s = clock.perf_s()
    for message in messages:
        assert index.events(node, decoder.decode(message))
    rate = EVENT_MESSAGES * MESSAGE_BLOCKS / (clock.perf_s() - began_s)
    return [
        *_milliseconds("index.match.100k", together),
        *_milliseconds("index.match.100k.scattered", scattered),
        Result("index.events", rate, "1/s"),
    ]


def placement_results() -> list[Result]:
    """Placing steps among a thousand workers of each role, each step kept in the books as the router keeps it."""
    chance = random.Random(1)
    decodes, prefills = _many(chance, "decode"), _many(chance, "prefill")
    stores = [NodeId(f"store-{n}") for n in range(NODES)]
    took_s: list[float] = []
    for number in range(PLACEMENTS):
        warm = Warm(NodeId(f"decode-{chance.randrange(WORKERS)}"), G, 90_000)
        stored = [StoredRun(50_000, 0.0), StoredRun(50_000 + chance.randrange(50_000), 1e-4)]
        ask = Ask(TraceId(f"t{number}"), 100_000, stored, warm, stores[0])
        now_s = number / 100
        began_s = clock.perf_s()
        for of, infos, loads in (decodes, prefills):
            of.sync(infos, loads)
        placed = place("cost", ask, decodes[0], prefills[0], stores, now_s)
        assert placed is not None
        decodes[0].sent(placed.decode, placed.decode_work_s, now_s)
        if placed.helper is not None and placed.prefill_work_s:
            prefills[0].sent(placed.helper, placed.prefill_work_s, now_s)
        took_s.append(clock.perf_s() - began_s)
    return _milliseconds("placement.1000", took_s)


def _many(chance: random.Random, role: str) -> tuple[WorkerTable, list[NodeInfo], list[NodeLoad]]:
    limits = WorkerLimits(local_prefill_tokens=256)
    infos = [NodeInfo(NodeId(f"{role}-{n}"), G, "decode", "x:1", limits=limits) for n in range(WORKERS)]
    loads = [
        NodeLoad(
            token_s=chance.uniform(5e-5, 2e-4),
            pair_s=1e-8,
            decode_s=0.02,
            pull_token_s=1e-6,
            free_tokens=chance.randrange(200_000),
        )
        for _ in infos
    ]
    return WorkerTable(), infos, loads


def _hash() -> BlockHash:
    return BlockHash(os.urandom(HASH_BYTES))


def _fresh(hashes: list[BlockHash]) -> list[BlockHash]:
    """Equal, and other objects: as a prompt's are."""
    return [BlockHash(bytes(bytearray(block))) for block in hashes]


def _times(make: Callable[[], list[BlockHash]], match: Callable[[list[BlockHash]], int]) -> list[float]:
    took_s: list[float] = []
    for _ in range(TIMES):
        asked = make()
        began_s = clock.perf_s()
        found = match(asked)
        took_s.append(clock.perf_s() - began_s)
        assert found == PROMPT_BLOCKS
    return took_s


def _milliseconds(name: str, took_s: list[float]) -> list[Result]:
    return [
        Result(name, 1e3 * median(took_s), "ms"),
        Result(f"{name}.p99", 1e3 * percentile(took_s, 0.99), "ms"),
    ]


def main(
    recordings: Annotated[
        Path | None, typer.Option(envvar=RECORDINGS_VARIABLE, help="Where the recordings are; none: no replays.")
    ] = None,
    workload: Annotated[str, typer.Option(help="Which of them.")] = WORKLOAD,
    rounds: Annotated[int, typer.Option(min=1, help="Replays of each kind.")] = 1,
    peers: Annotated[
        Path, typer.Option(help="Where ./scripts/peers installed vllm and lmcache, to replay beside them.")
    ] = PEERS,
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; all if not given.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer blocks, fewer and shorter traces.")] = False,
) -> None:
    """Measure the router's decisions and what they give."""
    parts = only or PARTS
    limits, pacing = (QUICK, QUICK_PACING) if quick else (FULL, PACING)
    config: dict[str, Any] = {"parts": list(parts), "workload": workload, "rounds": rounds, "quick": quick}
    results: list[Result] = []
    if "index" in parts:
        results += index_results(BLOCKS // 10 if quick else BLOCKS)
    if "placement" in parts:
        results += placement_results()
    if "fork" in parts:
        results += fork_results(rounds, config, console, quick=quick)
    if "resume" in parts:
        results += resume_results(config, console, quick=quick)
    if recordings is not None:
        if {"replay", "ample", "peers"} & set(parts):
            traces = choose(read_traces(recordings, workload), limits, seed=1)
            config |= {"limits": msgspec.to_builtins(limits), "pacing": msgspec.to_builtins(pacing)}
            if "replay" in parts:
                results += replay_results(traces, pacing, rounds, config, console)
            if "ample" in parts:
                results += replay_results(traces, pacing, rounds, config, console, ample=True)
            if "peers" in parts and (peers / "vllm").is_dir():
                results += peers_results(traces, pacing, peers, rounds, config, console)
            elif "peers" in parts:
                console.print("Peers are left out: ./scripts/peers vllm lmcache installs them")
        if "kill" in parts:
            results += kill_results(read_traces(recordings, workload), config, console, quick=quick)
        if "ablation" in parts:
            results += ablation_results(read_traces(recordings, workload), config, console, quick=quick)
        if "mooncake" in parts:
            results += mooncake_results(read_traces(recordings, "mooncake"), config, console, quick=quick)
    finish(config, results, json, console)


if __name__ == "__main__":
    typer.run(main)

"""The cluster beside what people run today, on the same recorded agents and in the same bytes.

``replay.peers.lmcache``: steps per hour, divided by those of one vLLM server whose KV memory is as small as that of our
workers together, with an LMCache process that may hold what our store may hold. ``replay.peers.vllm``: divided by
those of one vLLM server with all of that memory for itself, so that nothing is ever moved.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.common.fleet import fleet
from bench.common.report import Result
from bench.engine.model import hub_folder
from bench.peers.vllm_server import Peers, vllm_server
from bench.replay.progress import shown
from bench.replay.recording import Trace
from bench.replay.run import Outcome, Target, replay
from bench.replay.schedule import Pacing
from bench.traces.replay import STORE_BYTES, steps_per_h
from cluster.config import ClusterConfig, NodeCounts
from router.dispatch.config import DispatchConfig

KV_BYTES = 422 << 20
"""Of all workers together: a third of the contexts that live at once."""
TOKEN_BYTES = 23_040
"""KV of a token of the default model."""
CONTEXT_MAX = 8192
NODES = NodeCounts(prefill=0, decode=1, store=1)
"""Two cores are one worker's: a second one would halve its batches."""


def peers_results(
    traces: Sequence[Trace], pacing: Pacing, folder: Path, rounds: int, config: dict[str, Any], console: Console
) -> list[Result]:
    """Ours and theirs in turn, ``rounds`` times."""
    peers = Peers(folder)
    model = hub_folder()
    workers = NODES.prefill + NODES.decode
    ours = ClusterConfig(
        nodes=NODES,
        kv_tokens=KV_BYTES // TOKEN_BYTES // workers // 32 * 32,
        store_bytes=STORE_BYTES,
        dispatch=DispatchConfig(),
    )
    config |= {"peers.kv_bytes": KV_BYTES, "peers.store_bytes": STORE_BYTES, "peers.nodes": workers}
    outcomes: dict[str, list[Outcome]] = {"ours": [], "vllm": []}
    if peers.lmcache.is_dir():
        outcomes["lmcache"] = []
    for _ in range(rounds):
        for name, runs in outcomes.items():
            runs.append(_run(name, traces, pacing, peers, model, ours, console))
            console.print(f"{name}: {steps_per_h(runs[-1:]):.0f} steps/h", highlight=False)
    rate = steps_per_h(outcomes["ours"])
    results = [Result("replay.steps_per_h.ours", rate, "1/h")]
    for name in ("lmcache", "vllm"):
        if name in outcomes:
            theirs = steps_per_h(outcomes[name])
            results.append(Result(f"replay.steps_per_h.{name}", theirs, "1/h"))
            results.append(
                Result(f"replay.peers.{name}", rate / theirs, "1", f"replay.steps_per_h.{name}", rate / theirs)
            )
    for name, runs in outcomes.items():
        found = runs[-1].hits
        if found is not None:
            results.append(Result(f"replay.hits.{name}", found.delivered, "1", None, None))
    return results


def _run(
    name: str,
    traces: Sequence[Trace],
    pacing: Pacing,
    peers: Peers,
    model: Path,
    ours: ClusterConfig,
    console: Console,
) -> Outcome:
    if name == "ours":
        with fleet(ours, console) as running, shown(console) as observe:
            return asyncio.run(replay(traces, pacing, Target(running.url), observe))
    lmcache_bytes = STORE_BYTES if name == "lmcache" else 0
    kv_bytes = KV_BYTES if name == "lmcache" else KV_BYTES + STORE_BYTES
    server = vllm_server(peers, model, kv_bytes=kv_bytes, context_max=CONTEXT_MAX, lmcache_bytes=lmcache_bytes)
    with server as url, shown(console) as observe:
        return asyncio.run(replay(traces, pacing, Target(url), observe))

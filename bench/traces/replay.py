"""Policies on the same recorded agents: fresh clusters of one prefill and two decode workers, in turn.

The decode workers together hold a third of the traces' contexts, or (``ample``) each of them all. Placement by cost
with the store, a trace bound to its worker without, and round-robin without. ``replay.steps.sticky`` and
``replay.steps.round_robin`` are steps per hour of the first, divided by the others'; ``replay.hits`` is its delivered
hits, divided by those of an infinite shared cache.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Console

from bench.common.fleet import fleet
from bench.common.report import Result
from bench.replay.progress import shown
from bench.replay.recording import Trace
from bench.replay.records import summary
from bench.replay.run import Outcome, Target, replay
from bench.replay.schedule import Pacing
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from router.dispatch.config import DispatchConfig
from worker.config import WorkerConfig

CAPACITY_SHARE = 3
"""The traces' contexts are that many times what the decode workers hold."""
STORE_BYTES = 2 << 30
CONTENDERS = {
    "cost": DispatchConfig(),
    "sticky": DispatchConfig(policy="sticky", use_store=False),
    "round_robin": DispatchConfig(policy="round-robin", use_store=False),
}


def replay_results(
    traces: list[Trace], pacing: Pacing, rounds: int, config: dict[str, Any], console: Console, *, ample: bool = False
) -> list[Result]:
    """All contenders in turn, ``rounds`` times, each round beginning with another.

    ``ample``: every worker could hold all contexts. Round-robin is left out then, and names end in ``.ample``.
    """
    suffix = ".ample" if ample else ""
    need = sum(max(step.prompt.tokens + step.output_tokens for step in trace.steps) for trace in traces)
    longest = max(step.prompt.tokens + step.output_tokens for trace in traces for _, step in trace.walk())
    kv_tokens = need if ample else max(need // (2 * CAPACITY_SHARE), longest + 64)
    kv_tokens = -(-kv_tokens // 32) * 32
    config |= {f"kv_tokens{suffix}": kv_tokens, "contexts_tokens": need, "store_bytes": STORE_BYTES}
    names = [name for name in CONTENDERS if not (ample and name == "round_robin")]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            outcomes[name].append(_replayed(traces, pacing, CONTENDERS[name], kv_tokens, console))
            rate = steps_per_h(outcomes[name][-1:])
            console.print(f"round {number + 1}, {name}: {rate:.0f} steps/h", highlight=False)
    results: list[Result] = []
    for name, runs in outcomes.items():
        for result in summary(
            [record for run in runs for record in run.records],
            [trace for run in runs for trace in run.completed],
            sum(run.wall_s for run in runs),
            runs[-1].hits,
        ):
            results.append(
                msgspec.structs.replace(result, name=f"{result.name}.{name}{suffix}", versus=None, ratio=None)
            )
    ours = steps_per_h(outcomes["cost"])
    for name in names[1:]:
        ratio = ours / steps_per_h(outcomes[name])
        versus = f"replay.steps_per_h.{name}{suffix}"
        results.append(Result(f"replay.steps.{name}{suffix}", ratio, "1", versus, ratio))
    found = outcomes["cost"][-1].hits
    if found is not None:
        ratio = found.delivered / found.shared
        results.append(Result(f"replay.hits{suffix}", ratio, "1", f"replay.hits.shared.cost{suffix}", ratio))
    return results


def _replayed(
    traces: list[Trace], pacing: Pacing, dispatch: DispatchConfig, kv_tokens: int, console: Console
) -> Outcome:
    config = ClusterConfig(
        port=free_port(),
        nodes=NodeCounts(prefill=1, decode=2, store=1),
        kv_tokens=kv_tokens,
        store_bytes=STORE_BYTES,
        dispatch=dispatch,
        worker=WorkerConfig(use_store=dispatch.use_store),
    )
    with fleet(config, console) as running, shown(console) as observe:
        return asyncio.run(replay(traces, pacing, Target(running.url), observe))


def steps_per_h(runs: Sequence[Outcome]) -> float:
    """Those that did not fail."""
    good = sum(record.error is None for run in runs for record in run.records)
    return 3600 * good / sum(run.wall_s for run in runs)

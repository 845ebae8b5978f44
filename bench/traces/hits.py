"""Hits of replays where something is hard for caches: a worker that dies, and requests that have no sessions.

``replay.hits.after_kill``: recorded agents on one prefill and two decode workers, one of which is killed when a third
of the steps have ended. Of the steps that each trace sent after that all but the first two count: their delivered hits,
divided by those of an infinite shared cache. ``.first`` and ``.second`` are those of the two, ``.errors`` all failed
steps.

``replay.hits.mooncake``: recorded requests without sessions, every length divided by 16 so that they fit the model (a
block of 512 tokens becomes 32, a block of the store), of one in so many groups of requests that begin alike. Shares of
prompt tokens: delivered hits, ``.shared`` an infinite cache's, ``.short`` what is missing of that; ``.sticky`` what
workers bound to their sessions deliver without a store, on the same requests.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from rich.console import Console

from bench.common.fleet import Fleet, fleet
from bench.common.report import Result
from bench.replay.choose import Limits, choose, shrink, whole_groups
from bench.replay.hits import Bound
from bench.replay.progress import shown
from bench.replay.recording import Trace
from bench.replay.records import StepRecord
from bench.replay.run import Outcome, Progress, Target, replay
from bench.replay.schedule import Pacing
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from router.dispatch.config import DispatchConfig
from worker.config import WorkerConfig

STORE_BYTES = 3 << 30
AGENTS = Limits(traces_max=8, skip_steps=6, steps_min=8, steps_max=8, context_min=3500, output_max=32)
QUICK_AGENTS = Limits(
    traces_max=4, skip_steps=1, steps_min=6, steps_max=6, context_min=1500, context_max=2600, output_max=16
)
AGENTS_PACING = Pacing(concurrency=8, time_scale=8.0, gap_max_s=4.0, stagger_s=1.0)
CAPACITY_SHARE = 2
"""The traces' contexts are that many times what the decode workers hold."""
KILLED = "decode-1"
KILLED_AT = 1 / 3
"""Share of the steps that have ended when the worker is killed."""
BACK_WITHIN = 2
"""Steps of each trace after which its hits are to be back."""

SHRINK = 16
ONE_IN, QUICK_ONE_IN, GROUPS_SEED = 64, 128, 2
"""The seed is one whose requests share as much as those of the whole recording (a bound of 0.65)."""
REQUESTS = Limits(traces_max=10_000, output_max=16)
REQUESTS_PACING = Pacing(concurrency=16, time_scale=20.0)
QUICK_PACING = Pacing(concurrency=16, time_scale=60.0)
REQUESTS_KV_TOKENS = 24_576

Observe = Callable[[Progress], None]


def kill_results(traces: Sequence[Trace], config: dict[str, Any], console: Console, *, quick: bool) -> list[Result]:
    """Replay agents, and kill a worker."""
    chosen = choose(traces, QUICK_AGENTS if quick else AGENTS, seed=1)
    need = sum(max(step.prompt.tokens + step.output_tokens for step in trace.steps) for trace in chosen)
    longest = max(step.prompt.tokens + step.output_tokens for trace in chosen for _, step in trace.walk())
    shape = cluster_of(max(need // (2 * CAPACITY_SHARE), longest + 512), DispatchConfig())
    config["kill"] = {
        "traces": len(chosen),
        "contexts_tokens": need,
        "kv_tokens": shape.kv_tokens,
        "at": KILLED_AT,
        "pacing": msgspec.to_builtins(AGENTS_PACING),
    }
    with fleet(shape, console) as running:
        killer = _Killer(running, console)
        outcome = replayed(running, chosen, AGENTS_PACING, console, killer)
    assert killer.killed_s is not None
    parts = after_kill(outcome.records, outcome.bounds, killer.killed_s)
    errors = sum(record.error is not None for record in outcome.records)
    results = [Result("replay.hits.after_kill.errors", errors, "1")]
    for name, (delivered, bound) in zip(("first", "second", ""), parts, strict=True):
        name = f"replay.hits.after_kill{name and '.'}{name}"
        results.append(Result(f"{name}.tokens", delivered, "tokens"))
        results.append(Result(f"{name}.bound", bound, "tokens"))
        if bound:
            results.append(Result(name, delivered / bound, "1", f"{name}.bound", delivered / bound))
    return results


def after_kill(
    records: Sequence[StepRecord], bounds: Sequence[Bound], killed_s: float
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Delivered tokens and their bound, of each trace's first step that was sent after the kill, of its second, and of
    all later ones. Failed steps delivered nothing. ``records`` in the order in which they were sent. Pure."""
    seen: Counter[str] = Counter()
    delivered, bound = [0, 0, 0], [0, 0, 0]
    for record, limit in zip(records, bounds, strict=True):
        if record.sent_s < killed_s:
            continue
        place = min(seen[record.trace], BACK_WITHIN)
        seen[record.trace] += 1
        delivered[place] += record.cached_tokens or 0 if record.error is None else 0
        bound[place] += limit.shared
    return (delivered[0], bound[0]), (delivered[1], bound[1]), (delivered[2], bound[2])


def mooncake_results(traces: Sequence[Trace], config: dict[str, Any], console: Console, *, quick: bool) -> list[Result]:
    """Replay requests without sessions, by cost with the store and bound to workers without."""
    part = whole_groups(traces, QUICK_ONE_IN if quick else ONE_IN, GROUPS_SEED)
    chosen = choose([shrink(trace, SHRINK) for trace in part], REQUESTS, seed=1)
    pacing = QUICK_PACING if quick else REQUESTS_PACING
    config["mooncake"] = {
        "lengths_divided_by": SHRINK,
        "groups_one_in": QUICK_ONE_IN if quick else ONE_IN,
        "requests": len(chosen),
        "prompt_tokens": sum(trace.prompt_tokens for trace in chosen),
        "kv_tokens": REQUESTS_KV_TOKENS,
        "pacing": msgspec.to_builtins(pacing),
    }
    name = "replay.hits.mooncake"
    results: list[Result] = []
    for kind, dispatch in (
        ("", DispatchConfig()),
        (".sticky", DispatchConfig(policy="sticky", use_store=False)),
    ):
        with fleet(cluster_of(REQUESTS_KV_TOKENS, dispatch), console) as running:
            outcome = replayed(running, chosen, pacing, console)
        found = outcome.hits
        assert found is not None
        errors = sum(record.error is not None for record in outcome.records)
        shared = f"{name}.shared{kind}"
        results += [
            Result(shared, found.shared, "1"),
            Result(f"{name}{kind}", found.delivered, "1", shared, found.delivered / found.shared),
            Result(f"{name}.short{kind}", 100 * (found.shared - found.delivered), "points"),
            Result(f"{name}.errors{kind}", errors, "1"),
            Result(f"{name}.steps_per_h{kind}", 3600 * (len(outcome.records) - errors) / outcome.wall_s, "1/h"),
        ]
    return results


class _Killer:
    """Kills a worker in the middle of a replay, the way nobody can prepare for."""

    def __init__(self, running: Fleet, console: Console) -> None:
        self._running = running
        self._console = console
        self.killed_s: float | None = None

    def __call__(self, progress: Progress) -> None:
        if self.killed_s is None and len(progress.records) >= KILLED_AT * progress.steps:
            os.kill(self._running.pids()[KILLED], signal.SIGKILL)
            self.killed_s = progress.elapsed_s
            self._console.print(f"killed {KILLED} with {progress.running} steps under way", highlight=False)


def cluster_of(kv_tokens: int, dispatch: DispatchConfig) -> ClusterConfig:
    """One prefill and two decode workers with that much memory each, and a store that holds everything."""
    return ClusterConfig(
        port=free_port(),
        nodes=NodeCounts(prefill=1, decode=2, store=1),
        kv_tokens=-(-kv_tokens // 32) * 32,
        store_bytes=STORE_BYTES,
        dispatch=dispatch,
        worker=WorkerConfig(use_store=dispatch.use_store),
    )


def replayed(
    running: Fleet, traces: Sequence[Trace], pacing: Pacing, console: Console, also: Observe | None = None
) -> Outcome:
    """A replay that shows how far it is; ``also`` observes it, too."""
    with shown(console) as show:

        def observe(progress: Progress) -> None:
            show(progress)
            if also is not None:
                also(progress)

        return asyncio.run(replay(traces, pacing, Target(running.url), observe))

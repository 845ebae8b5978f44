"""``ablation.*``: what each mechanism of retention gives, by what is lost without it.

The same recorded agents on fresh clusters whose workers hold a quarter of their contexts and whose store has half of
them in memory and all on disk: with everything, and with each mechanism switched off in turn, each round beginning with
another. ``ablation.steps.keep`` is steps per hour with everything, divided by those without ``keep``; above 1 it helps.
``ablation.ttft.keep`` is the same of the mean time to first token: below 1 it helps.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import msgspec
from rich.console import Console

from bench.fleet import fleet
from bench.replay.choose import Limits, choose
from bench.replay.recording import Trace
from bench.replay.run import Outcome
from bench.replay.schedule import Pacing
from bench.report import Result
from bench.traces_hits import cluster_of, replayed
from router.dispatch import DispatchConfig
from router.policy.retention import RetentionConfig

LIMITS = Limits(traces_max=8, skip_steps=2, steps_min=5, steps_max=5, context_min=1500, context_max=3200, output_max=16)
QUICK_LIMITS = msgspec.structs.replace(LIMITS, traces_max=6, steps_min=3, steps_max=3)
PACING = Pacing(concurrency=8, time_scale=12.0, gap_max_s=3.0, stagger_s=0.5)
WORKER_SHARE, STORE_SHARE = 4, 2
TOKEN_BYTES = 23_040
DISK_BYTES = 2 << 30
VARIANTS = {
    "all": RetentionConfig(),
    "keep": RetentionConfig(keep=False),
    "pins": RetentionConfig(pins=False),
    "recall": RetentionConfig(recall=False),
}


def ablation_results(
    traces: Sequence[Trace], rounds: int, config: dict[str, Any], console: Console, *, quick: bool
) -> list[Result]:
    """All variants in turn."""
    chosen = choose(traces, QUICK_LIMITS if quick else LIMITS, seed=1)
    need = sum(max(step.prompt.tokens + step.output_tokens for step in trace.steps) for trace in chosen)
    longest = max(step.prompt.tokens + step.output_tokens for trace in chosen for _, step in trace.walk())
    kv_tokens, store_bytes = max(need // (2 * WORKER_SHARE), longest + 320), need * TOKEN_BYTES // STORE_SHARE
    config["ablation"] = {"traces": len(chosen), "contexts_tokens": need, "kv_tokens": kv_tokens}
    config["ablation"] |= {"store_bytes": store_bytes, "pacing": msgspec.to_builtins(PACING)}
    runs: dict[str, list[Outcome]] = {name: [] for name in VARIANTS}
    names = list(VARIANTS)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shape = cluster_of(kv_tokens, DispatchConfig(retention=VARIANTS[name]))
            shape = msgspec.structs.replace(shape, store_bytes=store_bytes, disk_bytes=DISK_BYTES)
            console.print(f"round {number + 1}, {'all' if name == 'all' else f'without {name}'}", highlight=False)
            with fleet(shape, console) as running:
                runs[name].append(replayed(running, chosen, PACING, console))
    results: list[Result] = []
    rates = {name: 3600 * _good(of) / sum(run.wall_s for run in of) for name, of in runs.items()}
    first_s = {name: mean(_firsts(of)) for name, of in runs.items()}
    for name, of in runs.items():
        suffix = "" if name == "all" else f".without_{name}"
        hits = [run.hits.delivered for run in of if run.hits is not None]
        results += [
            Result(f"ablation.steps_per_h{suffix}", rates[name], "1/h"),
            Result(f"ablation.ttft_s{suffix}", first_s[name], "s"),
            Result(f"ablation.hits{suffix}", mean(hits), "1"),
        ]
    for name in names[1:]:
        steps, ttft = rates["all"] / rates[name], first_s["all"] / first_s[name]
        results.append(Result(f"ablation.steps.{name}", steps, "1", f"ablation.steps_per_h.without_{name}", steps))
        results.append(Result(f"ablation.ttft.{name}", ttft, "1", f"ablation.ttft_s.without_{name}", ttft))
    return results


def _good(runs: Sequence[Outcome]) -> int:
    return sum(record.error is None for run in runs for record in run.records)


def _firsts(runs: Sequence[Outcome]) -> list[float]:
    """Times to first token, those of each trace's first step left out: nothing could be kept for it."""
    return [r.ttft_s for run in runs for r in run.records if r.ttft_s is not None and r.index > 0]

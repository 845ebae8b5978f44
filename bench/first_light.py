"""Time to first token where a trace's context is: nowhere, on the worker, in the store; and what idling costs.

Before that, the time that ``up`` takes with one worker of each kind: on an installation whose caches are empty but for
the model's file, and again.

Each trace runs four steps: cold; warm, on the same decode worker; pulled, on another one; and restarted, after every
worker but the store started anew. Each after the first adds what the model said and 64 new tokens.
"""

import asyncio
import os
import random
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from bench.common.fleet import Fleet, Step, fleet
from bench.common.report import Result, finish
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import down, free_port, up
from cluster.rundir import RunDir
from tracehaul.model.source import resolve
from tracehaul.runtime import clock

SIZES = {"2k": 2048, "4k": 4096, "7k": 7168}
NEW_TOKENS = 64
OUTPUT_TOKENS = 8
VOCABULARY = 40_000
"""Prompts are random ids below it: KV does not care about sense."""
IDLE_S = 20.0
KINDS = ("cold", "warm", "pulled", "restarted")
WORKERS = ("prefill-0", "decode-0", "decode-1")

console = Console()


@contextmanager
def empty_cache() -> Generator[None]:
    """Processes started meanwhile find a cache folder with nothing in it but the default model's file."""
    model = resolve().path
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="tracehaul-bench-") as folder:
        models = Path(folder) / "tracehaul" / "models"
        models.mkdir(parents=True)
        (models / model.name).symlink_to(model)
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def start_s(config: ClusterConfig) -> float:
    """From ``up`` to ready; what was started is stopped again."""
    with tempfile.TemporaryDirectory(prefix="tracehaul-bench-") as folder:
        run = RunDir(Path(folder))
        began_s = clock.perf_s()
        up(config, run, console)
        took_s = clock.perf_s() - began_s
        down(run)
        return took_s


def starts(config: ClusterConfig, repeats: int) -> list[Result]:
    """The first start of an installation, and the median of those after it."""
    with empty_cache():
        first_s = start_s(config)
        second_s = median(start_s(config) for _ in range(repeats))
    return [
        Result("start.first", first_s, "s"),
        Result("start.second", second_s, "s", "start.first", second_s / first_s),
    ]


class Trace:
    """One growing conversation."""

    def __init__(self, name: str, size: int, seed: int) -> None:
        self.name = name
        self._random = random.Random(seed)
        self.prompt = self._tokens(size)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(1000, VOCABULARY) for _ in range(count)]

    def step(self, cluster: Fleet, decode: str) -> Step:
        """Run the next step there; the prompt after it is longer."""
        step = cluster.step(self.name, self.prompt, OUTPUT_TOKENS, decode, ignore_eos=True)
        self.prompt = self.prompt + step.tokens + self._tokens(NEW_TOKENS)
        return step


def measure(cluster: Fleet, repeats: int) -> dict[tuple[str, str], list[Step]]:
    """Steps by kind and size."""
    steps: dict[tuple[str, str], list[Step]] = {(kind, size): [] for kind in KINDS for size in SIZES}
    with Progress(console=console) as progress:
        task = progress.add_task("steps", total=repeats * len(SIZES) * len(KINDS))
        Trace("warm-up", 600, 0).step(cluster, "decode-0")
        Trace("warm-up-2", 600, 0).step(cluster, "decode-1")
        for repeat in range(repeats):
            traces = {size: Trace(f"{size}-{repeat}", SIZES[size], repeat * 10 + i) for i, size in enumerate(SIZES)}
            for size, trace in traces.items():
                for kind, decode in (("cold", "decode-0"), ("warm", "decode-0"), ("pulled", "decode-1")):
                    steps[kind, size].append(trace.step(cluster, decode))
                    progress.advance(task)
            cluster.restart(WORKERS)
            for size, trace in traces.items():
                steps["restarted", size].append(trace.step(cluster, "decode-0"))
                progress.advance(task)
    return steps


def idle(cluster: Fleet, seconds: float) -> float:
    """Percent of one core that the whole cluster uses with nothing to do."""
    asyncio.run(asyncio.sleep(2.0))
    before_s = cluster.cpu_s()
    with console.status(f"idling for {seconds:.0f} s"):
        asyncio.run(asyncio.sleep(seconds))
    return 100 * (cluster.cpu_s() - before_s) / seconds


def results_of(steps: dict[tuple[str, str], list[Step]]) -> list[Result]:
    """Medians, each against the cold step of its size."""
    results: list[Result] = []
    for size in SIZES:
        cold_s = median(step.ttft_s for step in steps["cold", size])
        for kind in KINDS:
            ttft_s = median(step.ttft_s for step in steps[kind, size])
            versus = None if kind == "cold" else f"ttft.cold.{size}"
            ratio = None if kind == "cold" else ttft_s / cold_s
            results.append(Result(f"ttft.{kind}.{size}", ttft_s, "s", versus, ratio))
        for kind in ("pulled", "restarted"):
            moved = [step.moved for step in steps[kind, size]]
            nbytes = median(m["pulled_bytes"] for m in moved)
            rate = median(m["pulled_bytes"] / max(m["pull_s"], 1e-9) / 1e9 for m in moved)
            results.append(Result(f"pull.bytes.{kind}.{size}", nbytes, "B"))
            results.append(Result(f"pull.rate.{kind}.{size}", rate, "GB/s"))
        for kind in KINDS[1:]:
            computed = median(s.usage["prompt_tokens"] - s.cached_tokens for s in steps[kind, size])
            results.append(Result(f"computed.{kind}.{size}", computed, "tokens"))
    return results


def main(
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    quick: Annotated[bool, typer.Option(help="One repeat instead of three, idle for 5 s.")] = False,
    transport: Annotated[str, typer.Option(help="shm or nixl.")] = "shm",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Measure a cluster of one router, one store node, one prefill and two decode workers on this machine."""
    settings: dict[str, Any] = {"transport": transport, "dtype": dtype, "port": free_port()}
    config = msgspec.convert(
        msgspec.to_builtins(ClusterConfig(nodes=NodeCounts(prefill=1, decode=2, store=1))) | settings, ClusterConfig
    )
    pair = msgspec.structs.replace(config, nodes=NodeCounts(prefill=1, decode=1, store=1))
    results = starts(pair, 1 if quick else 3)
    with fleet(config, console) as cluster:
        steps = measure(cluster, 1 if quick else 3)
        idle_percent = idle(cluster, IDLE_S / 4 if quick else IDLE_S)
        rss_mib = cluster.rss_mib()
    results += results_of(steps)
    results.append(Result("idle.cpu", idle_percent, "% of a core"))
    results.append(Result("idle.rss", sum(rss_mib.values()), "MiB"))
    results += [Result(f"idle.rss.{name}", value, "MiB") for name, value in rss_mib.items()]
    recorded = msgspec.to_builtins(config) | {"new_tokens": NEW_TOKENS, "output_tokens": OUTPUT_TOKENS}
    finish(recorded, results, json, console)


if __name__ == "__main__":
    typer.run(main)

"""Our engine against vLLM on the same weights, cores and requests: SmolLM2-135M in bfloat16, two threads each.

Both engines are alive in processes of their own and take turns, measurement by measurement; each reports what it used
while the other was measured. Contexts that decoding starts from are not computed but put there, on both sides.
Ratios are our speed divided by vLLM's, medians over rounds in which both were measured: more is better.
"""

import os
import random
import shutil
import subprocess
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from statistics import geometric_mean, median
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress

from bench.common.processes import Place, Process, running
from bench.common.report import Result, finish
from bench.engine.avx2 import SWITCHED_OFF, avx2
from bench.engine.handoff import handoff
from bench.engine.model import hub_folder
from tracehaul.model.source import DEFAULT_MODEL, default_cache_dir
from tracehaul.runtime import clock

THREADS = 2
KV_TOKENS = 65_536
"""Of each engine: the largest batch of contexts and its output."""
TOKEN_BYTES = 23_040
"""Of KV in this model, in bfloat16."""
PREFILL = (512, 2048, 4096, 7168)
EXTEND = {"2k": 2048, "7k": 7168}
EXTEND_TOKENS = 64
DECODE = {
    "b1.1k": [1024],
    "b1.6k": [6144],
    "b4.2k": [2048] * 4,
    "b16.2k": [2048] * 16,
    "b8.6k": [6144] * 8,
    "ragged": [256 + 448 * i + i % 2 * 32 for i in range(16)],
}
INT8_DECODE = ("decode.b1.1k", "decode.b4.2k", "decode.b16.2k")
STRUCTURED = [1024] * 16
QUICK_LEAVES_OUT = {"engine.prefill.4096", "engine.decode.b1.6k", "engine.decode.b8.6k"}
WARM_UP_ITERATIONS = 2
WARM_UP_TOKENS_MAX = 2048
VOCABULARY = 40_000
"""Prompts are random ids below it."""
REQUESTS = 64
REQUESTS_QUICK = 16
PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
ARRIVALS_PER_S = 8.0
"""More than either engine serves on two cores: what counts is how much gets done."""
SEED = 20_260_101
AGREEMENT_TOKENS = 32
PEER = Path(__file__).parents[2] / ".peers/vllm/bin/python"
OURS, THEIRS = "engine", "vllm"

console = Console()


class Part(StrEnum):
    """What can be measured alone."""

    PREFILL = "prefill"
    DECODE = "decode"
    STRUCTURED = "structured"
    THROUGHPUT = "throughput"
    HANDOFF = "handoff"
    INT8 = "int8"
    AVX2 = "avx2"


class Task(NamedTuple):
    """One thing to measure on each engine."""

    name: str
    command: dict[str, Any]
    tokens: int
    """That it computes or samples."""
    milliseconds: bool = False
    """The value is how long it took, not tokens per second."""


def _random_tokens(count: int, source: random.Random) -> list[int]:
    return [source.randrange(1000, VOCABULARY) for _ in range(count)]


def prefill_tasks() -> list[Task]:
    """Whole prompts, and some more tokens after a context."""
    source = random.Random(SEED)
    tasks = [
        Task(f"prefill.{size}", {"do": "prefill", "tokens": _random_tokens(size, source), "held": 0}, size)
        for size in PREFILL
    ]
    new = _random_tokens(EXTEND_TOKENS, source)
    return tasks + [
        Task(f"extend.{name}", {"do": "prefill", "tokens": new, "held": held}, EXTEND_TOKENS, milliseconds=True)
        for name, held in EXTEND.items()
    ]


def decode_tasks(iterations: int) -> list[Task]:
    """Batches of sequences, a token each per iteration."""
    return [
        Task(
            f"decode.{name}",
            {"do": "decode", "contexts": contexts, "iterations": iterations, "warm_up": WARM_UP_ITERATIONS},
            len(contexts) * iterations,
        )
        for name, contexts in DECODE.items()
    ]


def throughput_task(count: int) -> Task:
    """Requests that arrive at random, of lengths around the two means."""
    source = random.Random(SEED)
    requests: list[tuple[float, list[int], int]] = []
    arrival_s = 0.0
    for _ in range(count):
        prompt = _random_tokens(source.randint(PROMPT_TOKENS // 2, PROMPT_TOKENS * 3 // 2), source)
        requests.append((arrival_s, prompt, source.randint(OUTPUT_TOKENS // 2, OUTPUT_TOKENS * 3 // 2)))
        arrival_s += source.expovariate(ARRIVALS_PER_S)
    return Task("throughput", {"do": "serve", "requests": requests}, sum(outputs for _, _, outputs in requests))


class Engines:
    """The processes that are measured, and what each used of the processor while another was."""

    def __init__(self, processes: dict[str, Process]) -> None:
        self._processes = processes
        self._idle_s = dict.fromkeys(processes, 0.0)
        self._idle_cpu_s = dict.fromkeys(processes, 0.0)

    def measure(self, task: Task, rounds: int, warm_up: int, progress: Progress) -> list[Result]:
        """Rounds of one task, the engines in turns and in turns the first; those of the warm-up are not counted."""
        took_s: dict[str, list[float]] = {name: [] for name in self._processes}
        bar = progress.add_task(task.name, total=(warm_up + rounds) * len(self._processes))
        for turn in range(warm_up + rounds):
            for name in list(self._processes)[:: 1 if turn % 2 else -1]:
                seconds = self._one(name, task)
                if turn >= warm_up:
                    took_s[name].append(seconds)
                progress.advance(bar)
        results = _results(task, took_s)
        for result in results:  # a long run that is cut short has told what it had
            console.print(f"{result.name}: {result.value:.4g} {result.unit}", highlight=False)
        return results

    def structured(self, iterations: int, rounds: int, progress: Progress) -> list[Result]:
        """What it costs our engine to hold the answers of a batch to a JSON schema: the same batch with and without."""
        took_s: dict[bool, list[float]] = {False: [], True: []}
        command = {"do": "decode", "contexts": STRUCTURED, "iterations": iterations, "warm_up": WARM_UP_ITERATIONS}
        bar = progress.add_task("structured", total=2 * rounds)
        for turn in range(rounds):
            for held in (False, True) if turn % 2 else (True, False):
                took_s[held].append(self._one(OURS, Task("structured", command | {"structured": held}, 0)))
                progress.advance(bar)
        ratio = median(free / held for free, held in zip(took_s[False], took_s[True], strict=True))
        tokens = len(STRUCTURED) * iterations
        return [Result("engine.structured", tokens / median(took_s[True]), "tokens/s", "unconstrained", ratio)]

    def _one(self, name: str, task: Task) -> float:
        idle = [other for other in self._processes if other != name]
        before = {other: self.usage(other)["cpu_s"] for other in idle}
        began_s = clock.perf_s()
        seconds: float = self._processes[name].ask(**task.command)["seconds"]
        for other in idle:
            self._idle_s[other] += clock.perf_s() - began_s
            self._idle_cpu_s[other] += self.usage(other)["cpu_s"] - before[other]
        return seconds

    def usage(self, name: str) -> dict[str, Any]:
        """CPU seconds and resident bytes of one of them."""
        return self._processes[name].ask(do="usage")

    def idle_results(self) -> list[Result]:
        """What each used while another was measured: should it be much, the ratios say little."""
        return [
            Result(f"{name}.idle.cpu", 100 * self._idle_cpu_s[name] / seconds, "% of a core")
            for name, seconds in self._idle_s.items()
            if seconds
        ]

    def agreement(self) -> list[Result]:
        """How many greedy tokens both engines share: in bfloat16 they may part at a near tie, not at once."""
        if len(self._processes) < 2:
            return []
        prompt = _random_tokens(64, random.Random(SEED))
        told = [p.ask(do="greedy", tokens=prompt, outputs=AGREEMENT_TOKENS)["tokens"] for p in self._processes.values()]
        shared = next((i for i, pair in enumerate(zip(*told, strict=True)) if len(set(pair)) > 1), AGREEMENT_TOKENS)
        if shared == 0:
            raise RuntimeError("the engines do not agree on a single token: they do not run the same model")
        return [Result("engine.agreement", shared, f"of {AGREEMENT_TOKENS} tokens")]


def _results(task: Task, took_s: dict[str, list[float]]) -> list[Result]:
    unit = "ms" if task.milliseconds else "tokens/s"

    def value(seconds: list[float]) -> float:
        return 1000 * median(seconds) if task.milliseconds else task.tokens / median(seconds)

    ours, *others = took_s
    if not others:
        return [Result(f"{ours}.{task.name}", value(took_s[ours]), unit)]
    theirs = others[0]
    ratio = median(slow / fast for fast, slow in zip(took_s[ours], took_s[theirs], strict=True))
    return [
        Result(f"{ours}.{task.name}", value(took_s[ours]), unit, theirs, ratio),
        Result(f"{theirs}.{task.name}", value(took_s[theirs]), unit),
    ]


def mean(results: list[Result], prefix: str) -> list[Result]:
    """The geometric mean of the ratios under a prefix."""
    ratios = [r.ratio for r in results if r.name.startswith(prefix) and r.ratio is not None]
    return [Result(f"{prefix}mean", geometric_mean(ratios), "ratio", THEIRS, geometric_mean(ratios))] if ratios else []


def vllm_place(python: Path) -> Place:
    """As vLLM starts its own workers: bound to the cores, with Intel's OpenMP, whose threads sleep after 5 ms."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:THREADS])
    openmp = python.parent.parent / "lib/libiomp5.so"
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CACHE_ROOT": str(default_cache_dir().parent / "vllm"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(THREADS),
        "LD_PRELOAD": str(openmp) if openmp.is_file() else "",
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
    }
    return Place("127.0.0.1", (), environment)


def vllm_mode(quick: bool) -> str:
    """vLLM compiles the model unless told otherwise. It is then some ten percent faster, and starts a minute later."""
    return "eager" if quick or shutil.which("g++") is None else "compiled"


def _has_vllm(python: Path | None) -> bool:
    if python is None:
        return False
    done = subprocess.run([str(python), "-c", "import vllm"], check=False, capture_output=True)
    if done.returncode:
        raise typer.BadParameter(f"{python} cannot import vllm")
    return True


def start(python: Path | None, quick: bool, stack: ExitStack) -> tuple[Engines, list[Result]]:
    """Start the engines, one after the other, and how long it took each until it would have served."""
    has_vllm = _has_vllm(python)
    model = hub_folder()
    processes: dict[str, Process] = {}
    took_s: dict[str, float] = {}

    def begin(name: str, place: Place, *words: str, **how: str) -> None:
        began_s = clock.perf_s()
        with console.status(f"starting {name}"):
            processes[name] = Process(place, *words, **how)
            stack.enter_context(running(processes[name]))
            processes[name].hear()
        took_s[name] = clock.perf_s() - began_s

    begin(OURS, Place("127.0.0.1"), DEFAULT_MODEL, str(KV_TOKENS), str(THREADS), module="bench.engine.process")
    if has_vllm:
        words = [str(model), str(KV_TOKENS), str(TOKEN_BYTES), vllm_mode(quick)]
        begin(THEIRS, vllm_place(python or PEER), *words, module="bench.peers.baselines_vllm", python=str(python))
    results = [Result(f"{name}.start", seconds, "s") for name, seconds in took_s.items()]
    if has_vllm:
        results[0] = Result("engine.start", took_s[OURS], "s", THEIRS, took_s[THEIRS] / took_s[OURS])
    return Engines(processes), results


def start_avx2(python: Path | None, stack: ExitStack) -> Process | None:
    """vLLM with its kernels for AVX2, where it is installed."""
    if not _has_vllm(python):
        return None
    words = [str(hub_folder()), str(KV_TOKENS), str(TOKEN_BYTES), "avx2"]
    place = vllm_place(python or PEER)
    place = Place(place.host, place.command, {**place.environment, **SWITCHED_OFF})
    process = Process(place, *words, module="bench.peers.baselines_vllm", python=str(python))
    stack.enter_context(running(process))
    with console.status("starting vLLM without AVX-512"):
        process.hear()
    return process


def int8(quick: bool) -> list[Result]:
    """Our engine with its weights in int8, beside itself with them in bfloat16."""
    rounds, iterations = (2, 8) if quick else (3, 16)
    processes: dict[str, Process] = {}
    with ExitStack() as stack:
        for name, words in ((f"{OURS}.int8", ["int8"]), (f"{OURS}.bfloat16", [])):
            place, words = Place("127.0.0.1"), [DEFAULT_MODEL, str(KV_TOKENS), str(THREADS), *words]
            with console.status(f"starting {name}"):
                processes[name] = Process(place, *words, module="bench.engine.process")
                stack.enter_context(running(processes[name]))
                processes[name].hear()
        engines = Engines(processes)
        progress = stack.enter_context(Progress(console=console))
        results: list[Result] = []
        for task in prefill_tasks()[:2] + [t for t in decode_tasks(iterations) if t.name in INT8_DECODE]:
            results += engines.measure(task, rounds, 1, progress)
        resident = [engines.usage(name)["rss"] / 1e6 for name in processes]
        return [*results, Result(f"{OURS}.int8.rss", resident[0], "MB", f"{OURS}.bfloat16", resident[0] / resident[1])]


def memory(engines: Engines) -> list[Result]:
    """Resident memory at the end against weights and KV memory."""
    weights = (hub_folder() / "model.safetensors").stat().st_size
    kept = (weights + KV_TOKENS * TOKEN_BYTES) / 1e6
    resident = engines.usage(OURS)["rss"] / 1e6
    return [
        Result("engine.rss", resident, "MB", "weights and KV memory", resident / kept),
        Result("engine.rss.over", resident - kept, "MB"),
    ]


def compare(only: Part | None, quick: bool, python: Path | None) -> list[Result]:
    """All that is measured on the engines alone."""
    rounds, iterations = (2, 8) if quick else (3, 16)
    with ExitStack() as stack:
        engines, results = start(python, quick, stack)
        progress = stack.enter_context(Progress(console=console))
        tasks: list[Task] = []
        if only in (None, Part.PREFILL):
            tasks += prefill_tasks()
        if only in (None, Part.DECODE):
            tasks += decode_tasks(iterations)
        for task in tasks:
            if not (quick and f"{OURS}.{task.name}" in QUICK_LEAVES_OUT):
                # A long prompt is computed in chunks of the shapes that shorter ones have had.
                warm_up = 0 if quick or task.tokens > WARM_UP_TOKENS_MAX else 1
                results += engines.measure(task, rounds, warm_up, progress)
        if only in (None, Part.STRUCTURED):
            results += engines.structured(8 if quick else 24, 2 * rounds + 1, progress)
        results += mean(results, "engine.prefill.") + mean(results, "engine.decode.")
        if only in (None, Part.THROUGHPUT):
            results += engines.measure(throughput_task(REQUESTS_QUICK if quick else REQUESTS), 1, 0, progress)
        return results + engines.agreement() + engines.idle_results() + memory(engines)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Plot the ratios there.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer rounds, sizes and requests.")] = False,
    only: Annotated[Part | None, typer.Option(help="Measure just that.")] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(help="An interpreter that has vLLM; by default the one that ./scripts/peers installs."),
    ] = None,
) -> None:
    """Measure the torch engine on this machine, beside vLLM where there is one."""
    if vllm is None and PEER.exists():
        vllm = PEER
    config: dict[str, Any] = {
        "model": DEFAULT_MODEL,
        "dtype": "bfloat16",
        "threads": THREADS,
        "kv_tokens": KV_TOKENS,
        "decode": DECODE,
        "seed": SEED,
        "quick": quick,
        "vllm": None if vllm is None else vllm_mode(quick),
        # On a busy machine the two threads of an iteration wait for each other.
        "load_before": os.getloadavg()[0],
    }
    if vllm is None:
        console.print("vLLM is left out: ./scripts/peers vllm installs it")
    results: list[Result] = []
    if only not in (Part.HANDOFF, Part.INT8, Part.AVX2):
        results += compare(only, quick, vllm)
    if only in (None, Part.INT8):
        results += int8(quick)
    if only in (None, Part.AVX2):
        with ExitStack() as stack:
            results += avx2(quick, console, start_avx2(vllm, stack))
    if only in (None, Part.HANDOFF):
        results += handoff(quick, console)
    finish(config, results, json, console)
    if png is not None:
        from bench.engine.plot import plot  # needs the extra "bench"

        plot(results, png)
        console.print(f"plotted to {png}")


if __name__ == "__main__":
    typer.run(main)

"""Our engine as on a host without AVX-512, beside what torch and the memory allow there.

In one process, to which AVX-512 is switched off, by turns: prompts; torch's float32 products of the same matrices with
as many rows (what else a prompt needs, attention above all, is not counted there); decode steps; and a reading of
memory. Ratios are medians over rounds, by the clock and by processor seconds, which say more on a shared machine. Where
vLLM is installed it takes its turns in a process of its own, with its kernels for AVX2.
"""

import asyncio
import os
import random
import sys
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import uvloop
from rich.console import Console
from rich.progress import Progress

from bench.common.lines import cpu_s, listen, say
from bench.common.processes import Place, Process, running
from bench.common.report import Result
from tracehaul.engine.base import SequenceId, Work
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.model.model_config import ModelConfig
from tracehaul.model.source import DEFAULT_MODEL, read_config, resolve
from tracehaul.runtime import clock
from tracehaul.wire.steps import Sampling
from worker.config import WorkerConfig

SWITCHED_OFF = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
THREADS = 2
PROMPTS = (512, 2048)
CONTEXT = 1024
STEPS = 8
"""Decode steps of one measurement."""
READ_BYTES = 256 << 20
"""More than caches hold."""
TOKENS_BELOW = 40_000
SEED = 20_260_101


class Took(NamedTuple):
    """One measurement."""

    seconds: float
    cpu_s: float


def matrices(shape: ModelConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's matrices."""
    width = shape.heads * shape.head_dim
    return [
        (width + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        (shape.hidden, width),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    ]


def step_bytes(shape: ModelConfig, context: int, token_bytes: int) -> int:
    """What a decode step reads: matrices in bfloat16, the output layer among them, and the context's KV."""
    numbers = shape.layers * sum(outputs * inputs for outputs, inputs in matrices(shape))
    return 2 * (numbers + shape.vocab_size * shape.hidden) + context * token_bytes


class Driver:
    """The process that is measured."""

    def __init__(self, engine: TorchEngine, shape: ModelConfig) -> None:
        self._engine = engine
        self._chunk = WorkerConfig().chunk_tokens
        self._weights = [torch.randn(size) for _ in range(shape.layers) for size in matrices(shape)]
        self._rows = {inputs: torch.randn(self._chunk, inputs) for _, inputs in matrices(shape)}
        self._memory = torch.ones(READ_BYTES // 4)

    async def do(self, command: dict[str, Any]) -> list[float]:
        """Carry out one command; how long it took."""
        match command.pop("do"):
            case "prefill":
                return list(await self.prefill(**command))
            case "decode":
                return list(await self.decode(**command))
            case "multiply":
                return list(await asyncio.to_thread(self.multiply, **command))
            case "read":
                return list(await asyncio.to_thread(_timed, self._memory.max))
            case name:
                raise AssertionError(name)

    def multiply(self, tokens: int) -> Took:
        """Torch's float32 products of so many rows with every layer's matrices, in a worker's chunks."""
        chunks = [min(self._chunk, tokens - at) for at in range(0, tokens, self._chunk)]

        def all_of_them() -> None:
            for rows in chunks:
                for weights in self._weights:
                    torch.nn.functional.linear(self._rows[weights.shape[1]][:rows], weights)

        return _timed(all_of_them)

    async def prefill(self, tokens: int) -> Took:
        """A prompt in a worker's chunks, until its token."""
        source = random.Random(SEED)
        prompt = [source.randrange(TOKENS_BELOW) for _ in range(tokens)]
        sequence = self._open(tokens)
        began = _now()
        for at in range(0, tokens, self._chunk):
            last = at + self._chunk >= tokens
            await self._engine.run([self._work(sequence, prompt[at : at + self._chunk], last)])
        took = _since(began)
        self._engine.close(sequence)
        return took

    async def decode(self, context: int, steps: int) -> Took:
        """Steps of one sequence."""
        sequence = self._open(context + steps)
        block = memoryview(bytes(self._engine.info.layout.block_bytes))
        await self._engine.unpack(sequence, 0, context, [block] * (context // self._engine.info.layout.block_tokens))
        began = _now()
        for _ in range(steps):
            await self._engine.run([self._work(sequence, [17], True)])
        took = _since(began)
        self._engine.close(sequence)
        return took

    def _open(self, tokens: int) -> SequenceId:
        sequence = self._engine.open(tokens)
        assert sequence is not None
        return sequence

    @staticmethod
    def _work(sequence: SequenceId, tokens: list[int], sampled: bool) -> Work:
        return Work(sequence, tokens, Sampling(max_tokens=1, temperature=0.0) if sampled else None)


def _now() -> Took:
    return Took(clock.perf_s(), cpu_s())


def _since(began: Took) -> Took:
    return Took(clock.perf_s() - began.seconds, cpu_s() - began.cpu_s)


def _timed(do: Callable[[], object]) -> Took:
    began = _now()
    with torch.inference_mode():
        do()
    return _since(began)


def avx2(quick: bool, console: Console, vllm: Process | None) -> list[Result]:
    """Both shares, and whether the kernels' bars are reached: ``engine.avx2.prefill``, ``engine.avx2.decode``.

    ``vllm``: a process of ``bench.peers.baselines_vllm`` that has no AVX-512 either, whose tasks are measured too.
    """
    commands: dict[str, dict[str, Any]] = {}
    for tokens in PROMPTS:
        commands |= {f"prefill.{tokens}": {"do": "prefill", "tokens": tokens}}
        commands |= {f"multiply.{tokens}": {"do": "multiply", "tokens": tokens}}
    commands |= {"decode": {"do": "decode", "context": CONTEXT, "steps": STEPS}, "read": {"do": "read"}}
    theirs: dict[str, dict[str, Any]] = {}
    if vllm is not None:
        theirs = {f"prefill.{tokens}": {"do": "prefill", "tokens": [17] * tokens, "held": 0} for tokens in PROMPTS}
        theirs["decode"] = {"do": "decode", "contexts": [CONTEXT], "iterations": STEPS, "warm_up": 1}
    took: dict[str, list[Took]] = {name: [] for name in commands}
    beside_s: dict[str, list[float]] = {name: [] for name in theirs}
    process = Process(Place("127.0.0.1", (), SWITCHED_OFF), module="bench.engine.avx2")
    with running(process), Progress(console=console) as progress:
        token_bytes = process.hear()["token_bytes"]
        rounds = 3 if quick else 9
        bar = progress.add_task("avx2", total=rounds + 1)
        for turn in range(rounds + 1):
            for name in list(commands)[:: 1 if turn % 2 else -1]:
                one = Took(*process.ask(**commands[name]))
                if turn:  # the first warms up
                    took[name].append(one)
                if vllm is not None and name in theirs:
                    one_s = vllm.ask(**theirs[name])["seconds"]
                    if turn:
                        beside_s[name].append(one_s)
            progress.advance(bar)
    return _results(took, token_bytes) + _beside(took, beside_s)


def _beside(took: dict[str, list[Took]], beside_s: dict[str, list[float]]) -> list[Result]:
    """Speeds as ratios to vLLM's."""
    return [
        Result(
            f"engine.avx2.vllm.{name}",
            (STEPS if name == "decode" else int(name.removeprefix("prefill.")))
            / median(one.seconds for one in took[name]),
            "tokens/s",
            "vllm",
            median(other / one.seconds for one, other in zip(took[name], others, strict=True)),
        )
        for name, others in beside_s.items()
    ]


def _results(took: dict[str, list[Took]], token_bytes: int) -> list[Result]:
    def ratio(ours: str, bound: str, times: float, which: int) -> float:
        return median(times * b[which] / o[which] for o, b in zip(took[ours], took[bound], strict=True))

    results: list[Result] = []
    for tokens in PROMPTS:
        name, bound = f"prefill.{tokens}", f"multiply.{tokens}"
        speed = tokens / median(one.seconds for one in took[name])
        for which, suffix in enumerate(("", ".cpu")):
            share = ratio(name, bound, 1.0, which)
            results.append(Result(f"engine.avx2.{name}{suffix}", speed, "tokens/s", "float32 products", share))
    shares = [(r.ratio, r.value) for r in results if r.ratio is not None]
    worst, speed = min(shares)
    results.append(Result("engine.avx2.prefill", speed, "tokens/s", "float32 products", worst))
    nbytes = STEPS * step_bytes(read_config(resolve()), CONTEXT, token_bytes)
    rate = nbytes / median(one.seconds for one in took["decode"]) / 1e9
    share = ratio("decode", "read", nbytes / READ_BYTES, 0)
    results.append(Result("engine.avx2.decode", rate, "GB/s", "memory read", share))
    results.append(Result("engine.avx2.read", READ_BYTES / median(one.seconds for one in took["read"]) / 1e9, "GB/s"))
    return results


async def main() -> None:
    """Load, then answer commands until the input ends."""
    config = TorchEngineConfig(model=DEFAULT_MODEL, device="cpu", threads=THREADS, kv_tokens_max=2 * max(PROMPTS))
    engine = await TorchEngine.load(config)
    driver = Driver(engine, read_config(resolve()))
    say({"token_bytes": engine.info.layout.token_bytes})
    await listen(driver.do)


if __name__ == "__main__":
    uvloop.run(main())
    sys.stdout.flush()
    os._exit(0)  # the parent wants nothing more

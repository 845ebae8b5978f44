"""Do the cluster's tokens equal those of one process without any store? Greedy, float32, real agent traces.

Each recorded trajectory is replayed step by step, cut where it outgrows the context: the prompt of a step is all that
was said before a recorded answer. Every other step runs on the other decode worker, so that contexts are warm, pulled
and extended in turn. The reference is one engine in this process, which keeps a trace's KV to itself.
"""

import asyncio
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from bench.common.fleet import fleet
from bench.common.recordings import Trajectory, trajectories
from bench.common.report import Result, finish
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from tracehaul.engine.base import SequenceId, Work
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.model.source import resolve
from tracehaul.model.text import Text
from tracehaul.wire.hashing import common_prefix, pack_tokens
from tracehaul.wire.steps import Sampling

CONTEXT_TOKENS = 8000
OUTPUT_TOKENS = 16
QUICK_TRACES = 2

console = Console()


class Prompt(msgspec.Struct, frozen=True):
    """One step to compare."""

    trace: str
    step: int
    tokens: list[int]


def prompts(recording: list[Trajectory], text: Text) -> list[Prompt]:
    """Every step that fits, trace by trace."""
    found: list[Prompt] = []
    for trajectory in recording:
        for at, message in enumerate(trajectory.messages):
            if message["role"] != "assistant":
                continue
            tokens = text.encode(text.render(trajectory.messages[:at]), special=True)
            if len(tokens) + OUTPUT_TOKENS > CONTEXT_TOKENS:
                break
            found.append(Prompt(trajectory.name, at, tokens))
    return found


def replay(config: ClusterConfig, steps: list[Prompt], progress: Progress) -> tuple[list[list[int]], dict[str, float]]:
    """The cluster's output for each step, and what it reused."""
    task = progress.add_task(f"cluster, {config.transport}", total=len(steps))
    outputs: list[list[int]] = []
    sums = {"prompt": 0.0, "cached": 0.0, "pulled": 0.0, "resident": 0.0}
    with fleet(config, console) as cluster:
        for index, prompt in enumerate(steps):
            step = cluster.step(prompt.trace, prompt.tokens, OUTPUT_TOKENS, f"decode-{index % 2}", ignore_eos=True)
            outputs.append(step.tokens)
            sums["prompt"] += len(prompt.tokens)
            sums["cached"] += step.cached_tokens
            sums["pulled"] += step.moved["pulled_tokens"]
            sums["resident"] += step.moved["resident_tokens"]
            progress.advance(task)
    return outputs, sums


async def reference(config: ClusterConfig, steps: list[Prompt], progress: Progress) -> list[list[int]]:
    """What one engine alone says. It keeps each trace's sequence and computes only what is new: no block ever moves."""
    task = progress.add_task("one process", total=len(steps))
    settings = TorchEngineConfig(model=config.model, dtype=config.dtype, device="cpu", kv_tokens_max=CONTEXT_TOKENS * 2)
    engine = await TorchEngine.load(settings)
    outputs: list[list[int]] = []
    for _, trace in groupby(steps, key=lambda prompt: prompt.trace):
        sequence = engine.open(CONTEXT_TOKENS)
        assert sequence is not None
        held: list[int] = []
        for prompt in trace:
            shared = common_prefix(pack_tokens(held), pack_tokens(prompt.tokens[:-1]))
            engine.truncate(sequence, min(shared, engine.length(sequence)))
            output = await generate(engine, sequence, prompt.tokens, config.worker.chunk_tokens)
            held = prompt.tokens + output
            outputs.append(output)
            progress.advance(task)
        engine.close(sequence)
    await engine.aclose()
    return outputs


async def generate(engine: TorchEngine, sequence: SequenceId, prompt: list[int], chunk: int) -> list[int]:
    """Compute what the sequence lacks of ``prompt``, in chunks, then the output, greedily."""
    sampling = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0)
    while len(prompt) - engine.length(sequence) > chunk:
        start = engine.length(sequence)
        await engine.run([Work(sequence, prompt[start : start + chunk])])
    output: list[int] = []
    pending = prompt[engine.length(sequence) :]
    while len(output) < OUTPUT_TOKENS:
        (result,) = await engine.run([Work(sequence, pending, sampling, len(output))])
        assert result.token is not None
        output.append(result.token)
        pending = [result.token]
    return output


def main(
    recordings: Annotated[Path, typer.Option(help="Folder or tar archive of mini-swe-agent trajectories.")],
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    quick: Annotated[bool, typer.Option(help="The first two traces only.")] = False,
    transport: Annotated[list[str] | None, typer.Option(help="shm, nixl; both if not given.")] = None,
) -> None:
    """Compare every output token; exits with 1 if any differs."""
    transports = transport or ["shm", "nixl"]
    configs = [_config(kind) for kind in transports]
    recording = trajectories(recordings)
    steps = prompts(recording[:QUICK_TRACES] if quick else recording, Text.load(resolve(configs[0].model)))
    results = [Result("equality.steps", len(steps), "steps")]
    worst = 0
    with Progress(console=console) as progress:
        alone = asyncio.run(reference(configs[0], steps, progress))
        for config in configs:
            kind = config.transport
            ours, reused = replay(config, steps, progress)
            differing = [step for step, mine, theirs in zip(steps, ours, alone, strict=True) if mine != theirs]
            for step in differing[:10]:
                console.print(f"{kind} differs: {step.trace}, message {step.step}, {len(step.tokens)} tokens")
            share = len(differing) / len(steps)
            results.append(Result(f"equality.differing.{kind}", len(differing), "steps", "equality.steps", share))
            results += [Result(f"equality.{name}_tokens.{kind}", count, "tokens") for name, count in reused.items()]
            worst = max(worst, len(differing))
    results.append(Result("equality.tokens", sum(len(output) for output in alone), "tokens"))
    finish(msgspec.to_builtins(configs[0]) | {"recordings": recordings.name}, results, json, console)
    raise typer.Exit(1 if worst else 0)


def _config(transport: str) -> ClusterConfig:
    settings: dict[str, Any] = {"transport": transport, "dtype": "float32", "port": free_port()}
    config = ClusterConfig(nodes=NodeCounts(prefill=1, decode=2, store=1))
    return msgspec.convert(msgspec.to_builtins(config) | settings, ClusterConfig)


if __name__ == "__main__":
    typer.run(main)

"""``python -m bench.agentx --recordings FILE``: the AgentX harness over our router, and over what stock stacks do.

One machine of simulated accelerators, real but for the computing, in four arrangements, one after the other in each
round: ours (one router over one store, steps in line), the same as it is by default, sticky sessions and cache-aware
routing (each worker with its own share of the store's memory). ``agentx.steps_per_h``: steps answered; ``agentx.ttft``:
to the first token, as the harness sees it; ``agentx.computed``: tokens of prompts that were not found in a cache, of
each step.
"""

import asyncio
import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from bench.agentx import harness
from bench.agentx.arrangements import NAMES, serving
from bench.agentx.harness import HarnessError, Load
from bench.agentx.results import Run, faults_of, results_of, table_of
from bench.common.fake_machine import Machine
from bench.common.fleet import end_on_sigterm
from bench.common.report import finish
from bench.common.usage import MARK, Usage, usage
from tracehaul.engine.fake import EngineCost

CHECKOUT = Path(__file__).parents[2]
SMALLER = 16
"""Tokens that one stands for."""
SLOWER = 4.0
"""By how much all is slower than where a second stands for as much as a token: so that two cores are fast enough."""
MACHINE = Machine(kv_tokens=24_576, decode=4, store_bytes=192 << 20)
"""A worker keeps 393,000 recorded tokens, and there is four times as much memory in stores as on workers."""
COST = EngineCost(iteration_s=0.02, prefill_token_s=0.0001, copy_token_s=1e-5)
"""Of a worker that computes 10,000 tokens of prompts a second, and copies 100,000."""
AGENTS, DURATION_S, WARMUP = 48, 300, 2
CONTEXT_MAX = 16_384
GAP_MAX_S = 300.0
"""As the benchmark has it: of what was recorded."""

console = Console(stderr=True)


async def run_of(name: str, number: int, folder: Path, agentx: Path, machine: Machine, load: Load) -> Run:
    """Start the arrangement, and have the harness ask it.

    Raises:
        RuntimeError: it does not come up.
        HarnessError: the harness fails.
    """
    own, mark = folder / f"{name}-{number}", uuid.uuid4().hex
    own.mkdir()
    seen: list[Usage] = []

    def tell(line: str) -> None:
        if line.startswith(harness.MEASURES):
            seen.append(usage(mark))
        console.print(f"round {number + 1}, {name}: {line}", highlight=False, markup=False, soft_wrap=True)

    tell("starting")
    os.environ[MARK] = mark
    try:
        async with serving(name, own, machine) as url:
            del os.environ[MARK]
            out = own / "harness"
            words = harness.words_of(agentx, url, folder / "recordings", out, load)
            limit_s = load.duration_s + harness.SETUP_S
            found = await harness.run(words, harness.environment_of(folder / "hub"), out, limit_s, tell)
    finally:
        os.environ.pop(MARK, None)
    if not seen:
        raise HarnessError("the harness did not say when it measured: is it another version?")
    return Run(found, seen[-1].since(seen[0]))


async def rounds_of(
    names: Sequence[str], rounds: int, folder: Path, agentx: Path, machine: Machine, load: Load
) -> dict[str, list[Run]]:
    """All runs; each round begins with another arrangement."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            run = await run_of(name, number, folder, agentx, machine, load)
            runs[name].append(run)
            rate = 3600 * run.found.steps / run.found.seconds
            console.print(f"round {number + 1}, {name}: {rate:.0f} steps/h, {run.found.errors} errors", highlight=False)
    return runs


def main(
    recordings: Annotated[Path, typer.Option(help="Traces of kv-cache-tester: an archive, a folder or a file.")],
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    duration_s: Annotated[
        int, typer.Option("--duration", min=30, help="What is measured of each run, in seconds.")
    ] = DURATION_S,
    agents: Annotated[int, typer.Option(min=2, help="That work at the same time.")] = AGENTS,
    slower: Annotated[float, typer.Option(min=1, help="Than real: for slow or busy cores.")] = SLOWER,
    only: Annotated[list[str] | None, typer.Option(help="Of these arrangements alone.")] = None,
    peers: Annotated[Path, typer.Option(help="Where scripts/peers installed the harness.")] = CHECKOUT / ".peers",
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them there (needs tracehaul[bench]).")] = None,
) -> None:
    """The AgentX harness over our router, sticky sessions and cache-aware routing."""
    agentx = peers.resolve() / "agentx" / "bin" / "agentx"
    if not agentx.is_file():
        raise typer.BadParameter(f"{peers} has no AgentX harness: ./scripts/peers agentx installs it")
    if unknown := set(only or ()) - set(NAMES):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    end_on_sigterm()
    names = [name for name in NAMES if name in (only or NAMES)]
    sooner = SMALLER / slower
    load = Load(agents, duration_s, WARMUP, CONTEXT_MAX, GAP_MAX_S / sooner)
    cost = EngineCost(**{name: slower * seconds for name, seconds in msgspec.structs.asdict(COST).items()})
    machine = msgspec.structs.replace(MACHINE, cost=cost)
    with tempfile.TemporaryDirectory(prefix="agentx-") as made:
        folder = Path(made)
        try:
            traces = harness.make_recordings(recordings, folder / "recordings", SMALLER, sooner)
        except (OSError, ValueError, KeyError) as error:
            raise typer.BadParameter(f"--recordings {recordings}: {error}") from None
        harness.make_hub(folder / "hub")
        try:
            runs = asyncio.run(rounds_of(names, rounds, folder, agentx, machine, load))
        except (HarnessError, RuntimeError) as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None
    config = {"load": msgspec.to_builtins(load), "machine": msgspec.to_builtins(machine), "traces": traces}
    finish(
        config | {"smaller": SMALLER, "slower": slower, "rounds": rounds, "harness": harness.VERSION},
        results_of(runs),
        json,
        Console(),
    )
    Console().print(table_of(runs))
    if png is not None:
        from bench.agentx.plot import plot

        plot({name: [run.found for run in those] for name, those in runs.items()}, png)
        console.print(f"drawn to {png}")
    if faults := faults_of(runs):
        console.print("\n".join(faults), style="red", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

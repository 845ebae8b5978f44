"""Recorded agents over vLLM: our router and store, LMCache, and neither, on the same cores in the same bytes.

Four arrangements serve the same schedule in turn, each started anew. ``ours``: our router over two servers with our
store. ``lmcache``: one server on all cores with an LMCache process, which may hold as much as our store. ``sticky``:
two servers, each trace with one of them, nothing beneath. ``ample``: the same with room for every context, so that
nothing is computed twice and nothing moves. The first three have the same KV memory, a third of the contexts that live
at once.

``engines.replay.lmcache``, ``.sticky`` and ``.ample``: our steps per hour divided by theirs.

Needs ``./scripts/peers lmcache``. Example:

  python -m bench.engines.replay --recordings DIR --rounds 2 --json replay.json --png replay.png
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.common.fleet import end_on_sigterm, environment
from bench.common.report import Result, finish, percentile
from bench.common.usage import MARK, Usage, usage
from bench.engine.model import hub_folder
from bench.engines.contestants import SERVERS, Serving, Sizes, lmcache, ours, sticky
from bench.engines.stock import CHECKOUT
from bench.peers.vllm_server import Peers
from bench.replay.choose import Limits, choose
from bench.replay.command import RECORDINGS_VARIABLE, read_traces
from bench.replay.progress import shown
from bench.replay.recording import Trace
from bench.replay.records import degraded
from bench.replay.run import Outcome, replay
from bench.replay.schedule import Pacing
from tracehaul.runtime import clock

WORKLOAD = "weka_scaled16"
NAMES = ("ours", "lmcache", "sticky", "ample")
FULL = Limits(traces_max=12, skip_steps=6, steps_min=8, steps_max=8, context_min=3500, context_max=7900)
QUICK = Limits(traces_max=3, skip_steps=6, steps_min=3, steps_max=3, context_min=2000, context_max=4000)
PACING = Pacing(concurrency=12, time_scale=8.0, gap_max_s=8.0, stagger_s=1.0)
SIZES = Sizes(kv_bytes=422 << 20, beneath_bytes=2 << 30, ample_bytes=4 << 30, context_max=8192)
QUICK_SIZES = Sizes(kv_bytes=216 << 20, beneath_bytes=1 << 30, ample_bytes=1 << 30, context_max=4200)
OTHERS_MAX = 0.1
"""Share of the cores' time that may go to other work than what is measured."""
HITS_OVER = 0.001
"""Share of prompt tokens by which hits may pass those of an infinite cache: what is counted in other units."""

console = Console()


class Run(NamedTuple):
    """One replay of one arrangement."""

    outcome: Outcome
    used: Usage
    """Of the cores, meanwhile; its own processes are the marked ones."""

    @property
    def others(self) -> float:
        """Share of the cores' time that neither it nor idleness had: the client's, and whatever ran beside."""
        return (self.used.busy - self.used.marked) / self.used.total

    @property
    def steps_per_h(self) -> float:
        """Those that did not fail."""
        return 3600 * sum(record.error is None for record in self.outcome.records) / self.outcome.wall_s


def serving(name: str, peers: Peers, model: Path, sizes: Sizes) -> AbstractContextManager[Serving]:
    """The arrangement of that name, started."""
    match name:
        case "ours":
            return ours(peers, model, sizes, console)
        case "lmcache":
            return lmcache(peers, model, sizes)
        case "sticky":
            return sticky(peers, model, sizes.kv_bytes, sizes)
        case _:
            return sticky(peers, model, sizes.ample_bytes, sizes)


def faults(run: Run) -> list[str]:
    """What makes a run no measurement, in words."""
    outcome = run.outcome
    said = [f"{run.others:.2f} of the cores' time went to other work"] if run.others > OTHERS_MAX else []
    said += [
        f"step {record.index} of {record.trace}: {record.error} {record.detail}"
        for record in outcome.records
        if record.error is not None
    ]
    said += [
        f"step {record.index} of {record.trace}: {record.prompt_tokens} tokens counted, {record.recorded_tokens} sent"
        for record in outcome.records
        if record.error is None and record.prompt_tokens != record.recorded_tokens
    ]
    if outcome.hits is None:
        said.append("nothing was told of hits")
    elif outcome.hits.delivered > outcome.hits.shared + HITS_OVER:
        said.append(f"hits of {outcome.hits.delivered:.3f}, where an infinite cache has {outcome.hits.shared:.3f}")
    if degraded(outcome.records):
        said.append("steps were sent too late: something else used the cores")
    return said


def results_of(runs: dict[str, list[Run]]) -> list[Result]:
    """The figures of all runs of each arrangement together."""
    results: list[Result] = []
    rates: dict[str, float] = {}
    for name, those in runs.items():
        records = [record for run in those for record in run.outcome.records if record.error is None]
        rates[name] = 3600 * len(records) / sum(run.outcome.wall_s for run in those)
        first = [record.ttft_s for record in records if record.ttft_s is not None]
        told = [run.outcome.hits for run in those if run.outcome.hits is not None]
        results.append(Result(f"engines.replay.steps_per_h.{name}", rates[name], "1/h"))
        if told:
            delivered, shared = (sum(getattr(hits, of) for hits in told) / len(told) for of in ("delivered", "shared"))
            results.append(Result(f"engines.replay.hits.{name}", delivered, "1", "shared", delivered / shared))
        for share in (0.5, 0.9) if first else ():
            results.append(Result(f"engines.replay.ttft.p{share * 100:.0f}.{name}", percentile(first, share), "s"))
        used = [run.used.marked for run in those]
        results.append(Result(f"engines.replay.cpu.{name}", sum(used) / max(1, len(records)), "s"))
        results.append(Result(f"engines.replay.others.{name}", max(run.others for run in those), "1"))
        failed = sum(record.error is not None for run in those for record in run.outcome.records)
        results.append(Result(f"engines.replay.errors.{name}", failed, "1"))
    for name in NAMES[1:]:
        if name in rates and "ours" in rates:
            ratio = rates["ours"] / rates[name]
            results.append(Result(f"engines.replay.{name}", ratio, "1", f"engines.replay.steps_per_h.{name}", ratio))
    return results


def table_of(runs: dict[str, list[Run]]) -> Table:
    """One line per arrangement."""
    figures = {result.name: result.value for result in results_of(runs)}
    table = Table("who", "steps/h", "ours ÷", "hits", "TTFT p50", "p90 s", "CPU s/step", "others", "errors", "runs")
    for name, those in runs.items():

        def shown_as(what: str, form: str, name: str = name) -> str:
            value = figures.get(f"engines.replay.{what}.{name}")
            return "-" if value is None else format(value, form)

        ratio = figures.get(f"engines.replay.{name}")
        table.add_row(
            name,
            shown_as("steps_per_h", ".0f"),
            "" if ratio is None else f"{ratio:.2f}",
            shown_as("hits", ".3f"),
            shown_as("ttft.p50", ".2f"),
            shown_as("ttft.p90", ".2f"),
            shown_as("cpu", ".2f"),
            shown_as("others", ".2f"),
            shown_as("errors", ".0f"),
            " ".join(f"{run.steps_per_h:.0f}" for run in those),
        )
    return table


def run_of(name: str, peers: Peers, model: Path, sizes: Sizes, traces: Sequence[Trace]) -> Run:
    """Start that arrangement, replay, and end it."""
    mark = f"{os.getpid()}-{clock.wall_ns()}"
    with environment({MARK: mark}), serving(name, peers, model, sizes) as running:
        before = usage(mark)
        with shown(console) as observe:
            outcome = asyncio.run(replay(traces, PACING, running.target, observe, running.transport))
        return Run(outcome, usage(mark).since(before))


def _write_raw(path: Path, runs: dict[str, list[Run]]) -> None:
    lines = [
        msgspec.json.encode({"arrangement": name, "round": number, **msgspec.to_builtins(record)})
        for name, those in runs.items()
        for number, run in enumerate(those)
        for record in run.outcome.records
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")


def main(
    recordings: Annotated[Path, typer.Option(envvar=RECORDINGS_VARIABLE, help="Where the recordings are.")],
    workload: Annotated[str, typer.Option(help="Which of them.")] = WORKLOAD,
    peers: Annotated[Path, typer.Option(help="Where ./scripts/peers installed vllm and lmcache.")] = CHECKOUT
    / ".peers",
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join(NAMES)}; all if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turn.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Write every step there, a line of JSON each.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them there (needs tracehaul[bench]).")] = None,
    quick: Annotated[bool, typer.Option(help="3 traces of 3 steps: whether all of it works.")] = False,
) -> None:
    """Replay recorded agents over vLLM servers in four arrangements."""
    chosen = [name for name in NAMES if name in (only or NAMES)]
    installed = Peers(peers)
    if unknown := set(only or ()) - set(NAMES):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    if not installed.vllm.is_file() or ("lmcache" in chosen and not installed.lmcache.is_dir()):
        raise typer.BadParameter(f"{peers} has no vllm or lmcache: ./scripts/peers lmcache installs both")
    end_on_sigterm()
    limits, sizes = (QUICK, QUICK_SIZES) if quick else (FULL, SIZES)
    traces = choose(read_traces(recordings, workload), limits, seed=1)
    model = hub_folder()
    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    wrong: list[str] = []
    for number in range(rounds):
        for name in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
            runs[name].append(run_of(name, installed, model, sizes, traces))
            console.print(f"round {number + 1}, {name}: {runs[name][-1].steps_per_h:.0f} steps/h", highlight=False)
            wrong += [f"{name}: {fault}" for fault in faults(runs[name][-1])]
    config: dict[str, Any] = {
        "workload": workload,
        "limits": msgspec.to_builtins(limits),
        "pacing": msgspec.to_builtins(PACING),
        "sizes": msgspec.to_builtins(sizes),
        "servers": SERVERS,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "steps": sum(1 for trace in traces for _ in trace.walk()),
        "prompt_tokens": sum(trace.prompt_tokens for trace in traces),
        "faults": wrong,
    }
    finish(config, results_of(runs), json, console)
    console.print(table_of(runs))
    if raw is not None:
        _write_raw(raw, runs)
    if png is not None:
        from bench.engines.replay_plot import plot

        plot({name: [run.outcome for run in those] for name, those in runs.items()}, png)
        console.print(f"drawn to {png}")
    for fault in wrong:
        console.print(fault, style="red", markup=False)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

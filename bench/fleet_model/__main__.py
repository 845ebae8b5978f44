"""``python -m bench.fleet_model``: what a policy gains on a fleet that nobody here has."""

import asyncio
import lzma
import tarfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track

from bench.common.recordings import documents, find
from bench.common.report import finish
from bench.fleet_model.calibrate import NotACluster, calibrate
from bench.fleet_model.deciding import deciding
from bench.fleet_model.fleets import ACCELERATOR, CONTEXT_MAX
from bench.fleet_model.sessions import overload, sharing
from bench.fleet_model.sweep import ABLATIONS, CONTENDERS, PEERS, Setting, load_name, results, run
from bench.fleet_model.tasks import tasks_in
from bench.fleet_model.validate import LOADS, validate
from bench.replay.command import RECORDINGS_VARIABLE, read_traces
from sim.fleet.run import Figures
from sim.fleet.work import Task

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="rich", help=__doc__)
QUICK = Setting(workers=8, warm_up_s=60.0, seconds=120.0)


@app.callback()
def fleet_model() -> None:
    """What a policy gains on a fleet that nobody here has."""


@app.command()
def sweep(
    recordings: Annotated[
        Path, typer.Option(envvar=RECORDINGS_VARIABLE, help="A folder or archive of weka or mooncake recordings.")
    ],
    workload: Annotated[str | None, typer.Option(help="Which archive or folder in it.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Accelerators.")] = 64,
    loads: Annotated[
        str, typer.Option(help="Agents at once, as multiples of what keeps the fleet just busy.")
    ] = "0.5,1,2,3",
    contenders: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(CONTENDERS)}. Default: ours and its peers.")
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Ours, with each mechanism left out in turn.")] = False,
    block: Annotated[
        int, typer.Option(min=64, help="Tokens that stores keep or lose as one; 8192 for 1,000 workers.")
    ] = 2048,
    warm_up: Annotated[float, typer.Option(min=0, help="Virtual seconds before anything counts.")] = 600.0,
    seconds: Annotated[float, typer.Option(min=1, help="Virtual seconds that count.")] = 1200.0,
    seed: Annotated[int, typer.Option(help="Which agents.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Eight workers for two minutes: half a minute in all.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them there (needs tracehaul[bench]).")] = None,
) -> None:
    """Run recorded agents on a simulated fleet, under our policy and others', and compare.

    Each agent runs one trace after the other, from the middle of one on; a step that ends counts for what it is of a
    trace's work. All contenders have the same accelerators, host memory and links.

    Example:

      python -m bench.fleet_model sweep --recordings DIR --workload weka_full --workers 64 --png sweep.png
    """
    setting = QUICK if quick else Setting(workers, block, warm_up, seconds, seed)
    names = contenders.split(",") if contenders else ["ours", *(ABLATIONS if ablate else PEERS)]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    tasks = _read(recordings, workload, setting.block_tokens)
    figures: dict[tuple[str, float], Figures] = {}
    bound = 0.0
    console = Console(stderr=True)
    plan = [(name, load) for load in map(float, loads.split(",")) for name in names]
    for name, load in track(plan, "simulating", console=console):
        figures[name, load], could = run(name, load, tasks, setting)
        bound = could.traces_h / setting.workers
        one = figures[name, load]
        console.print(
            f"{load_name(load)} {name}: {one.traces_per_worker_h:.2f} traces per worker-hour of {bound:.2f}, "
            f"hits {one.hits:.3f}, a step takes {one.step_mean_s:.1f} s, {one.steps} steps",
            highlight=False,
        )
    config = {
        "setting": msgspec.to_builtins(setting),
        "contenders": {name: CONTENDERS[name].what for name in names},
        "worker": msgspec.to_builtins(ACCELERATOR),
        "workload": workload or recordings.name,
        "bound_traces_h": bound,
    }
    finish(config, results(figures), json, Console())
    if png is not None:
        from bench.fleet_model.plot import plot

        plot(figures, bound, f"{workload or recordings.name}, {setting.workers} workers", png)


def _read(recordings: Path, workload: str | None, block_tokens: int) -> list[Task]:
    try:
        return tasks_in(documents(find(recordings, workload)), block_tokens, CONTEXT_MAX)
    except (OSError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise typer.BadParameter(f"cannot read the recordings in {recordings}: {error}") from error


@app.command()
def sessions(
    recordings: Annotated[Path, typer.Option(envvar=RECORDINGS_VARIABLE, help="As for sweep.")],
    workload: Annotated[str | None, typer.Option(help="Which archive or folder in it.")] = None,
    seed: Annotated[int, typer.Option(help="Which sessions.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """How 250 sessions share eight accelerators, and what four times the agents for two minutes do to them."""
    setting = Setting(seed=seed)
    tasks = _read(recordings, workload, setting.block_tokens)
    found = [*sharing(tasks, setting.block_tokens, seed), *overload(tasks, setting.block_tokens, seed)]
    finish({"workload": workload or recordings.name, "seed": seed}, found, json, Console())


@app.command()
def decide(
    workers: Annotated[int, typer.Option(min=8, help="Decode workers.")] = 1000,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """What the router's admission and placement of one step take, among a thousand workers."""
    finish({"workers": workers}, deciding(workers), json, Console())


@app.command("calibrate")
def calibrate_command(
    url: Annotated[str, typer.Argument(help="Of the router, such as http://127.0.0.1:8000.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The fleet's description goes there, as JSON.")],
) -> None:
    """Describe a live cluster: its workers' announced rates, and what a few batches take that nobody announces.

    Nothing else should run on it for the one to three minutes that this takes.
    """
    try:
        shape = asyncio.run(calibrate(url))
    except NotACluster as error:
        Console(stderr=True).print(f"{error}", style="red", markup=False)
        raise typer.Exit(1) from error
    output.write_bytes(msgspec.json.format(msgspec.json.encode(shape)) + b"\n")
    Console(stderr=True).print(f"written to {output}: {shape.computing} workers, {len(shape.stores)} store nodes")


@app.command("validate")
def validate_command(
    recordings: Annotated[
        Path, typer.Option(envvar=RECORDINGS_VARIABLE, help="A folder or archive of recordings that fit the model.")
    ],
    workload: Annotated[str | None, typer.Option(help="Which archive or folder in it.")] = None,
    decodes: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 2,
    prefills: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 0,
    seed: Annotated[int, typer.Option(help="Which traces.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the fleet's description there.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """Run four loads on a fresh cluster of this machine and on its model; ``fleet.error`` is the worst error."""
    console = Console(stderr=True)
    results, shape = validate(read_traces(recordings, workload), decodes, prefills, seed, console, output)
    finish({"shape": msgspec.to_builtins(shape), "loads": msgspec.to_builtins(LOADS)}, results, json, Console())


if __name__ == "__main__":
    app()

"""``tracehaul batch``."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.api import Api, here
from cluster.options import KeyOption
from cluster.plan import load_plan
from cluster.rundir import RunDir
from jobs.windows import window_s

FAILED_EXIT = 3
"""Some lines were not answered."""
out = Console()
err = Console(stderr=True)

app = typer.Typer(no_args_is_help=True, help="Calls from a file, in OpenAI's form of batches.")


@app.callback()
def batch() -> None:
    """Calls from a file, in OpenAI's form of batches."""


def _window(text: str) -> float:
    try:
        return float(window_s(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("run")
def run_command(
    file: Annotated[Path, typer.Argument(help="Calls, one a line: custom_id, method, url and body, in JSON.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where answers go. What is there is gone on with.")],
    errors: Annotated[
        Path | None, typer.Option("--errors", help="Where lines go that were not answered. Default: with the answers.")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=4096, help="Calls at once.")] = 32,
    window: Annotated[
        float,
        typer.Option("--window", parser=_window, metavar="TIME", help="Lines are asked for so long: 30m, 1h, 24h, 7d."),
    ] = "24h",  # pyright: ignore[reportArgumentType] - typer parses the default, too
    url: Annotated[str | None, typer.Option(help="Base URL of an endpoint. Default: of the cluster here.")] = None,
    key: KeyOption = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where the cluster's state is.")] = Path(".run"),
) -> None:
    """Ask every call of a file, and write down what each is answered.

    The file is checked first: wrong lines are all named, and then nothing is asked. Lines that begin alike are asked
    after each other, and those with the same metadata.trace_id one by one, as steps of a trace. Run again after it was
    stopped or killed, it goes on: lines that are in the output or among the errors are not asked again.

    Exit code: 0 if every line was answered, 3 if some were not, 1 if nothing was asked.

    Examples:

      tracehaul batch run calls.jsonl -o answers.jsonl

      tracehaul batch run calls.jsonl -o answers.jsonl --errors errors.jsonl --concurrency 8
    """
    from cluster.batch.run import Order, checked, run

    order = Order(file, output, errors or output, concurrency, window)
    local = RunDir(run_dir)
    api = Api(url.rstrip("/").removesuffix("/v1"), key) if url is not None else here(load_plan(local), local)
    found = checked(order, api)
    if found.wrong:
        for error in found.errors:
            where = "the file" if error.line is None else f"line {error.line}"
            _say(f"{where}: {error.code}: {error.message}")
        _say(f"tracehaul: {found.wrong} wrong in {file}: nothing was asked")
        raise typer.Exit(1)
    outcome = asyncio.run(run(order, api, found, err))
    before = f", {outcome.before} of them before" if outcome.before else ""
    again = f"; asked again {outcome.again} times" if outcome.again else ""
    left = f", {outcome.left} not asked in time: run it again to go on" if outcome.left else ""
    line = f"{outcome.completed} answered, {outcome.failed} failed of {outcome.total}{before}{left}{again}"
    out.print(f"{line}; {outcome.took_s:.1f} s", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(FAILED_EXIT if outcome.failed or outcome.left else 0)


def _say(line: str) -> None:
    err.print(line, style="red", highlight=False, markup=False, soft_wrap=True)


def register(to: typer.Typer) -> None:
    """Add them to the command line."""
    to.add_typer(app, name="batch")

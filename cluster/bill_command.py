"""``tracehaul bill`` on the command line."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.plan import load_plan
from cluster.rundir import RunDir

PIPE_COLUMNS = 200


def bill_command(
    since: Annotated[str, typer.Option("--from", help="Since when: 2026-11-30, 2026-11-30T12:00, or 7d ago.")] = "24h",
    until: Annotated[str, typer.Option("--to", help="Until when, likewise. Default: now.")] = "0m",
    as_csv: Annotated[bool, typer.Option("--csv", help="Everything, a line for each trace.")] = False,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where the cluster's state is.")] = Path(".run"),
) -> None:
    """What traces were billed, and what of the workers' time was no trace's, from what routers have written down.

    Example:

      tracehaul bill --from 7d --csv > bill.csv
    """
    from cluster import bill as bills

    now, run = datetime.now(UTC), RunDir(run_dir)
    try:
        times = bills.moment(since, now), bills.moment(until, now)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found = asyncio.run(bills.told(load_plan(run), run, *times))
    if as_csv:
        typer.echo(bills.as_csv(found), nl=False)
        return
    console = Console()
    (console if console.is_terminal else Console(width=PIPE_COLUMNS)).print(bills.as_table(found))


def register(app: typer.Typer) -> None:
    """Add it."""
    app.command("bill")(bill_command)

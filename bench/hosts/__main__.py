"""``python -m bench.hosts``: what a fleet of hosts costs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.common.report import Result, finish
from bench.hosts import joins, launching, pull, tls

app = typer.Typer(pretty_exceptions_enable=False)
PARTS = ("join", "launch", "pull", "tls")


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure only this, of {', '.join(PARTS)}; may be said several times.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=10, max=1000, help="How many join.")] = 1000,
    processes: Annotated[int, typer.Option(min=1, help="How many processes they share.")] = 2,
    seconds: Annotated[float, typer.Option(help="How long heartbeats are measured.")] = 10.0,
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
) -> None:
    """Measure what a fleet of hosts costs."""
    config = {"nodes": nodes, "processes": processes, "seconds": seconds, "network": "TCP over loopback"}
    results: list[Result] = []
    for part in only or PARTS:
        match part:
            case "join":
                results += joins.measure(nodes, processes, seconds)
            case "launch":
                results += launching.measure()
            case "pull":
                results += pull.measure()
            case "tls":
                measured, config["tls_network"] = tls.measure()
                results += measured
            case _:
                raise typer.BadParameter(f"there is no {part}; there are {', '.join(PARTS)}", param_hint="--only")
    finish(config, results, json, Console())


if __name__ == "__main__":
    app()

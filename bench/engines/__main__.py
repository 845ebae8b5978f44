"""Stock servers of SGLang or vLLM behind our router and our store, on this machine.

``pulled``: two servers; a prefix that one has computed is pulled by the other. ``apart``: another tenant's is not, and
a client that leaves ends its step. ``moved``: then one is killed in mid-answer. ``handoff``: prefill on one server,
decode on another. ``cost``: what the plugin's side of the store costs, without a server. Every server is started as a
cluster's file would have it, in the environment that ``scripts/peers`` made.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.common.report import Result, finish
from bench.engines.apart import apart
from bench.engines.cost import cost
from bench.engines.handoff import handoff
from bench.engines.known import ENGINES
from bench.engines.moved import moved
from bench.engines.pulled import pulled
from bench.engines.stock import CHECKOUT, Engine, stock_fleet
from cluster.rundir import ClusterFault

console = Console()
ROUNDS = 3


class Part(StrEnum):
    """What can be measured alone."""

    PULLED = "pulled"
    APART = "apart"
    MOVED = "moved"
    HANDOFF = "handoff"
    COST = "cost"


def main(
    engine: Annotated[str, typer.Argument(help=f"Which: {' or '.join(ENGINES)}.")],
    peers: Annotated[Path, typer.Option(help="Where scripts/peers installed it.")] = CHECKOUT / ".peers",
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    quick: Annotated[bool, typer.Option(help="One prompt instead of three.")] = False,
    only: Annotated[list[Part] | None, typer.Option(help="Measure just that; repeat for more.")] = None,
) -> None:
    """Measure two stock servers of one engine behind our router and our store."""
    if engine not in ENGINES:
        raise typer.BadParameter(f"there is no {engine!r} here: say {' or '.join(ENGINES)}")
    known = ENGINES[engine](peers.resolve())
    if not known.python.exists():
        raise typer.BadParameter(f"{known.python} is not there: ./scripts/peers --path {peers} {engine}")
    parts, rounds = set(only or Part), 1 if quick else ROUNDS
    config: dict[str, Any] = {"engine": engine, "args": known.args, "rounds": rounds}
    try:
        results = measured(known, parts, rounds, quick=quick)
    except ClusterFault as fault:
        console.print(f"cannot measure: {fault}", highlight=False)
        raise typer.Exit(1) from None
    finish(config, results, json, console)


def measured(known: Engine, parts: set[Part], rounds: int, *, quick: bool) -> list[Result]:
    """The parts that were asked for.

    Raises:
        ClusterFault: a fleet does not start.
    """
    results: list[Result] = cost(known, quick) if Part.COST in parts else []
    if parts & {Part.PULLED, Part.APART, Part.MOVED}:
        with stock_fleet(known, 0, 2, console) as stock:
            results += pulled(stock, rounds) if Part.PULLED in parts else []
            results += apart(stock) if Part.APART in parts else []
            results += moved(stock) if Part.MOVED in parts else []
    if Part.HANDOFF in parts:
        with stock_fleet(known, 1, 1, console) as stock:
            results += handoff(stock, rounds)
    return results


if __name__ == "__main__":
    typer.run(main)

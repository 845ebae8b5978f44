"""What outlives processes, measured: see :mod:`bench.durable.machine`, :mod:`bench.durable.cost`,
:mod:`bench.durable.hits`, :mod:`bench.durable.batches`, :mod:`bench.durable.kills` and :mod:`bench.durable.slack`."""

import asyncio
import secrets
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from sqlalchemy import URL

from bench.common.report import Result, finish
from bench.durable import batches, machine
from bench.durable.cost import cost_results
from bench.durable.hits import hits_results
from bench.durable.kills import kills_results
from bench.durable.slack import slack_results
from records.base import Records
from records.database import database_url
from records.sql import SqlRecords
from tracehaul.model.source import resolve
from tracehaul.model.text import Text

TIMEOUT_S = 60.0
console = Console()


class Asked(msgspec.Struct, frozen=True):
    """What is to be measured."""

    postgresql: str
    quick: bool
    recordings: Path | None


def _rows(url: URL, run: str, scope: str) -> Records:
    return SqlRecords(url, f"{scope}-{run}", "router-0", secrets.token_hex(8), "", TIMEOUT_S)


def _opened(asked: Asked, folder: Path) -> Iterator[tuple[str, Callable[[str], Records]]]:
    """Each kind of database with what opens a router's rows in it, which have nothing of those of an earlier run."""
    run = secrets.token_hex(4)
    for kind, database in (("sqlite", ""), ("postgresql", asked.postgresql)):
        if kind == "sqlite" or database:
            url = database_url(database, folder / "r.sqlite")
            yield kind, partial(_rows, url, run)


def _bytes(asked: Asked) -> list[Result]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, make in _opened(asked, Path(folder)):
            seconds, rounds = (2.0, 1) if asked.quick else (10.0, 3)
            results += asyncio.run(machine.cost(make("cost"), kind, seconds, rounds))
    return results


def _recover(asked: Asked) -> list[Result]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, make in _opened(asked, Path(folder)):
            results += asyncio.run(machine.recover(make, kind, 1000 if asked.quick else 10_000, 5))
    return results


def _cost(asked: Asked) -> list[Result]:
    return cost_results(Text.load(resolve()), asked.postgresql, console, quick=asked.quick)


def _intake(asked: Asked) -> list[Result]:
    return batches.intake(Text.load(resolve()), console, quick=asked.quick)


def _kills(asked: Asked) -> list[Result]:
    return kills_results(console, quick=asked.quick)


def _slack(asked: Asked) -> list[Result]:
    return slack_results(console, quick=asked.quick)


def _hits(asked: Asked) -> list[Result]:
    if asked.recordings is None:
        raise typer.BadParameter("hits needs recordings of mini-swe-agent", param_hint="--recordings")
    return hits_results(asked.recordings, asked.postgresql, console, quick=asked.quick)


FIGURES: dict[str, Callable[[Asked], list[Result]]] = {
    "bytes": _bytes,
    "recover": _recover,
    "cost": _cost,
    "hits": _hits,
    "intake": _intake,
    "kills": _kills,
    "slack": _slack,
}


DEFAULT = ["bytes", "recover", "cost", "intake"]


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join(FIGURES)}; all but hits if not given.")] = None,
    recordings: Annotated[Path | None, typer.Option(help="A folder or archive of mini-swe recordings.")] = None,
    postgresql: Annotated[str, typer.Option(help="A URL of a database; without it SQLite's alone.")] = "",
    quick: Annotated[bool, typer.Option(help="Less of it.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report there.")] = None,
) -> None:
    """Measure what it costs that work outlives the processes that do it."""
    if unknown := set(only or ()) - FIGURES.keys():
        raise typer.BadParameter(f"{min(unknown)} is none of {', '.join(FIGURES)}", param_hint="--only")
    asked = Asked(postgresql, quick, recordings)
    results = [result for name in only or DEFAULT for result in FIGURES[name](asked)]
    finish({"only": only or DEFAULT, "quick": quick}, results, json, console)


if __name__ == "__main__":
    typer.run(main)

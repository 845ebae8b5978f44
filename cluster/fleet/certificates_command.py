"""``tracehaul certificates``: who of a fleet has which certificate, and new ones for all."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.fleet import certificates
from cluster.fleet.operations import opened
from cluster.fleet.options import CONFIG_FILE, ConfigOption
from cluster.rundir import ClusterFault
from tracehaul.runtime import clock

err = Console(stderr=True)
out = Console()
WIDE_COLUMNS = 160
DAY_S = 86400.0

app = typer.Typer(
    no_args_is_help=True,
    help="Of a fleet: who has which certificate until when, and new ones while all serve.",
)


@app.command()
def status(config: ConfigOption = CONFIG_FILE) -> None:
    """Show each host's certificate: of which nodes, until when, of which CA; and nodes that do not use it yet.

    Example:

      tracehaul certificates status --config cluster.toml
    """
    asyncio.run(_status(config))


async def _status(path: Path) -> None:
    async with opened(path) as fleet:
        found, faults = await certificates.status(fleet)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("host", "until", "days", "CA", "trusts", "of", "not yet used by"):
        table.add_column(column, no_wrap=column in ("host", "until", "CA"))
    now_s = clock.wall_s()
    for host, held in found.items():
        if held is None:
            table.add_row(host, "none", "", "", "", "", "")
            continue
        until = datetime.fromtimestamp(held.until_s, UTC).date().isoformat()
        days = f"{(held.until_s - now_s) / DAY_S:.0f}"
        trusts = " ".join(held.trusts)
        table.add_row(host, until, days, held.issuer or "untrusted", trusts, " ".join(held.names), " ".join(held.late))
    (out if out.is_terminal else Console(width=WIDE_COLUMNS)).print(table)
    if faults:
        raise ClusterFault("; ".join(f"{host}: {fault}" for host, fault in faults.items()))


@app.command()
def rotate(
    config: ConfigOption = CONFIG_FILE,
    ca: Annotated[
        bool, typer.Option("--ca", help="A new CA, too: certificates of the old one are refused from then on.")
    ] = False,
) -> None:
    """Lay new certificates on all hosts, and wait until every node uses them. Nothing is restarted, nothing is lost.

    Examples:

      tracehaul certificates rotate

      tracehaul certificates rotate --ca
    """
    asyncio.run(_rotate(config, ca_too=ca))


async def _rotate(path: Path, *, ca_too: bool) -> None:
    async with opened(path) as fleet:
        await certificates.rotate(fleet, err, ca_too=ca_too)

"""``tracehaul whatif`` on the command line."""

from pathlib import Path
from typing import Annotated, get_args

import msgspec
import typer
from rich.console import Console

from cluster.rundir import ClusterFault
from router.policy.placement import Policy

PIPE_COLUMNS = 200

Share = Annotated[float | None, typer.Option(min=0.0, max=1.0, show_default=False)]


def whatif_command(
    log: Annotated[Path, typer.Argument(help="A router's decisions: logs/decisions.jsonl of a run directory.")],
    policy: Annotated[str, typer.Option(help=f"Of {', '.join(get_args(Policy))}.")] = "cost",
    sticky_margin: Share = None,
    pull_margin: Share = None,
    local_margin: Share = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as JSON.")] = False,
) -> None:
    """Make a log's decisions anew by another policy, or with other margins, and tell what would have differed.

    Each step is placed among the workers as they were when it came. What that would have changed for others nobody
    knows: all seconds are those that were expected.

    Examples:

      tracehaul whatif .run/logs/decisions.jsonl --policy sticky

      tracehaul whatif .run/logs/decisions.jsonl --sticky-margin 0.3
    """
    from cluster.whatif import tables, whatif

    if policy not in get_args(Policy):
        raise ClusterFault(f"there is no policy {policy!r}; there are {', '.join(get_args(Policy))}")
    margins = {"sticky_margin": sticky_margin, "pull_margin": pull_margin, "local_margin": local_margin}
    found = whatif(
        log, msgspec.convert(policy, Policy), {name: value for name, value in margins.items() if value is not None}
    )
    if as_json:
        typer.echo(msgspec.json.encode(found))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_COLUMNS)
    for table in tables(found):
        console.print(table)


def register(app: typer.Typer) -> None:
    """Add it."""
    app.command("whatif")(whatif_command)

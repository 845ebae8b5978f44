"""``tracehaul webhooks``: tries receivers, and gives them a new secret."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.plan import load_plan
from cluster.rundir import ClusterFault, RunDir
from cluster.webhooks.config import WebhookConfig
from cluster.webhooks.secrets import NoSecret, rotate
from cluster.webhooks.sender import HttpSender
from jobs.webhooks.deliveries import Delivered, Outcome
from jobs.webhooks.events import Event
from tracehaul.runtime import clock

out = Console()
PIPE_COLUMNS = 200

app = typer.Typer(
    no_args_is_help=True,
    help="Receivers of webhooks (`[[webhooks]]` in the config): told when batches and responses in the background end.",
)

RunDirOption = Annotated[
    Path, typer.Option("--run-dir", help="Where the cluster's state and logs are.", show_default=True)
]
DEFAULT_RUN_DIR = Path(".run")
DEFAULT_SECRET = WebhookConfig("https://receiver.example/").secret


@app.command("test")
def try_receivers(run_dir: RunDirOption = DEFAULT_RUN_DIR) -> None:
    """Send each receiver one event, signed as any other, and show what came of it. The cluster need not run.

    The event is the first that the receiver is told of, and names nothing that is there: its id ends with `test`.
    """
    run = RunDir(run_dir)
    webhooks = load_plan(run).config.webhooks
    if not webhooks:
        raise ClusterFault("the config names no receivers: say [[webhooks]] and url, and start the cluster anew")
    outcomes = asyncio.run(_tried(webhooks, run.webhooks))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("receiver", "secret", "event", "outcome"):
        table.add_column(column)
    for webhook, (outcome, took_s) in zip(webhooks, outcomes, strict=True):
        told = f"taken in {took_s * 1000:.0f} ms" if isinstance(outcome, Delivered) else outcome.why
        table.add_row(webhook.url, str(run.webhooks / webhook.secret), webhook.events[0], told)
    (out if out.is_terminal else Console(width=PIPE_COLUMNS)).print(table)
    if not all(isinstance(outcome, Delivered) for outcome, _ in outcomes):
        raise typer.Exit(1)


@app.command("rotate")
def rotate_secret(
    secret: Annotated[str, typer.Argument(help="The name of its file, as the config has it.")] = DEFAULT_SECRET,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Make a new secret, and print it. Events are signed with it and with the one of before, so receivers may change to
    it one after the other; the next rotation ends the old one. Running routers use it at once.

    Example:

      tracehaul webhooks rotate
    """
    path = RunDir(run_dir).webhooks / secret
    try:
        made = rotate(path)
    except (OSError, NoSecret) as error:
        raise ClusterFault(f"no new secret: {error}") from error
    typer.echo(made)


async def _tried(webhooks: tuple[WebhookConfig, ...], folder: Path) -> list[tuple[Outcome, float]]:
    sender = HttpSender(webhooks, folder)

    async def tried(webhook: WebhookConfig) -> tuple[Outcome, float]:
        kind, began_s = webhook.events[0], clock.now_s()
        subject = f"{kind.partition('.')[0]}_{os.urandom(8).hex()}_test"
        event = Event(kind, "", subject, int(clock.wall_s()))
        return await sender.send(webhook.receiver, event.name, event.body()), clock.now_s() - began_s

    try:
        return list(await asyncio.gather(*map(tried, webhooks)))
    finally:
        sender.close()


def register(to: typer.Typer) -> None:
    """Add them to the command line."""
    to.add_typer(app, name="webhooks")

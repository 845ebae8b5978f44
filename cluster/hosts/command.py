"""``tracehaul host``: what one host is told to run, by JSON. ``tracehaul launch`` speaks to it over ssh."""

import os
import sys
import time  # noqa: TID251 - waits for processes outside any loop
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cluster.hosts import pair_command
from cluster.hosts.changes import changes
from cluster.hosts.kept import digests_here
from cluster.hosts.managers import apply as apply_order
from cluster.hosts.managers import facts, present
from cluster.hosts.orders import HostReport, Order, order_of
from cluster.hosts.slurm import PLAN_VARIABLE, placed
from cluster.plan import Plan
from cluster.rundir import FAULT_EXIT, ClusterFault, RunDir
from tracehaul.runtime import clock

POLL_S = 0.2

app = typer.Typer(
    no_args_is_help=True,
    help="Run one host's nodes: start them, start them again when they die, tell of them. Answers are JSON. "
    "`tracehaul launch` calls this on each host; by hand it is for looking and mending.",
)
pair_command.register(app)

RunDirOption = Annotated[
    Path, typer.Option("--run-dir", help="Where this host's state and logs are.", show_default=True)
]
WaitOption = Annotated[
    float, typer.Option("--wait", help="Seconds to wait until every node serves or is left alone; then tell.")
]
NamesArgument = Annotated[list[str] | None, typer.Argument(help="Which nodes; none named: all.")]
DEFAULT_RUN_DIR = Path(".run")


def _tell(report: HostReport) -> None:
    typer.echo(msgspec.json.encode(report).decode())


def _waited(report: HostReport, again: Callable[[], HostReport], wait_s: float) -> HostReport:
    """The report when nothing is on its way any more, or the time is over."""
    deadline_s = clock.perf_s() + wait_s
    while any(node.state in ("starting", "backoff") for node in report.nodes) and clock.perf_s() < deadline_s:
        time.sleep(POLL_S)
        report = again()
    return report


@app.command()
def apply(
    order: Annotated[str, typer.Option(help="The order's file; -: standard input.")] = "-",
    wait_s: WaitOption = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, and do nothing.")] = False,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Make this host run what the order says; harmless when it does already.

    Nodes whose part of the order, config or release changed are restarted, those that are no more of this host are
    stopped, the others are untouched. Returns when what had to stop has stopped.

    Examples:

      tracehaul host apply --run-dir /srv/tracehaul/run < order.json

      ssh host-a tracehaul host apply --run-dir /srv/tracehaul/run --wait 120 < order.json
    """
    try:
        data = sys.stdin.buffer.read() if order == "-" else Path(order).read_bytes()
        said = msgspec.json.decode(data, type=Order, dec_hook=lambda kind, value: kind(value))
    except OSError as error:
        raise ClusterFault(f"cannot read the order {order}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ClusterFault(f"the order is wrong, or of another version: {error}") from error
    run = RunDir(run_dir)
    if dry_run:
        would = changes(present(run).status(), said, digests_here(said))
        typer.echo(msgspec.json.encode(would).decode())
        return
    report = apply_order(run, said, facts())
    _tell(_waited(report, present(run).status, wait_s))


@app.command()
def status(run_dir: RunDirOption = DEFAULT_RUN_DIR) -> None:
    """Tell what runs here, and who supervises it.

    Of each node: its state (running, starting, backoff, faulty, given up, fenced, stopped), how often it was started
    again, what it said last where it does not run.

    Example:

      tracehaul host status --run-dir /srv/tracehaul/run
    """
    _tell(present(RunDir(run_dir)).status())


@app.command()
def stop(names: NamesArgument = None, run_dir: RunDirOption = DEFAULT_RUN_DIR) -> None:
    """Drain these nodes and end them; nobody starts them again until somebody asks.

    All of them, if none is named: then nothing of the cluster runs here any more.

    Example:

      tracehaul host stop store-0 --run-dir /srv/tracehaul/run
    """
    _tell(present(RunDir(run_dir)).stop(names or []))


@app.command()
def restart(names: NamesArgument = None, wait_s: WaitOption = 0.0, run_dir: RunDirOption = DEFAULT_RUN_DIR) -> None:
    """Drain these nodes and start them anew; also those that were given up, fenced or stopped.

    Example:

      tracehaul host restart decode-0 --wait 60 --run-dir /srv/tracehaul/run
    """
    manager = present(RunDir(run_dir))
    _tell(_waited(manager.restart(names or []), manager.status, wait_s))


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="Which node.")],
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many, from the end.")] = 200,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Tell a node's last lines of output.

    Example:

      tracehaul host logs store-0 -n 50 --run-dir /srv/tracehaul/run
    """
    told = present(RunDir(run_dir)).logs(name, lines)
    typer.echo(msgspec.json.encode({"name": name, "lines": told}).decode())


@app.command()
def supervise(run_dir: RunDirOption = DEFAULT_RUN_DIR) -> None:
    """Be this host's own supervisor, in the foreground, with what was ordered last. SIGTERM drains the nodes.

    `tracehaul host apply` starts one by itself where there is no systemd. Nodes outlive a supervisor that is killed;
    the next one follows them on.
    """
    from cluster.hosts.supervise import supervise

    supervise(RunDir(run_dir))


@app.command(hidden=True)
def slurm_step(
    host: Annotated[str, typer.Argument(help="Which of the plan's hosts to be.")],
    at: Annotated[list[str], typer.Option(help="HOST=ADDRESS of each of the plan's hosts.")],
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Be one host of a plan in a step of a Slurm job: called by the batch script."""
    from cluster.hosts.supervise import supervise

    try:
        plan = msgspec.json.decode(os.environ[PLAN_VARIABLE], type=Plan, dec_hook=lambda kind, value: kind(value))
        addresses = dict(said.rsplit("=", 1) for said in at)
        order = order_of(placed(plan, addresses), host)
        supervise(RunDir(run_dir), order)
    except (ClusterFault, msgspec.DecodeError, KeyError, ValueError) as fault:
        typer.echo(f"tracehaul: {fault}", err=True)
        raise typer.Exit(FAULT_EXIT) from fault


def register(to: typer.Typer) -> None:
    """Add them to the command line."""
    to.add_typer(app, name="host", hidden=True)

"""The commands about hosts: ``tracehaul plan``, ``launch``, ``stop`` and so on."""

import asyncio
import platform
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from cluster.config import authority, is_loopback
from cluster.fleet import tables
from cluster.fleet.certificates_command import app as certificates
from cluster.fleet.config import LOCAL
from cluster.fleet.doctor import Health, of_reports, try_pairs
from cluster.fleet.opened import Opened
from cluster.fleet.operations import changes_of, encode, fault_of, launch, look_at, opened, reports_of, restart, stop
from cluster.fleet.options import CONFIG_FILE, ConfigOption
from cluster.fleet.survey import addresses_of
from cluster.rundir import ClusterFault

err = Console(stderr=True)
out = Console()
WIDE_COLUMNS = 160
PLAIN_NOTE = (
    'Whoever reaches the hosts\' ports can join this fleet, and read along: control = "plain" in [security] is for a '
    "network on which nobody else is."
)

BundleOption = Annotated[
    list[Path] | None,
    typer.Option("--bundle", help="An archive of `tracehaul bundle`; repeat for hosts of other kinds. Default: made."),
]
HostsArgument = Annotated[list[str] | None, typer.Argument(help="Hosts, by their names in the file. Default: all.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def plan(config: ConfigOption = CONFIG_FILE, offline: Annotated[
    bool, typer.Option("--offline", help="Ask no host: the placement alone.")
] = False) -> None:  # fmt: skip
    """Show which node would run on which host, what is there for it, and what would change. Starts nothing.

    Example:

      tracehaul plan --config cluster.toml
    """
    asyncio.run(_plan(config, offline))


async def _plan(path: Path, offline: bool) -> None:
    async with opened(path) as fleet:
        ready = await look_at(fleet, err, [] if offline else None)
        console = _wide()
        console.print(tables.placement(fleet.config, ready.plan))
        console.print(tables.memory(fleet.config, ready.plan, None if offline else ready.found))
        if offline:
            return
        for line in tables.changes(ready.plan, await changes_of(fleet, ready)):
            console.print(line, highlight=False)
        if ready.found.findings:
            console.print(tables.faults(ready.found.findings))
            raise typer.Exit(1)


def launch_command(
    config: ConfigOption = CONFIG_FILE, bundle: BundleOption = None, as_json: JsonOption = False
) -> None:
    """Bring all hosts to what the file says, by ssh, and wait until the fleet serves.

    Installs what is missing there, starts what does not run, restarts what has changed, and leaves the rest alone: to
    run it again does no harm. A host that fails is told, and takes no other along.

    Examples:

      tracehaul launch

      tracehaul launch --config cluster.toml --bundle tracehaul-0.1.0-py3.11-x86_64-0123456789ab.tar
    """
    asyncio.run(_launch(config, bundle or [], (), as_json=as_json))


def add_host(
    names: Annotated[list[str], typer.Argument(help="Hosts that were written into the file.")],
    config: ConfigOption = CONFIG_FILE,
    bundle: BundleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start the nodes of hosts that are new in the file, while the others serve on.

    Example:

      tracehaul add-host gpu-7
    """
    asyncio.run(_launch(config, bundle or [], names, as_json=as_json))


def upgrade(
    config: ConfigOption = CONFIG_FILE,
    bundle: BundleOption = None,
    hosts: HostsArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Bring this version, and the file, to the hosts, one after the other: what has changed on a host drains and is
    started anew, and serves before the next host's turn. What runs on the others goes on.

    Example:

      tracehaul upgrade
    """
    asyncio.run(_launch(config, bundle or [], hosts or (), rolling=True, as_json=as_json))


async def _launch(
    path: Path, bundles: list[Path], only: list[str] | tuple[str, ...], *, rolling: bool = False, as_json: bool
) -> None:
    async with opened(path) as fleet:
        outcome = await launch(fleet, err, bundles, only, rolling=rolling)
        if as_json:
            typer.echo(encode(outcome))
        if (fault := fault_of(outcome)) is not None:
            raise fault
        if any(hand.host.target != LOCAL for hand in fleet.hands) and fleet.config.security.control == "plain":
            err.print(PLAIN_NOTE, highlight=False, markup=False, soft_wrap=True)
        if not as_json:
            typer.echo(f"ready {', '.join(await _urls(fleet))}")


async def _urls(fleet: Opened) -> list[str]:
    config = fleet.config
    scheme = "https" if config.api.tls_cert else "http"
    routers = [hand for hand in fleet.hands if hand.host.nodes.router]
    if is_loopback(config.host):
        return [f"{scheme}://{authority(config.host, config.port)} on {hand.host.name}" for hand in routers]
    found = await addresses_of(routers)
    addresses = [hand.host.address or found[hand.host.name] for hand in routers]
    return [f"{scheme}://{authority(address, config.port)}" for address in addresses]


def stop_command(hosts: HostsArgument = None, config: ConfigOption = CONFIG_FILE) -> None:
    """Stop the fleet, or what runs on some hosts of it. Logs, releases and models are kept there."""
    asyncio.run(_stop(config, hosts or []))


def remove_host(
    names: Annotated[list[str], typer.Argument(help="Hosts that shall serve no more.")],
    config: ConfigOption = CONFIG_FILE,
) -> None:
    """Take hosts out while the others serve on: their stores' blocks go to the others, their steps end or move.

    They stay in the file until you take them out of it.

    Example:

      tracehaul remove-host gpu-7
    """
    asyncio.run(_stop(config, names, removed=True))


async def _stop(path: Path, names: list[str], *, removed: bool = False) -> None:
    async with opened(path) as fleet:
        outcome = await stop(fleet, names, err, drained=removed)
        if (fault := fault_of(outcome)) is not None:
            raise fault
        if removed:
            out.print(f"Take {', '.join(names)} out of {path} now, or the next launch starts them again.")


def logs(
    node: Annotated[str, typer.Argument(help="A node, such as decode-gpu-7-0.")],
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Of its end.")] = 50,
    config: ConfigOption = CONFIG_FILE,
) -> None:
    """Show the end of a node's log, from whichever host it runs on.

    Example:

      tracehaul logs store-gpu-7-0 --lines 200
    """
    asyncio.run(_logs(config, node, lines))


async def _logs(path: Path, node: str, lines: int) -> None:
    async with opened(path) as fleet:
        outcome = await reports_of(fleet.hands)
        there = {each.name: host for host, report in outcome.reports.items() for each in report.nodes}
        if node not in there:
            silent = f" ({', '.join(outcome.faults)} did not answer)" if outcome.faults else ""
            raise ClusterFault(f"no node {node}{silent}; there are {', '.join(there)}")
        hand = next(hand for hand in fleet.hands if hand.host.name == there[node])
        told = msgspec.json.decode(await hand.tell(["host", "logs", node, "--lines", str(lines)]))
        for line in told["lines"]:
            typer.echo(line)


def doctor(config: ConfigOption = CONFIG_FILE, as_json: JsonOption = False) -> None:
    """Look for what is wrong, before a start or at any time: a line for each fault, with what to do.

    Asks every host of its Python, memory, ports, clock, GPUs, networks and models, and tries every host against every
    other by the transport that the nodes use.

    Example:

      tracehaul doctor --config cluster.toml
    """
    asyncio.run(_doctor(config, as_json=as_json))


async def _doctor(path: Path, *, as_json: bool) -> None:
    async with opened(path) as fleet:
        ready = await look_at(fleet, err)
        pairs, more = await try_pairs(fleet.config, ready.plan, fleet.hands, ready.found)
        findings = [*ready.found.findings, *of_reports(ready.found.reports), *more]
        if as_json:
            named = {f"{reader}<{owner}": each for (reader, owner), each in pairs.items()}
            typer.echo(msgspec.json.format(msgspec.json.encode(Health(findings, named))))
        else:
            console = _wide()
            if pairs:
                console.print(tables.pairs(pairs))
            console.print(tables.faults(findings) if findings else "Nothing is wrong.")
        if any(finding.fatal for finding in findings):
            raise typer.Exit(1)


def bundle(
    folder: Annotated[Path, typer.Argument(help="Where the archive is written.")] = Path(),
    python: Annotated[str, typer.Option(help="Of the hosts: 3.11, 3.12 or 3.13.")] = (
        f"{sys.version_info.major}.{sys.version_info.minor}"
    ),
    machine: Annotated[str, typer.Option(help="Of the hosts: x86_64 or aarch64.")] = platform.machine(),
    pip: Annotated[list[str] | None, typer.Option(help="Options for pip, as --pip=--index-url=URL.")] = None,
) -> None:
    """Make an archive of all that hosts without internet need to run this version, for their Python and machine.

    For GPUs say where pip finds torch for them, as --pip=--index-url=URL.

    Example:

      tracehaul bundle --python 3.12
    """
    from cluster.fleet.bundle import make_bundle

    made = make_bundle(folder, python, machine, lambda line: err.print(line, highlight=False), pip or [])
    err.print(f"{len(made.manifest.files)} files, {made.path.stat().st_size >> 20} MB", highlight=False)
    typer.echo(made.path)


def slurm(
    config: ConfigOption = CONFIG_FILE,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where the hosts' state and logs are.")] = Path(".run"),
    command: Annotated[str, typer.Option(help="What tracehaul is on the hosts. Default: this one.")] = "",
    partition: Annotated[str, typer.Option(help="Where to run.")] = "",
    time_limit: Annotated[str, typer.Option("--time", help="The job's limit, as Slurm writes it.")] = "",
    cpus: Annotated[int, typer.Option(min=0, help="Of each host; 0: whole hosts.")] = 0,
    option: Annotated[list[str] | None, typer.Option(help="A further option of sbatch, as it is; repeat.")] = None,
) -> None:
    """Print a Slurm batch script of the file: its hosts are whichever Slurm gives, in the file's order.

    One step per host, GPUs by --gres. A node or a step that dies is started again, the job is requeued when that does
    not help, and all drains on the signal before the end.

    Example:

      tracehaul slurm --partition gpu --time 2-0 --run-dir /shared/run > job.sbatch && sbatch job.sbatch
    """
    from cluster.config_file import load_config
    from cluster.fleet.placing import place
    from cluster.hosts.kept import interpreter
    from cluster.hosts.slurm import SlurmJob, batch_script
    from cluster.launch import make_plan

    chosen = load_config(config, {})
    if chosen.security.secrets or chosen.security.proves_data:
        raise ClusterFault("a batch script carries no certificates and no token: leave [security] out, and run it on a "
                           "network of your own")  # fmt: skip
    plan = make_plan(chosen, err, place(chosen, {host.name: host.name for host in chosen.hosts}))
    job = SlurmJob(
        command=command or f"{interpreter()} -m cluster.cli",
        run_dir=str(run_dir.absolute()),
        partition=partition,
        time=time_limit,
        cpus=cpus,
        options=tuple(option or ()),
    )
    typer.echo(batch_script(plan, job), nl=False)


async def fleet_status(path: Path, as_json: bool) -> None:
    """What ``tracehaul status`` shows of a config with hosts."""
    async with opened(path) as fleet:
        outcome = await reports_of(fleet.hands)
        if as_json:
            typer.echo(encode(outcome))
        else:
            _wide().print(tables.fleet_status(outcome.reports, outcome.faults))
        if outcome.faults:
            raise typer.Exit(1)


async def fleet_restart(path: Path, names: list[str], *, rolling: bool) -> None:
    """What ``tracehaul restart`` does for a config with hosts."""
    async with opened(path) as fleet:
        if (fault := fault_of(await restart(fleet, names, err, rolling=rolling))) is not None:
            raise fault


def _wide() -> Console:
    """A pipe has no width to respect."""
    return out if out.is_terminal else Console(width=WIDE_COLUMNS)


def register(app: typer.Typer) -> None:
    """Adds them to the command line."""
    app.add_typer(certificates, name="certificates")
    app.command("plan")(plan)
    app.command("launch")(launch_command)
    app.command("stop")(stop_command)
    app.command("add-host")(add_host)
    app.command("remove-host")(remove_host)
    app.command("upgrade")(upgrade)
    app.command("logs")(logs)
    app.command("doctor")(doctor)
    app.command("bundle")(bundle)
    app.command("slurm")(slurm)

"""What the commands about hosts show."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from cluster.config import ClusterConfig
from cluster.fleet.connection import HostFault
from cluster.fleet.findings import Finding
from cluster.fleet.needs import needs_on
from cluster.fleet.survey import Survey
from cluster.hosts.changes import Changes
from cluster.hosts.orders import HostReport, NodeReport
from cluster.hosts.pair import Measured
from cluster.plan import Plan

_COLOURS = {"running": "green", "starting": "yellow", "backoff": "yellow", "stopped": "dim"}


def placement(config: ClusterConfig, plan: Plan) -> Table:
    """Which node runs where, at which ports."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("host", "node", "pool", "address", "GPU"):
        table.add_column(column, no_wrap=True)
    for column in ("control", "data", "metrics"):
        table.add_column(column, justify="right", no_wrap=True)
    for host in config.hosts:
        for spec in plan.nodes_on(host.name):
            ports = [str(port) for port in (spec.control_port, spec.data_port, spec.metrics_port)]
            gpus = ", ".join(map(str, spec.gpus))
            table.add_row(host.name, spec.name, spec.pool, spec.address, gpus, *ports)
    return table


def memory(config: ClusterConfig, plan: Plan, found: Survey | None) -> Table:
    """What each host's nodes take of what is there."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("host", "needs", "available"):
        table.add_column(column, justify="left" if column == "host" else "right", no_wrap=True)
    table.add_column("for")
    for host in config.hosts:
        asked = needs_on(host, plan)
        seen = found.seen.get(host.name) if found else None
        there = gib(seen.facts.available_bytes) if seen else ""
        parts = ", ".join(f"{gib(need.nbytes)} {need.what}" for need in asked)
        table.add_row(host.name, gib(sum(need.nbytes for need in asked)), there, f"[dim]{parts}[/]")
    return table


def changes(plan: Plan, found: Mapping[str, Changes | HostFault]) -> list[str]:
    """A line for each node that would be started, started anew or stopped, and for each host that does not say it."""
    lines: list[str] = []
    for host, would in found.items():
        if isinstance(would, HostFault):
            lines.append(f"? {host} does not say what would change there: {would}")
            continue
        new = {spec.name for spec in plan.nodes_on(host)}
        lines += [f"+ {name} starts on {host}" for name in would.start if name in new]
        lines += [f"~ {name} is started anew on {host}: something that it reads has changed" for name in would.restart]
        lines += [f"- {name} ends on {host}" for name in would.stop]
    return lines or ["Nothing would change."]


def faults(findings: Sequence[Finding]) -> Table:
    """A line for each, with what to do."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("host", "about", "what is wrong", "what to do"):
        table.add_column(column, no_wrap=column in ("host", "about"))
    for finding in findings:
        colour = "red" if finding.fatal else "yellow"
        table.add_row(finding.host, finding.subject, f"[{colour}]{finding.fault}[/]", finding.remedy)
    return table


def pairs(measured: Mapping[tuple[str, str], Measured]) -> Table:
    """What each host found of each other."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("host", "from and to"):
        table.add_column(column, no_wrap=True)
    for column in ("ping", "first MiB", "read", "written"):
        table.add_column(column, justify="right", no_wrap=True)
    for (reader, owner), each in measured.items():
        if each.fault:
            table.add_row(reader, owner, f"{each.ping_s * 1e3:.2f} ms" if each.ping_s else "", "[red]no[/]")
            continue
        rates = [f"{rate / 1e9:.2f} GB/s" for rate in (each.read_bytes_s, each.write_bytes_s)]
        table.add_row(reader, owner, f"{each.ping_s * 1e3:.2f} ms", f"{each.first_s * 1e3:.1f} ms", *rates)
    return table


def fleet_status(reports: Mapping[str, HostReport], silent: Mapping[str, str]) -> Table:
    """The nodes of all hosts, and the hosts that did not answer."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("host", "node", "state", "phase", "supervisor", "version"):
        table.add_column(column, no_wrap=True)
    for column in ("pid", "restarts", "for"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("said last")
    for name, report in reports.items():
        for node in report.nodes:
            table.add_row(name, *_row(node, report))
        if not report.nodes:
            table.add_row(name, "[dim]nothing runs here[/]")
    for name, fault in silent.items():
        table.add_row(name, "", "[red]no answer[/]", *[""] * 6, fault)
    return table


def _row(node: NodeReport, report: HostReport) -> list[str]:
    colour = _COLOURS.get(node.state, "red")
    lasting = f"{node.since_s:.0f} s" if node.since_s < 600 else f"{node.since_s / 60:.0f} min"
    pid = str(node.pid or "")
    state = f"[{colour}]{node.state}[/]"
    phase = node.phase if node.pid else ""
    return [
        node.name,
        state,
        phase,
        report.supervisor,
        report.version,
        pid,
        str(node.restarts),
        lasting,
        node.last_line,
    ]


def gib(nbytes: int) -> str:
    """A size; empty for none."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes else ""

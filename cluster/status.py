"""``tracehaul status``: the members as the router sees them, and what else runs or should run on this machine."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from cluster.hosts.managers import present
from cluster.hosts.orders import NodeReport
from cluster.processes import ProcessRecord, age_s, alive, frozen
from cluster.rundir import ClusterFault, NodeState, RunDir
from router.fleet.members import NodeStatus

_ON_THE_WAY = ("starting", "loading model", "stopping")
"""Phases of a node that need not be a member."""


class Local(NamedTuple):
    """A node of this machine that the router does not list."""

    name: str
    health: str
    color: str
    metrics: str = ""


def outside(run: RunDir, names: Sequence[str], members: Sequence[str], *, answers: bool) -> list[Local]:
    """What runs or should run here and is no member, by name. ``names``: of the plan; ``answers``: the router does."""
    records = {record.name: record for record in run.records()}
    found: list[Local] = []
    for name in sorted({*names, *records} - {*members}):
        record = records.get(name)
        if record is None or not alive(record):
            found.append(Local(name, "dead", "red"))
            continue
        state = run.state(name)
        is_router = name.startswith("router")
        health, color = _standing(record, state, serves=is_router and answers, is_router=is_router)
        found.append(Local(name, health, color, state.metrics))
    return found


def _standing(record: ProcessRecord, state: NodeState, *, serves: bool, is_router: bool) -> tuple[str, str]:
    """What a living process that is no member is, and the color to say it in."""
    up = f"(up {_age(age_s(record))})"
    absent = "no answer" if is_router else "no member"
    if frozen(record):
        return f"frozen, {absent} {up}", "yellow"
    if serves:
        return "ready", "green"
    if state.phase in _ON_THE_WAY:
        return f"{state.phase} {up}", "yellow"
    return f"alive, {absent} {up}", "yellow"


def mending(run: RunDir, locals_: Sequence[Local], why: str) -> str:
    """What to do where no router answers, in one line."""
    option = _option(run)
    if all(local.health == "dead" for local in locals_):
        return f"no node of the cluster in {run.path} runs; start one with: tracehaul up{option}"
    routers = [local for local in locals_ if local.name.startswith("router")]
    names = " ".join(local.name for local in routers) or "router-0"
    if any(local.health.startswith(_ON_THE_WAY) for local in routers):
        return f"{why}; {names} is on its way: see {run.log(routers[0].name)}"
    return f"{why}; the nodes above live on. Bring it back with: tracehaul restart {names}{option}"


def supervision(run: RunDir) -> list[str]:
    """A line for each node here that its supervisor waits for or leaves alone, and one if nobody supervises those that
    run, with the command that mends it."""
    try:
        report = present(run).status()
    except ClusterFault as fault:
        return [str(fault)]
    option = _option(run)
    if report.supervisor == "none":
        again = f"`tracehaul launch` brings a supervisor to {report.host}" if report.host else f"tracehaul up{option}"
        lives = any(node.pid is not None for node in report.nodes)
        return [f"nobody starts these nodes again when they die: their supervisor has ended; {again}"] if lives else []
    return [line for node in report.nodes if (line := _told(node, f"tracehaul restart {node.name}{option}"))]


def _told(node: NodeReport, command: str) -> str:
    why = f" ({node.last_line.strip()})" if node.last_line else ""
    ended = "" if node.exit_code is None else f", the last time with code {node.exit_code}"
    match node.state:
        case "backoff" | "faulty":
            return f"{node.name} ended{ended}{why}; it is started again, {node.restarts} times so far"
        case "given up":
            deaths = "it died" if node.restarts == 0 else f"it died {node.restarts + 1} times"
            return f"{node.name} is left alone: {deaths}{ended}{why}. Start it with: {command}"
        case "fenced":
            return f"{node.name} is left alone: another node has its name. Once that is gone: {command}"
        case _:
            return ""


def _option(run: RunDir) -> str:
    return "" if run.path.name == ".run" else f" --run-dir {run.path}"


def table(url: str, nodes: Sequence[NodeStatus], run: RunDir | None, locals_: Sequence[Local], *, wide: bool) -> Table:
    """The members, then ``locals_``; with ``run``, and where there is room, also how KV moves and where metrics are."""
    models = sorted({node.info.model for node in nodes if node.info.model})
    shown = Table(title=f"{url}  {', '.join(models) or 'no model yet'}", title_justify="left", box=box.SIMPLE_HEAD)
    pools = any(node.info.pool for node in nodes)
    for column in ("node", "role", *(("pool",) if pools else ()), "health"):
        shown.add_column(column, no_wrap=True)
    for column in ("running", "waiting", "blocks", "MiB used", "started"):
        shown.add_column(column, justify="right", no_wrap=True)
    if wide:
        shown.add_column("KV by", no_wrap=True)
        shown.add_column("metrics", no_wrap=True)
    stopped = {record.name for record in run.records() if frozen(record)} if run else set[str]()
    for node in nodes:
        shown.add_row(*_member(node, pools=pools, stopped=node.info.node in stopped, wide=wide))
    for local in locals_:
        role = [local.name.partition("-")[0], *([""] if pools else [])]
        health = f"[{local.color}]{local.health}[/]"
        shown.add_row(local.name, *role, health, *[""] * 5, *(["", local.metrics] if wide else []))
    return shown


def _member(node: NodeStatus, *, pools: bool, stopped: bool, wide: bool) -> Iterator[str]:
    """Its cells."""
    info, load = node.info, node.load
    yield from (info.node, info.role, *((info.pool,) if pools else ()))
    health = node.health if node.health == "ready" else f"{node.health} {_age(node.heartbeat_age_s)}"
    if stopped:
        health = f"frozen, unheard {_age(node.heartbeat_age_s)}"
    shown = f"[green]{health}[/]" if node.health == "ready" and not stopped else f"[yellow]{health}[/]"
    said = "; ".join(filter(None, (load.fault, load.note)))
    yield f"{shown} [yellow]{escape(said)}[/]" if said else shown
    yield from (str(load.running), str(load.waiting), str(load.blocks) if info.role == "store" else "")
    yield f"{load.bytes_used / 2**20:.0f}/{load.bytes_max / 2**20:.0f}"
    yield f"{datetime.fromtimestamp(info.started_s, UTC):%H:%M:%S}Z" if info.started_s else ""
    if wide:
        yield ", ".join(escape(how.partition(" (")[0]) for how in info.transports)
        yield info.metrics


def _age(seconds: float) -> str:
    """As short as it may be read."""
    if seconds < 120:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}min" if seconds < 7200 else f"{seconds / 3600:.0f}h"

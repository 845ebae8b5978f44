"""What the commands about hosts do, from the config's file to the last host's answer."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from cluster.config import Role
from cluster.config_file import load_config
from cluster.fleet.bundle import Bundle, make_bundle, read_bundle
from cluster.fleet.config import LOCAL
from cluster.fleet.connection import HostFault, connections
from cluster.fleet.draining import drain, given_away
from cluster.fleet.launch import Launching, Outcome, apply, hands_of, on_all, wait_ready
from cluster.fleet.needs import needs_on
from cluster.fleet.opened import Opened
from cluster.fleet.placing import order_for, place
from cluster.fleet.progress import progress
from cluster.fleet.survey import Hand, Survey, addresses_of, model_digests, survey
from cluster.hosts.changes import Changes
from cluster.hosts.orders import HostReport, stages
from cluster.launch import make_plan
from cluster.plan import Plan
from cluster.rundir import ClusterFault
from cluster.security.config import decided
from tracehaul.model.source import user_cache_dir


class Ready(NamedTuple):
    """A fleet that may be started or changed."""

    plan: Plan
    found: Survey
    digests: Mapping[str, str]


@asynccontextmanager
async def opened(path: Path) -> AsyncGenerator[Opened]:
    """The config in that file, with its ``[security]`` decided.

    Raises:
        ClusterFault: it cannot be read, or names no hosts.
    """
    config = load_config(path, {})
    if not config.hosts:
        raise ClusterFault(f"{path} names no [[hosts]]; `tracehaul up --config {path}` starts it on this machine")
    alone = all(host.target == LOCAL for host in config.hosts) and len(config.hosts) == 1
    security = decided(config.security, fleet=not alone)
    config = msgspec.structs.replace(config, security=security)
    async with connections(config.hosts) as ways:
        yield Opened(config, [Hand(host, ways[host.name]) for host in config.hosts])


async def look_at(fleet: Opened, console: Console, hands: Sequence[Hand] | None = None) -> Ready:
    """Plan it, and look at the hosts; ``hands``: at these alone.

    Raises:
        ClusterFault: the model cannot be had here, or ssh does not know where a host is.
    """
    try:
        plan = make_plan(fleet.config, console, place(fleet.config, await addresses_of(fleet.hands)))
    except HostFault as fault:
        raise ClusterFault(str(fault)) from fault
    digests = await asyncio.to_thread(model_digests, plan)
    needs = {hand.host.name: needs_on(hand.host, plan) for hand in fleet.hands}
    found = await survey(fleet.config, plan, fleet.hands if hands is None else hands, digests, needs)
    return Ready(plan, found, digests)


async def changes_of(fleet: Opened, ready: Ready) -> dict[str, Changes | HostFault]:
    """What a launch would do, by host, as far as hosts answer: where nothing is installed it starts all. A fault is of
    one that does not say it; its release may not know the question."""
    hands = {hand.host.name: hand for hand in fleet.hands if hand.host.name in ready.found.seen}

    async def one(hand: Hand) -> Changes | HostFault:
        host = hand.host
        if host.name not in ready.found.reports:
            return Changes(start=tuple(spec.name for spec in ready.plan.nodes_on(host.name)))
        order = order_for(host, ready.plan, ready.found.seen[host.name].facts.home, ready.digests)
        try:
            told = await hand.tell(["host", "apply", "--dry-run"], msgspec.json.encode(order, enc_hook=str))
            return msgspec.json.decode(told, type=Changes)
        except (HostFault, msgspec.DecodeError) as fault:
            return HostFault(str(fault))

    return dict(zip(hands, await asyncio.gather(*map(one, hands.values())), strict=True))


async def bundles_for(
    hands: Sequence[Hand], found: Survey, given: Sequence[Path], told: Callable[[str], None]
) -> dict[tuple[str, str], Bundle]:
    """A bundle for each kind of host that is to be installed: those that are given, or made now.

    Raises:
        ClusterFault: one that is given is none, or cannot be made.
    """
    bundles: dict[tuple[str, str], Bundle] = {}
    for path in given:
        bundle = read_bundle(path)
        bundles[bundle.manifest.python, bundle.manifest.machine] = bundle
    if given:
        return bundles
    for hand in hands:
        seen = found.seen.get(hand.host.name)
        if seen is None or hand.host.environment or found.fatal(hand.host.name):
            continue
        key = ".".join(seen.facts.python.split(".")[:2]), seen.facts.machine
        if key not in bundles:
            bundles[key] = await asyncio.to_thread(make_bundle, user_cache_dir() / "bundles", *key, told)
    return bundles


async def launch(
    fleet: Opened, console: Console, given: Sequence[Path], only: Sequence[str] = (), *, rolling: bool = False
) -> Outcome:
    """Bring these hosts, or all, to what the config says, and wait until their nodes serve.

    ``rolling``: one host after the other.

    Raises:
        ClusterFault: nothing can be started on any of them.
    """
    hands = hands_of(fleet.hands, fleet.config, only)
    ready = await look_at(fleet, console, hands)
    bundles = await bundles_for(hands, ready.found, given, lambda line: console.print(line, highlight=False))
    launching = Launching(ready.plan, ready.found, bundles, ready.digests)
    with progress(console, [hand.host.name for hand in hands]) as shown:

        async def one(hand: Hand) -> HostReport:
            told = shown.of(hand.host.name)
            order = await launching.prepare(hand, told)
            await apply(hand, order, told)
            names = [spec.name for spec in order.nodes]
            return await wait_ready(hand, names, fleet.config.start_timeout_s, told)

        async def in_turn(hand: Hand) -> HostReport:
            report = await hand.report()
            nodes = report.nodes if report is not None else ()
            stores = {node.name: hand for node in nodes if node.role == "store" and node.pid is not None}
            async with given_away(fleet, stores, shown.of(hand.host.name)):
                return await one(hand)

        if not rolling:
            return await on_all(hands, one, shown)
        reports: dict[str, HostReport] = {}
        faults: dict[str, str] = {}
        for hand in hands:  # the first that fails ends it: the others serve on as they are
            outcome = await on_all([hand], in_turn, shown)
            reports |= outcome.reports
            faults |= outcome.faults
            if faults:
                break
        return Outcome(reports, faults)


async def reports_of(hands: Sequence[Hand]) -> Outcome:
    """What runs on each of them."""
    reports: dict[str, HostReport] = {}
    faults: dict[str, str] = {}

    async def one(hand: Hand) -> None:
        try:
            report = await hand.report()
            reports[hand.host.name] = report or HostReport(hand.host.name, "none", (), "")
        except HostFault as fault:
            faults[hand.host.name] = str(fault)

    await asyncio.gather(*map(one, hands))
    order = [hand.host.name for hand in hands]
    return Outcome({name: reports[name] for name in order if name in reports}, faults)


async def stop(fleet: Opened, only: Sequence[str], console: Console, *, drained: bool = False) -> Outcome:
    """End what runs on these hosts, or all: those who let work in, then those who compute, then the stores.

    ``drained``: the stores' blocks go to others first.

    Raises:
        ClusterFault: there is no such host, or a store cannot be drained; nothing was stopped then.
    """
    hands = hands_of(fleet.hands, fleet.config, only)
    before = await reports_of(hands)
    roles: dict[str, Role] = {
        node.name: node.role for report in before.reports.values() for node in report.nodes if node.pid
    }
    if drained:
        await drain([name for name, role in roles.items() if role == "store"], fleet, hands)
    running = [hand for hand in hands if hand.host.name in before.reports]
    timeout_s = fleet.config.drain_timeout_s + 60.0
    faults = dict(before.faults)
    with progress(console, [hand.host.name for hand in hands]) as shown:
        for host, fault in faults.items():
            shown.tell(host, fault, failed=True)
        for names in stages(roles):

            async def one(hand: Hand, names: Sequence[str] = names) -> HostReport:
                own = [node.name for node in before.reports[hand.host.name].nodes if node.name in names]
                if own:
                    shown.tell(hand.host.name, f"stopping {', '.join(own)}")
                    await hand.tell(["host", "stop", *own], timeout_s=timeout_s)
                return before.reports[hand.host.name]

            faults.update((await on_all(running, one, shown)).faults)

        async def end(hand: Hand) -> HostReport:
            if before.reports[hand.host.name].supervisor != "none":
                await hand.tell(["host", "stop"], timeout_s=timeout_s)  # its supervisor, too
            shown.tell(hand.host.name, "ready: nothing runs")
            return before.reports[hand.host.name]

        ended = await on_all([hand for hand in running if hand.host.name not in faults], end, shown)
    return Outcome(ended.reports, {**faults, **ended.faults})


async def restart(fleet: Opened, names: Sequence[str], console: Console, *, rolling: bool) -> Outcome:
    """Stop these nodes and start them anew, the dead ones too; the others serve on.

    ``rolling``: one at a time, each once the one before it serves; all of them if none is named.

    Raises:
        ClusterFault: there is no such node.
    """
    before = await reports_of(fleet.hands)
    where = {node.name: host for host, report in before.reports.items() for node in report.nodes}
    reported = [node for report in before.reports.values() for node in report.nodes]
    roles = {node.name: node.role for node in reported}
    if strangers := [name for name in names if name not in where]:
        silent = f" on the hosts that answer ({', '.join(before.faults)} did not)" if before.faults else ""
        raise ClusterFault(f"no node {strangers[0]}{silent}; there are {', '.join(where)}")
    chosen = list(dict.fromkeys(names)) or [node.name for node in reported if node.state != "stopped"]
    hands = {hand.host.name: hand for hand in fleet.hands}
    timeout_s = fleet.config.drain_timeout_s + 60.0
    faults = dict(before.faults) if not names else {}
    reports: dict[str, HostReport] = {}
    with progress(console, chosen) as shown:

        async def one(name: str) -> None:
            host = where[name]
            try:
                stores = {name: hands[host]} if rolling and roles[name] == "store" else {}
                async with given_away(fleet, stores, shown.of(name)):
                    shown.tell(name, "stopping")
                    await hands[host].tell(["host", "restart", name], timeout_s=timeout_s)
                    reports[host] = await wait_ready(hands[host], [name], fleet.config.start_timeout_s, shown.of(name))
            except HostFault as fault:
                faults[host] = str(fault)
                shown.tell(name, str(fault), failed=True)

        if not rolling:
            await asyncio.gather(*map(one, chosen))
        else:
            for name in chosen:
                if faults:
                    break
                await one(name)
    return Outcome(reports, faults)


def fault_of(outcome: Outcome) -> ClusterFault | None:
    """One line, if a host failed."""
    if not outcome.faults:
        return None
    failed = "; ".join(f"{name}: {fault}" for name, fault in outcome.faults.items())
    well = [name for name in outcome.reports if name not in outcome.faults]
    others = f"; the others serve: {', '.join(well)}" if well else ""
    return ClusterFault(f"{failed}{others}")


def encode(outcome: Outcome) -> bytes:
    """For ``--json``."""
    return msgspec.json.format(msgspec.json.encode({"hosts": outcome.reports, "faults": outcome.faults}))

"""What is wrong with a fleet, before it is started or while it runs, and what to do about it."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Literal

import msgspec

from cluster.config import ClusterConfig
from cluster.fleet.connection import HostFault
from cluster.fleet.findings import Finding
from cluster.fleet.survey import Hand, Survey, whole
from cluster.hosts.orders import HostReport
from cluster.hosts.pair import Answers, Measured, Offer, Questions
from cluster.plan import NodeSpec, Plan
from cluster.security.secrets import FOLDER
from tracehaul.runtime.credentials import CERT_FILE
from tracehaul.transfer.place import Place

TRIAL_PORT = 190
"""From the config's first: between the routers' and the stores'."""
MEASURE_S = 180.0
PING_MAX_S = 0.005
SLOW = 0.4
"""A way is slow that carries less than this share of the median of all."""
PAIRS_MAX = 64
"""Of more hosts each tries its neighbours alone."""

Pairs = Mapping[tuple[str, str], Measured]
"""By who read and who was read from."""


class Health(msgspec.Struct, frozen=True):
    """For ``--json``."""

    findings: Sequence[Finding]
    pairs: dict[str, Measured]
    """By ``reader<owner``."""


async def try_pairs(
    config: ClusterConfig, plan: Plan, hands: Sequence[Hand], found: Survey
) -> tuple[Pairs, list[Finding]]:
    """Every host against every other, by the transport of the nodes, and with certificates where they have them; those
    without a release are left out, aloud."""
    findings: list[Finding] = []
    able: list[Hand] = []
    for hand in hands:
        name = hand.host.name
        if name in found.reports:
            able.append(hand)
        elif name in found.seen:
            remedy = "`tracehaul launch` installs one; then ask again"
            findings.append(Finding(name, "network", "not tried: nothing is installed there yet", remedy, fatal=False))
    proven = config.security.control == "mtls" and await _all_certified(able, findings)
    measured: dict[tuple[str, str], Measured] = {}
    async with AsyncExitStack() as stack:
        offers: dict[str, Offer] = {}
        for hand in able:
            try:
                line = await stack.enter_async_context(hand.hold(_words("offer", hand, config, plan, proven=proven)))
                offers[hand.host.name] = msgspec.json.decode(line, type=Offer)
            except (HostFault, msgspec.DecodeError) as fault:
                findings.append(
                    Finding(hand.host.name, "network", str(fault), "see `address`, `listen`, `transport` in the file")
                )
        for hand in able:  # one after the other: they share links
            name = hand.host.name
            others = _others(name, [each.host.name for each in able])
            asked = Questions(
                {other: offers[other] for other in others if other in offers},
                {spec.name: spec.control for spec in plan.nodes if spec.host in others and _runs(spec, found)},
            )
            try:
                told = await hand.ask(
                    _words("measure", hand, config, plan, proven=proven), msgspec.json.encode(asked), MEASURE_S
                )
                answers = msgspec.json.decode(told, type=Answers)
            except (HostFault, msgspec.DecodeError) as fault:
                findings.append(Finding(name, "network", str(fault), "see `tracehaul host measure --help` there"))
                continue
            measured |= {(name, other): each for other, each in answers.measured.items()}
            for node, fault in answers.unreached.items():
                remedy = f"open the port for {name}, or see whether {node} is frozen"
                findings.append(Finding(name, "ports", f"does not reach {node}: {fault}", remedy))
    return measured, findings + of_pairs(measured)


def _others(name: str, names: Sequence[str]) -> list[str]:
    """Whom a host tries: all, or of many the next in the round."""
    at = names.index(name)
    turned = [*names[at + 1 :], *names[:at]]
    return turned if len(names) * (len(names) - 1) <= PAIRS_MAX else turned[:2]


def _runs(spec: NodeSpec, found: Survey) -> bool:
    report = found.reports.get(spec.host)
    return report is not None and any(node.name == spec.name and node.pid is not None for node in report.nodes)


async def _all_certified(hands: Sequence[Hand], findings: list[Finding]) -> bool:
    """Whether each has a certificate to be tried with; those that have none are told."""
    lacking: list[str] = []
    for hand in hands:
        try:
            done = await hand.way.run(["sh", "-c", f"test -s {whole(f'{hand.run_dir}/{FOLDER}/{CERT_FILE}')}"])
        except HostFault:
            continue  # it is told where it is tried
        if done.code != 0:
            lacking.append(hand.host.name)
    for name in lacking:
        fault = "it has no certificate yet: hosts were tried without"
        findings.append(Finding(name, "network", fault, "`tracehaul launch` lays one; then ask again", fatal=False))
    return not lacking


def _words(
    command: Literal["offer", "measure"], hand: Hand, config: ClusterConfig, plan: Plan, *, proven: bool
) -> list[str]:
    """What that host runs: where its nodes would be, at ports that no node has; ``proven``: with its certificate."""
    port = config.network.ports + TRIAL_PORT
    nodes = plan.nodes_on(hand.host.name)
    place = nodes[0].data if nodes else Place(hand.host.listen or hand.host.address, hand.host.address)
    place = msgspec.structs.replace(place, port=port + 1 if command == "offer" else port + 2)
    words = ["host", command, "--kind", plan.transports[-1], "--place", msgspec.json.encode(place).decode()]
    if proven:
        words += ["--secrets", f"{hand.run_dir}/{FOLDER}", "--data", config.security.data or "plain"]
    return [*words, "--port", str(port)] if command == "offer" else words


def of_pairs(measured: Pairs) -> list[Finding]:
    """What the trials show."""
    findings: list[Finding] = []
    rates = [each.read_bytes_s for each in measured.values() if not each.fault]
    usual = statistics.median(rates) if rates else 0.0
    for (reader, owner), each in measured.items():
        if each.ping_s > PING_MAX_S:
            fault = f"{each.ping_s * 1e3:.1f} ms to {owner} and back"
            findings.append(Finding(reader, "network", fault, "are they in one place? see `mtr`", fatal=False))
        if each.fault:
            remedy = f"open {owner}'s ports for {reader}; see `address`, `data_address`, `ucx_devices` in the file"
            findings.append(Finding(reader, "network", f"does not read from {owner}: {each.fault}", remedy))
            continue
        if each.read_bytes_s < SLOW * usual:
            fault = f"{each.read_bytes_s / 1e9:.2f} GB/s from {owner}, others {usual / 1e9:.2f}"
            remedy = "see the link's speed (`ethtool`), its errors (`ip -s link`), and who else uses it"
            findings.append(Finding(reader, "network", fault, remedy, fatal=False))
    return findings


def of_reports(reports: Mapping[str, HostReport]) -> list[Finding]:
    """What supervisors say of the nodes."""
    findings: list[Finding] = []
    for host, report in reports.items():
        for node in report.nodes:
            if node.state in ("given up", "fenced", "faulty", "backoff"):
                fault = f"{node.name} is {node.state}: {node.last_line}"
                remedy = f"tracehaul logs {node.name}; then: tracehaul restart {node.name}"
                findings.append(Finding(host, "nodes", fault, remedy, fatal=False))
        findings += [Finding(host, "nodes", fault, "see its run directory", fatal=False) for fault in report.faults]
    return findings

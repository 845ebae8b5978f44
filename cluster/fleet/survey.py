"""All hosts of a config looked at, at once: where they are, what they have, what runs there, what is wrong."""

import asyncio
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

import msgspec

from cluster.config import ClusterConfig
from cluster.fleet.config import HostConfig
from cluster.fleet.connection import Connection, HostFault
from cluster.fleet.facts import Asked, Seen, look, ports_of
from cluster.fleet.findings import Finding, of_fleet, of_host, of_transport
from cluster.fleet.placing import model_paths
from cluster.fleet.probe import digest
from cluster.hosts.orders import HostReport
from cluster.memory import Need
from cluster.plan import Plan
from tracehaul.model.source import user_cache_dir

REPORT_S = 30.0


class Hand(NamedTuple):
    """A host, and what reaches it."""

    host: HostConfig
    way: Connection

    @property
    def tracehaul(self) -> str:
        """The command there; ``~`` is not resolved."""
        folder = self.host.environment or f"{self.host.home}/current"
        return f"{folder}/bin/tracehaul"

    @property
    def run_dir(self) -> str:
        """Where its nodes' logs and states are."""
        return f"{self.host.home}/run"

    async def tell(self, words: Sequence[str], stdin: bytes = b"", timeout_s: float = REPORT_S) -> bytes:
        """Run a command of ``tracehaul`` there, about the cluster in its run directory; what it prints.

        Raises:
            HostFault: it fails; the message is its last line.
        """
        return await self._ask(" ".join([self._words(words), "--run-dir", whole(self.run_dir)]), stdin, timeout_s)

    async def ask(self, words: Sequence[str], stdin: bytes, timeout_s: float) -> bytes:
        """As :meth:`tell`, of a command that is about no cluster."""
        return await self._ask(self._words(words), stdin, timeout_s)

    async def _ask(self, line: str, stdin: bytes, timeout_s: float) -> bytes:
        done = await self.way.run(["sh", "-c", line], stdin, timeout_s)
        if done.code != 0:
            raise HostFault(done.last_line.removeprefix("tracehaul: ") or f"exit code {done.code}")
        return done.out

    def hold(self, words: Sequence[str]) -> AbstractAsyncContextManager[bytes]:
        """As :meth:`cluster.fleet.connection.Connection.hold`, of a command of ``tracehaul`` there."""
        return self.way.hold(["sh", "-c", self._words(words)])

    def _words(self, words: Sequence[str]) -> str:
        return " ".join([whole(self.tracehaul), *map(shlex.quote, words)])

    async def report(self) -> HostReport | None:
        """What runs there; None: nothing was installed there.

        Raises:
            HostFault: as :meth:`tell`, or it answers what this version does not understand.
        """
        there = await self.way.run(["sh", "-c", f"test -e {whole(self.tracehaul)}"])
        if there.code != 0:
            return None
        try:
            return msgspec.json.decode(await self.tell(["host", "status"]), type=HostReport)
        except msgspec.DecodeError as error:
            raise HostFault(f"its tracehaul answers nonsense: {error}") from error


def whole(path: str) -> str:
    """A path for a shell there, which knows where ``~`` is."""
    return '"$HOME"' + shlex.quote(path[1:]) if path.startswith("~/") else shlex.quote(path)


class Survey(NamedTuple):
    """What was found."""

    seen: Mapping[str, Seen]
    """Of the hosts that answered."""
    reports: Mapping[str, HostReport]
    """Of those where something was installed."""
    findings: Sequence[Finding]

    def fatal(self, host: str) -> list[Finding]:
        """Why nothing may be started there."""
        return [finding for finding in self.findings if finding.host == host and finding.fatal]


async def addresses_of(hands: Sequence[Hand]) -> dict[str, str]:
    """Where those hosts are that do not say an address: where ssh goes.

    Raises:
        HostFault: ssh itself does not know.
    """
    silent = [hand for hand in hands if not hand.host.address]
    found = await asyncio.gather(*(hand.way.address() for hand in silent))
    return {hand.host.name: address for hand, address in zip(silent, found, strict=True)}


def model_digests(plan: Plan) -> dict[str, str]:
    """Of the models' files on this machine, by pool."""
    kept = str(user_cache_dir() / "digests.json")
    return {pool.name: digest(str(pool.model.path), kept) for pool in plan.pools}


async def survey(
    config: ClusterConfig,
    plan: Plan,
    hands: Sequence[Hand],
    digests: Mapping[str, str],
    needs: Mapping[str, Sequence[Need]],
) -> Survey:
    """Look at all of them. ``needs``: what each host's nodes take of its memory."""
    seen: dict[str, Seen] = {}
    reports: dict[str, HostReport] = {}
    findings: list[Finding] = []

    async def one(hand: Hand) -> None:
        host = hand.host
        nodes = plan.nodes_on(host.name)
        listen = nodes[0].listen if nodes else host.listen or host.address or "127.0.0.1"
        asked = Asked(host.home, host.python, listen, ports_of(nodes), model_paths(host, plan, host.home, digests))
        try:
            found = seen[host.name] = await look(hand.way, asked)
        except HostFault as fault:
            findings.append(Finding(host.name, "ssh", str(fault), f"mend what `ssh {host.target} true` says"))
            return
        try:
            report = await hand.report()
        except HostFault as fault:
            remedy = "see what `tracehaul host status` says there, or install anew with `tracehaul upgrade`"
            findings.append(Finding(host.name, "version", str(fault), remedy, fatal=False))
            report = None
        if report is not None:
            reports[host.name] = report
        elif host.environment:
            fault = f"there is no {hand.tracehaul}"
            findings.append(Finding(host.name, "version", fault, "install tracehaul there, or leave `environment` out"))
        running = report is not None and any(node.pid for node in report.nodes)
        findings.extend(of_host(host, found, nodes, needs.get(host.name, ()), running))
        findings.extend(of_transport(config, host, found.facts))

    await asyncio.gather(*map(one, hands))
    order = [host.name for host in config.hosts]
    addresses = {spec.host: spec.data.address for spec in plan.nodes}
    findings += of_fleet(config, seen, digests, addresses)
    return Survey(seen, reports, sorted(findings, key=lambda finding: order.index(finding.host)))

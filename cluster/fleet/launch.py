"""Starts, changes and stops a fleet from one machine: all hosts at once, each for itself.

A host that fails takes no other along. Nothing is remembered here: what runs is what the hosts say, so another machine
with the same config goes on where this one ended, and what is done already is not done again.
"""

import asyncio
import contextlib
import os
import shlex
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from cluster.api import new_secret
from cluster.config import ClusterConfig
from cluster.fleet.bundle import Bundle
from cluster.fleet.connection import HostFault
from cluster.fleet.facts import Asked, Facts, look
from cluster.fleet.install import Told, install, put, put_model
from cluster.fleet.placing import API_FILES, order_for, pools_on
from cluster.fleet.progress import DONE, Progress
from cluster.fleet.survey import Hand, Survey
from cluster.hosts.orders import HostReport, NodeReport, Order
from cluster.plan import Plan
from cluster.rundir import OPERATOR_KEY, ClusterFault
from cluster.security.config import SecurityConfig, clash
from cluster.security.secrets import FOLDER
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import CA_FILE

APPLY_S = 120.0
POLL_S = 0.5
ENVIRONMENT = "AWS_"
"""Variables of this beginning go to the hosts that have a bucket."""


class Outcome(NamedTuple):
    """What became of the hosts."""

    reports: Mapping[str, HostReport]
    faults: Mapping[str, str]
    """Why the others failed, in a line each."""


async def on_all(hands: Sequence[Hand], do: Callable[[Hand], Awaitable[HostReport]], progress: Progress) -> Outcome:
    """Each host for itself; what one raises is its fault alone."""
    reports: dict[str, HostReport] = {}
    faults: dict[str, str] = {}

    async def one(hand: Hand) -> None:
        name = hand.host.name
        try:
            reports[name] = await do(hand)
        except HostFault as fault:
            faults[name] = str(fault)
            progress.tell(name, str(fault), failed=True)

    await asyncio.gather(*map(one, hands))
    return Outcome(reports, faults)


class _Security(msgspec.Struct, frozen=True):
    """What of a plan's ``[security]`` all nodes of a cluster have to agree on; of whatever version it is."""

    control: Literal["plain", "mtls"] | None = None
    data: Literal["plain", "auth", "tls"] | None = None
    token: bool | None = None


class _Config(msgspec.Struct, frozen=True):
    security: _Security = _Security()


class _Launched(msgspec.Struct, frozen=True):
    """A plan, as much of it as is read here."""

    config: _Config


class Launching:
    """One launch: what goes to each host."""

    def __init__(
        self, plan: Plan, found: Survey, bundles: Mapping[tuple[str, str], Bundle], digests: Mapping[str, str]
    ) -> None:
        """``bundles``: by Python's version and machine. ``digests``: of the pools' models."""
        self._plan = plan
        self._found = found
        self._bundles = bundles
        self._digests = digests

    async def prepare(self, hand: Hand, told: Told) -> Order:
        """Everything there that its nodes need; what they are to run.

        Raises:
            HostFault: it cannot be had. Nothing that runs was touched.
        """
        host, name = hand.host, hand.host.name
        if fatal := self._found.fatal(name):
            raise HostFault("; ".join(f"{finding.fault}: {finding.remedy}" for finding in fatal))
        await asyncio.to_thread(self._check_authority)
        facts = self._found.seen[name].facts
        report = self._found.reports.get(name)
        if report is not None and any(node.pid is not None for node in report.nodes):
            await self._check_security(hand, facts)
        if not host.environment:
            key = ".".join(facts.python.split(".")[:2]), facts.machine
            if key not in self._bundles:
                raise HostFault(f"no bundle is for Python {key[0]} on {key[1]}: make one with `tracehaul bundle`")
            await install(hand.way, host, facts, self._bundles[key], told)
        order = order_for(host, self._plan, facts.home, self._digests)
        for pool in pools_on(self._plan, name):
            await self._put_model(hand, facts, pool, order.plan.pool(pool).model.path, told)
        await self._put_files(hand, facts, order)
        return order

    def _check_authority(self) -> None:
        """Raises HostFault while the CA is being replaced: hosts that do not yet trust the new one would refuse it."""
        if not self._plan.config.security.secrets:
            return
        from cluster.security.laying import replacing

        try:
            if replacing(self._plan.config):
                raise HostFault("the CA is being replaced: finish `tracehaul certificates rotate --ca` first")
        except ClusterFault as fault:
            raise HostFault(str(fault)) from fault

    async def _check_security(self, hand: Hand, facts: Facts) -> None:
        """Raises HostFault if nodes that run there would not know those that this launch starts."""
        plan = shlex.quote(f"{facts.home}/run/cluster.json")
        there = await hand.way.run(["sh", "-c", f"cat {plan} 2>/dev/null || true"])
        with contextlib.suppress(msgspec.MsgspecError):  # what was lost there is not judged
            runs = msgspec.json.decode(there.out, type=_Launched).config.security
            if why := clash(SecurityConfig(runs.control, runs.data, runs.token), self._plan.config.security):
                raise HostFault(why)

    async def _put_model(self, hand: Hand, facts: Facts, pool: str, path: Path, told: Told) -> None:
        digest = self._digests[pool]
        if facts.models.get(pool) == digest:
            return
        await put_model(hand.way, self._plan.pool(pool).model.path, str(path), told)
        asked = Asked(facts.home, hand.host.python, "127.0.0.1", (), {pool: str(path)})
        if (await look(hand.way, asked)).facts.models[pool] != digest:
            raise HostFault(f"the model at {path} has other contents than this machine's: is a disk full?")

    async def _put_files(self, hand: Hand, facts: Facts, order: Order) -> None:
        """The API's files, and credentials of a bucket, for those who need them."""
        roles = {spec.role for spec in order.nodes}
        if "router" in roles:
            for name in API_FILES:
                if said := getattr(self._plan.config.api, name):
                    content = await asyncio.to_thread(_read, Path(said))
                    await put(hand.way, content, getattr(order.plan.config.api, name))
            if self._plan.config.api.keys_file:
                key = f"{facts.home}/run/{OPERATOR_KEY}"
                if (await hand.way.run(["test", "-s", key])).code != 0:
                    await put(hand.way, new_secret().encode(), key)
        if ("store" in roles and order.plan.config.s3_url) or ("router" in roles and order.plan.config.api.files_url):
            lines = [f"{name}={value}\n" for name, value in os.environ.items() if name.startswith(ENVIRONMENT)]
            await put(hand.way, "".join(sorted(lines)).encode(), f"{facts.home}/run/environment")
        if self._plan.config.security.secrets:
            await self._put_secrets(hand, f"{facts.home}/run/{FOLDER}")

    async def _put_secrets(self, hand: Hand, folder: str) -> None:
        """Certificates and the join token; nodes that run use them for connections to come."""
        from cluster.security.laying import files_for

        there = await hand.way.run(["sh", "-c", f"cat {shlex.quote(f'{folder}/{CA_FILE}')} 2>/dev/null || true"])
        try:
            config, name, now_s = self._plan.config, hand.host.name, clock.wall_s()
            nodes = self._plan.nodes_on(name)
            files = await asyncio.to_thread(files_for, config, name, nodes, there.out, now_s=now_s)
        except ClusterFault as fault:
            raise HostFault(str(fault)) from fault
        for name, content in files.items():
            await put(hand.way, content, f"{folder}/{name}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostFault(f"cannot read {path}: {error.strerror}") from error


async def apply(hand: Hand, order: Order, told: Told) -> HostReport:
    """Have that host run what it shall; returns at once, when all is started.

    Raises:
        HostFault: it cannot.
    """
    told(f"starting {len(order.nodes)} nodes")
    answer = await hand.tell(["host", "apply"], msgspec.json.encode(order, enc_hook=str), APPLY_S)
    try:
        return msgspec.json.decode(answer, type=HostReport)
    except msgspec.DecodeError as error:
        raise HostFault(f"its tracehaul answers nonsense: {error}") from error


async def wait_ready(hand: Hand, names: Sequence[str], timeout_s: float, told: Told) -> HostReport:
    """Until all of these nodes serve.

    Raises:
        HostFault: one is given up, fenced or faulty, or the time is over.
    """
    end_s = clock.now_s() + timeout_s
    while True:
        report = await hand.report()
        if report is None:
            raise HostFault("nothing is installed there any more")
        nodes = [node for node in report.nodes if node.name in names]
        if failed := [node for node in nodes if node.state in ("given up", "fenced", "faulty")]:
            raise HostFault("; ".join(f"{node.name} is {node.state}: {node.last_line}" for node in failed))
        waiting = [node for node in nodes if not serves(node)]
        if not waiting:
            told(f"{DONE}, {len(nodes)} nodes")
            return report
        stages = ", ".join(f"{node.name} {node.phase or node.state}" for node in waiting[:3])
        told(stages + (f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""))
        if clock.now_s() > end_s:
            raise HostFault(f"not ready within {timeout_s:.0f} s: {stages}; see `tracehaul logs {waiting[0].name}`")
        await asyncio.sleep(POLL_S)


def serves(node: NodeReport) -> bool:
    """Whether it says that it does."""
    return node.pid is not None and node.phase == "ready"


def hands_of(hands: Sequence[Hand], config: ClusterConfig, names: Sequence[str]) -> list[Hand]:
    """Those of these hosts; all if none is named.

    Raises:
        ClusterFault: there is none of that name.
    """
    there = [host.name for host in config.hosts]
    if strangers := [name for name in names if name not in there]:
        raise ClusterFault(f"no host {strangers[0]}; there are {', '.join(there)}")
    return [hand for hand in hands if not names or hand.host.name in names]

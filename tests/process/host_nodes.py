"""A router and stores on one host, without a model: what tests of supervision run, and how they look at it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from cluster.config import ClusterConfig
from cluster.hosts.managers import present
from cluster.hosts.orders import HostReport, NodeReport, Order
from cluster.hosts.restarts import RestartPolicy
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from tests.waiting import wait_until

MIB = 1 << 20
QUICK = RestartPolicy(delay_s=0.1, delay_max_s=0.2, deaths_max=2)


def make_plan(stores: int = 2, router: str = "", **config: object) -> Plan:
    """``router``: the host that it is on: on another, stores go on trying to join it, which takes less to start."""
    chosen = ClusterConfig(**({"store_bytes": 16 * MIB, "port": free_port(), "drain_timeout_s": 1.0} | config))  # type: ignore[arg-type]
    nodes = [NodeSpec("router-0", "router", host=router, control_port=free_port())]
    nodes += [NodeSpec(f"store-{i}", "store", control_port=free_port()) for i in range(stores)]
    return Plan(chosen, (), StoreConfig(arena_bytes=16 * MIB, slot_bytes=MIB), tuple(nodes))


def make_order(stores: int = 2, router: str = "", **config: object) -> Order:
    return Order(make_plan(stores, router, **config), "", "own", QUICK)


class Host:
    """Speaks to ``tracehaul host`` as a launch over ssh does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prefix: list[str] = []
        self._environment: dict[str, str] | None = None

    def call(self, *words: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [*self.prefix, sys.executable, "-m", "cluster.cli", "host", *words, "--run-dir", str(self.path)]
        return subprocess.run(command, input=given, capture_output=True, timeout=60, env=self._environment)

    def ask(self, *words: str, given: bytes = b"") -> HostReport:
        done = self.call(*words, given=given)
        assert done.returncode == 0, done.stderr.decode()
        return msgspec.json.decode(done.stdout, type=HostReport)

    def apply(self, order: Order) -> HostReport:
        """When all serve, or try to join a router that is elsewhere."""
        alone = not any(spec.role == "router" for spec in order.nodes)
        report = self.ask("apply", "--wait", "0" if alone else "20", given=encoded(order))
        wait_until(lambda: all(node.phase in ("joining", "ready") for node in self.status().nodes))
        return self.status() if alone else report

    def node(self, name: str) -> NodeReport:
        return by_name(self.status())[name]

    def status(self) -> HostReport:
        """Without a process of its own, so that it can be asked often."""
        return present(RunDir(self.path)).status()

    def comes_to(self, name: str, true: Callable[[NodeReport], bool], within_s: float = 20.0) -> NodeReport:
        """That node as soon as this is true of it."""
        seen: list[NodeReport] = []

        def look() -> bool:
            seen.append(self.node(name))
            return true(seen[-1])

        wait_until(look, within_s)
        return seen[-1]

    def kill(self, name: str) -> int:
        """Which process it was."""
        victim = self.node(name).pid
        assert victim
        os.kill(victim, signal.SIGKILL)
        return victim

    def comes_back(self, name: str, victim: int) -> NodeReport:
        """As another process."""
        return self.comes_to(name, lambda node: node.pid not in (victim, None) and node.phase in ("joining", "ready"))


def encoded(order: Order) -> bytes:
    return msgspec.json.encode(order, enc_hook=str)


def by_name(report: HostReport) -> dict[str, NodeReport]:
    return {node.name: node for node in report.nodes}


def pids(report: HostReport) -> dict[str, int | None]:
    return {node.name: node.pid for node in report.nodes}

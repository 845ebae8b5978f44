"""A cluster of real processes with fake engines whose routers are killed: who starts them, and kills them."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan, PoolPlan, save_plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from tracehaul.model.source import resolve
from tracehaul.runtime import clock

START_S, END_S = 90.0, 20.0
ITERATION_S = 0.04
"""A step of some forty tokens takes seconds, so that most kills hit some."""
AGAIN_S = 0.5
"""After which a supervisor starts what has died."""
NAME = "durable"
WORKERS = ("prefill-0", "decode-0", "decode-1")


class Routers:
    """The cluster; it runs between ``start`` and ``end``. ``more``: of its config."""

    def __init__(self, folder: Path, count: int, database: str, **more: Any) -> None:
        self.names = [f"router-{at}" for at in range(count)]
        ports = [free_port() for _ in self.names]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.runs = [folder / name for name in self.names]
        """Of each router; the other nodes use the first."""
        nodes = [NodeSpec(name, "router", control_port=free_port()) for name in self.names]
        nodes += [NodeSpec("store-0", "store")]
        self.metrics = [free_port() for _ in WORKERS]
        for name, port in zip(WORKERS, self.metrics, strict=True):
            nodes.append(NodeSpec(name, "prefill" if name == WORKERS[0] else "decode", "agents", metrics_port=port))
        pool = PoolPlan("agents", resolve(), PoolConfig(kv_tokens=1 << 18))
        store = StoreConfig(arena_bytes=256 << 20, slot_bytes=4096)
        for path, port in zip(self.runs, ports, strict=True):
            run = RunDir(path)
            run.create()
            config = ClusterConfig(transport="tcp", port=port, name=NAME, database=database, **more)
            save_plan(run, Plan(config, (pool,), store, tuple(nodes), name=NAME))
        self.output = folder / "output"
        """Of all processes."""
        self._environment = os.environ | {"FAKE_ITERATION_S": str(ITERATION_S)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: dict[str, float] = {}

    def start(self, name: str) -> None:
        """One node."""
        run = self.runs[self.names.index(name) if name in self.names else 0]
        words = [sys.executable, "-m", "bench.common.fake_node", "node", name, "--config", str(run / "cluster.json")]
        with self.output.open("ab") as output:
            self._processes[name] = subprocess.Popen(
                words, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    async def ready(self) -> None:
        """All of it runs and is known to every router. Raises RuntimeError if it does not come up."""
        for name in (*self.names, "store-0", *WORKERS):
            self.start(name)
        await self.known()

    async def known(self) -> None:
        """Every router knows all other nodes. Raises RuntimeError if that takes too long."""
        wanted = {"store-0", *WORKERS}
        try:
            async with asyncio.timeout(START_S), httpx.AsyncClient(trust_env=False) as http:
                for url in self.urls:
                    while await _known(http, url) != wanted:  # noqa: ASYNC110
                        await asyncio.sleep(0.2)
        except TimeoutError:
            raise RuntimeError("the cluster does not come up: " + self.output.read_text()[-2000:]) from None

    def kill(self, name: str) -> None:
        """As if its machine had lost power, but for the disk; :meth:`mend` starts it again."""
        self._processes[name].send_signal(signal.SIGKILL)
        self._processes[name].wait()
        self._killed[name] = clock.perf_s()

    def freeze(self, name: str, *, frozen: bool = True) -> None:
        """It stands still, as if its machine did; or goes on."""
        self._processes[name].send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def mend(self) -> None:
        """What a supervisor does, now and then."""
        for name, killed_s in list(self._killed.items()):
            if clock.perf_s() - killed_s >= AGAIN_S:
                del self._killed[name]
                self.start(name)

    async def sampled(self, *names: str) -> int:
        """Tokens that these workers' engines have sampled, or all workers', for whomever."""
        total = 0.0
        async with httpx.AsyncClient(trust_env=False) as http:
            for port in (self.metrics[WORKERS.index(name)] for name in names or WORKERS):
                page = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
                lines = [line for line in page.splitlines() if line.startswith("tracehaul_worker_output_tokens_total")]
                total += sum(float(line.split()[-1]) for line in lines)
        return int(total)

    def end(self) -> None:
        """All processes are gone."""
        for process in self._processes.values():
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
                os.kill(process.pid, signal.SIGCONT)
        for process in self._processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def routers(folder: Path, count: int, database: str, **more: Any) -> Generator[Routers, None, None]:
    """A cluster with so many routers; it ends with the context."""
    cluster = Routers(folder, count, database, **more)
    try:
        yield cluster
    finally:
        cluster.end()


async def _known(http: httpx.AsyncClient, url: str) -> set[str]:
    try:
        told = (await http.get(f"{url}/cluster")).json()
    except (httpx.HTTPError, ValueError):
        return set()
    return {node["info"]["node"] for node in told if node["health"] == "ready"}

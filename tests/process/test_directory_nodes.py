"""Real nodes and routers that find each other in a real etcd: a router that comes later, one that is killed."""

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import msgspec
import pytest

from cluster.config import ClusterConfig, PoolConfig
from cluster.directory.config import DirectoryConfig
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan, PoolPlan, save_plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from router.fleet.members import NodeStatus
from tests.etcd_server import Etcd
from tracehaul.model.source import resolve

START_S = 60.0
TTL_S = 2
"""Of what routers register."""


class Cluster:
    """Nodes with a plan each: none knows of another's but by etcd, where they have the cluster's name in common."""

    def __init__(self, folder: Path, etcd: str) -> None:
        self.folder, self.etcd = folder, etcd
        self.ports: dict[str, int] = {}
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, name: str, role: str) -> None:
        run = RunDir(self.folder / name)
        run.create()
        port = self.ports[name] = free_port()
        directory = DirectoryConfig(etcd=(self.etcd,), ttl_s=TTL_S)
        config = ClusterConfig(name="ours", port=port, store_bytes=1 << 20, directory=directory)
        store = StoreConfig(arena_bytes=1 << 20, slot_bytes=4096)
        spec = NodeSpec(name, role, control_port=free_port())  # type: ignore[arg-type]
        save_plan(run, Plan(config, (PoolPlan("", resolve(), PoolConfig()),), store, (spec,), name="ours"))
        words = ("-m", "cluster.cli", "node", name, "--config", str(run.plan_file))
        with run.log(name).open("ab") as output:
            self.processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, *words, stdout=output, stderr=output
            )

    async def members(self, router: str) -> list[NodeStatus]:
        """Those that a router knows; none while it does not answer."""
        async with httpx.AsyncClient(trust_env=False) as client:
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.get(f"http://127.0.0.1:{self.ports[router]}/cluster")
                return msgspec.json.decode(answer.content, type=list[NodeStatus])
        return []

    async def until(self, router: str, *names: str, note: str = "") -> dict[str, int]:
        """Until a router has these, each with such a note; their lives."""
        async with asyncio.timeout(START_S):
            while True:
                there = {status.info.node: status for status in await self.members(router) if status.health == "ready"}
                notes = [status.load.note for status in there.values()]
                if sorted(there) == sorted(names) and all(note in said and bool(note) == bool(said) for said in notes):
                    return {name: status.info.generation for name, status in there.items()}
                await asyncio.sleep(0.05)

    async def kill(self, name: str) -> None:
        self.processes[name].kill()
        await self.processes[name].wait()


@contextlib.asynccontextmanager
async def cluster(folder: Path, etcd: Etcd) -> AsyncGenerator[Cluster]:
    made = Cluster(folder, etcd.url)
    try:
        yield made
    finally:
        for name in made.processes:
            with contextlib.suppress(ProcessLookupError):
                await made.kill(name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed: apt-get install etcd-server")
def test_routers_are_found_while_nodes_run_and_etcd_ends_nobody(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "etcd")
    etcd.start()

    async def main() -> None:
        async with cluster(tmp_path, etcd) as made:
            for number in range(2):  # they wait until there is a router
                await made.start(f"store-{number}", "store")
            await made.start("router-a", "router")
            lives = await made.until("router-a", "store-0", "store-1")

            await made.start("router-b", "router")
            assert await made.until("router-b", "store-0", "store-1") == lives, "found by nodes that run"

            await made.kill("router-a")
            await asyncio.sleep(TTL_S + 1.0)
            assert await made.until("router-b", "store-0", "store-1") == lives, "a router's loss costs nothing"

            etcd.kill()
            assert await made.until("router-b", "store-0", "store-1", note="etcd at") == lives, "nor does etcd's"
            etcd.restart_empty()
            assert await made.until("router-b", "store-0", "store-1") == lives
            await made.start("router-a", "router")
            assert await made.until("router-a", "store-0", "store-1") == lives, "it is found anew"
            for name, process in made.processes.items():
                assert process.returncode is None, name

    try:
        asyncio.run(asyncio.wait_for(main(), 200))
    finally:
        etcd.kill()

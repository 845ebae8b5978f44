"""A router, a store node and four workers with the fake engine, each a process."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan, PoolPlan, save_plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from router.adapt.loop import AdaptConfig
from router.dispatch.config import DispatchConfig
from router.fleet.flips import FlipConfig
from tracehaul.model.source import resolve
from worker.config import WorkerConfig

START_S, END_S = 90.0, 20.0
WORKERS = 4
STORE_BYTES, KV_TOKENS = 512 << 20, 1 << 16
WORKER = WorkerConfig(chunk_tokens=256, local_prefill_tokens=64, sequences_max=64)


@asynccontextmanager
async def fleet(folder: Path, prefills: int, adapt: AdaptConfig) -> AsyncGenerator[str]:
    """With so many workers for prompts at first. Its router's address; it ends with the context.

    Raises:
        RuntimeError: it does not come up.
    """
    path, port = folder / "run", free_port()
    run = RunDir(path)
    run.create()
    nodes = [NodeSpec("router-0", "router", control_port=free_port()), NodeSpec("store-0", "store")]
    nodes += [NodeSpec(f"worker-{at}", "prefill" if at < prefills else "decode", "fleet") for at in range(WORKERS)]
    dispatch = DispatchConfig(adapt=adapt, flips=FlipConfig(drain_s=1.0, cooldown_s=1.0))
    config = ClusterConfig(transport="tcp", port=port, dispatch=dispatch, worker=WORKER, traces_keep_s=0)
    pool = PoolPlan("fleet", resolve(), PoolConfig(kv_tokens=KV_TOKENS))
    save_plan(run, Plan(config, (pool,), StoreConfig(STORE_BYTES, 4096), tuple(nodes), name="adapt"))
    processes: list[subprocess.Popen[bytes]] = []
    output = folder / "output"
    try:
        for node in nodes:
            processes.append(_node(node.name, path, output))
        url = f"http://127.0.0.1:{port}"
        try:
            await asyncio.wait_for(_ready(url, {node.name for node in nodes if node.role != "router"}), START_S)
        except TimeoutError:
            raise RuntimeError("the fleet does not come up: " + output.read_text()[-2000:]) from None
        yield url
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _node(name: str, run: Path, output: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "bench.adapt.live_node", "node", name, "--config", str(run / "cluster.json")]
    with output.open("ab") as said:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said)


async def _ready(url: str, wanted: set[str]) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        while True:
            try:
                told = (await http.get(f"{url}/cluster")).json()
                if {node["info"]["node"] for node in told if node["health"] == "ready"} == wanted:
                    return
            except (httpx.HTTPError, ValueError):
                pass
            await asyncio.sleep(0.2)

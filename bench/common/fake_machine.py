"""A cluster whose workers' engine is the fake one, each node a process: all but the computing is real."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec

from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan, PoolPlan, save_plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from router.dispatch.config import DispatchConfig
from router.policy.admission import AdmissionConfig
from tracehaul.engine.fake import EngineCost
from tracehaul.model.source import resolve
from worker.config import WorkerConfig

START_S, END_S = 90.0, 20.0
POOL = "agents"
"""What clients call the model by."""


class Machine(msgspec.Struct, frozen=True):
    """What to start."""

    dispatch: DispatchConfig = DispatchConfig()
    kv_tokens: int = 8192
    """Of each worker; the longest context, too."""
    decode: int = 2
    prefill: int = 0
    stores: int = 1
    store_bytes: int = 256 << 20
    """Of each store node; a token takes 32 bytes, a block of eight a slot of 4096."""
    worker: WorkerConfig = WorkerConfig()
    cost: EngineCost = EngineCost(iteration_s=0.02, prefill_token_s=0.0002, copy_token_s=1e-6)
    """The pace of a small accelerator."""


@asynccontextmanager
async def fleet(folder: Path, admission: AdmissionConfig, kv_tokens: int) -> AsyncGenerator[str]:
    """As :func:`running`, with two decode workers."""
    async with running(folder, Machine(DispatchConfig(admission=admission), kv_tokens)) as url:
        yield url


@asynccontextmanager
async def running(folder: Path, machine: Machine) -> AsyncGenerator[str]:
    """Its router's address; it ends with the context.

    Raises:
        RuntimeError: it does not come up.
    """
    path, port = folder / "run", free_port()
    run = RunDir(path)
    run.create()
    nodes = [NodeSpec("router-0", "router", control_port=free_port())]
    nodes += [NodeSpec(f"store-{at}", "store") for at in range(machine.stores)]
    nodes += [NodeSpec(f"prefill-{at}", "prefill", POOL) for at in range(machine.prefill)]
    nodes += [NodeSpec(f"decode-{at}", "decode", POOL) for at in range(machine.decode)]
    pool = PoolPlan(POOL, resolve(), PoolConfig(kv_tokens=machine.kv_tokens, worker=machine.worker))
    config = ClusterConfig(transport="tcp", port=port, dispatch=machine.dispatch, worker=machine.worker)
    name = folder.name if folder.name.isalnum() else "fake"
    save_plan(run, Plan(config, (pool,), StoreConfig(machine.store_bytes, 4096), tuple(nodes), name=name))
    processes: list[subprocess.Popen[bytes]] = []
    output = folder / "output"
    try:
        for node in nodes:
            processes.append(_node(node.name, path, output, machine.cost))
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


def _node(name: str, run: Path, output: Path, cost: EngineCost) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "bench.common.fake_node", "node", name, "--config", str(run / "cluster.json")]
    pace = {f"FAKE_{field.upper()}": str(seconds) for field, seconds in msgspec.structs.asdict(cost).items()}
    with output.open("ab") as said:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=os.environ | pace)


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

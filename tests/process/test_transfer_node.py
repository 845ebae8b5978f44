"""A node whose data plane dies ends: its memory would stay offered, and out of everybody's reach."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import free_port
from cluster.plan import Plan, PoolPlan, nodes_of, save_plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from tracehaul.model.source import ModelSource

PROGRAM = """
import sys
from pathlib import Path
from tracehaul.transfer import exchange

step, steps = exchange.Exchange.step, 0

def failing(self, now_s):
    global steps
    steps += 1
    assert steps < 50, "the data plane dies of a bug"
    return step(self, now_s)

exchange.Exchange.step = failing
from cluster.node import run_node
from cluster.rundir import RunDir
sys.exit(run_node("store-0", RunDir(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("transport", ["nixl", "ucxx"])
def test_a_node_ends_with_its_data_plane(tmp_path: Path, transport: str) -> None:
    run = RunDir(tmp_path)
    run.create()
    config = ClusterConfig(transport=transport, port=free_port(), store_bytes=1 << 20)  # type: ignore[arg-type]
    store = StoreConfig(arena_bytes=1 << 20, slot_bytes=4096)
    pool = PoolPlan("default", ModelSource("m", tmp_path, "hf", "llama"), PoolConfig())
    save_plan(run, Plan(config, (pool,), store, nodes_of(config, free_port())))
    environ = {**os.environ, "UCX_TLS": "tcp"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode not in (0, None)
    assert "the data plane dies of a bug" in done.stderr

"""Two models served by one cluster: each answers under its name, their blocks never mix, one's loss is its own."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import free_port
from cluster.plan import load_plan, nodes_of, save_plan
from cluster.rundir import FAULT_EXIT, RunDir
from worker.config import WorkerConfig

PROMPT_TOKENS = 200
OUTPUT_TOKENS = 6
FULL = (PROMPT_TOKENS - 1) // 32 * 32
"""Tokens of a prompt that can be found again: its last one is always computed."""

pytestmark = pytest.mark.xdist_group("pools")


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(
        port=free_port(),
        kv_tokens=1024,
        store_bytes=64 << 20,
        worker=WorkerConfig(headroom_tokens=32),
        pools={
            "one": PoolConfig(serves="org/one", prefill=1),
            "two": PoolConfig(prefill=0),
        },
    )


def prompt(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]


def chat(cluster: Fleet, model: str | None) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, trust_env=False, timeout=60)


def test_each_model_answers_under_its_name(cluster: Fleet) -> None:
    served = httpx.get(f"{cluster.url}/v1/models", trust_env=False).json()
    assert [entry["id"] for entry in served["data"]] == ["org/one", "two"]
    for model in ("org/one", "two"):
        answer = chat(cluster, model)
        assert (answer.status_code, answer.json()["model"]) == (200, model)
    assert chat(cluster, None).json()["model"] == "org/one"
    assert chat(cluster, "one").status_code == 404
    assert {node["info"]["node"]: node["info"]["pool"] for node in cluster.nodes()} == {
        "decode-one-0": "one",
        "prefill-one-0": "one",
        "decode-two-0": "two",
        "store-0": "",
    }


def test_a_step_runs_in_its_pool_and_blocks_never_mix(cluster: Fleet) -> None:
    said = prompt(1)
    answers = {model: cluster.step(f"mix-{model}", said, OUTPUT_TOKENS, model=model) for model in ("org/one", "two")}
    assert [step.cached_tokens for step in answers.values()] == [0, 0], "what one computes is of no use to the other"
    assert answers["org/one"].tokens == answers["two"].tokens, "they are one model under two names"
    for model in answers:
        again = cluster.step(f"again-{model}", said, OUTPUT_TOKENS, model=model)
        assert again.cached_tokens >= FULL
        assert again.tokens == answers[model].tokens
    # A client that has both in one trace mixes them up no more than one that has not.
    for model in ("org/one", "two"):
        cluster.step("both", prompt(2), OUTPUT_TOKENS, model=model)
    placed = [
        entry["decision"]
        for entry in httpx.get(f"{cluster.url}/v1/traces/both", trust_env=False).json()["decisions"]
        if entry["decision"]["type"] == "placed"
    ]
    assert [(one["pool"], one["decode"]) for one in placed] == [("one", "decode-one-0"), ("two", "decode-two-0")]
    page = cluster.metrics()
    assert 'tracehaul_router_pool_steps_total{pool="one"}' in page
    assert 'tracehaul_router_pool_steps_total{pool="two"}' in page


def test_a_killed_worker_of_one_pool_does_not_disturb_the_other(cluster: Fleet) -> None:
    whole = cluster.step("calm", prompt(3), 40, model="org/one")
    tokens: list[int] = []
    for chunk in cluster.chunks("stream", prompt(3), 40, model="org/one"):
        if not tokens:
            os.kill(cluster.pids()["decode-two-0"], signal.SIGKILL)
        tokens += [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
    assert tokens == whole.tokens
    refused = chat(cluster, "two")
    assert refused.status_code == 503
    assert "two" in refused.json()["error"]["message"]
    assert [entry["id"] for entry in httpx.get(f"{cluster.url}/v1/models", trust_env=False).json()["data"]] == [
        "org/one"
    ]
    cluster.restart(["decode-two-0"])
    back = cluster.step("again-two-later", prompt(1), OUTPUT_TOKENS, model="two")
    assert back.cached_tokens >= FULL, "the store has what the worker had computed"


def test_a_worker_with_another_layout_is_refused_in_one_line(cluster: Fleet, tmp_path: Path) -> None:
    plan = load_plan(cluster.run)
    other = msgspec.structs.replace
    pools = tuple(
        other(pool, config=other(pool.config, dtype="float32", decode=2)) if pool.name == "one" else pool
        for pool in plan.pools
    )
    config = other(plan.config, pools={pool.name: pool.config for pool in pools})
    run = RunDir(tmp_path / "wrong")
    run.create()
    store = other(plan.store, slot_bytes=2 * plan.store.slot_bytes)  # its blocks are twice as large
    nodes = nodes_of(config, plan.nodes[0].control_port)
    save_plan(run, other(plan, config=config, pools=pools, store=store, nodes=nodes))
    words = [sys.executable, "-m", "cluster.cli", "node", "decode-one-1", "--config", str(run.plan_file)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == FAULT_EXIT
    line = ended.stderr.strip().splitlines()[-1]
    assert "decode-one-1 has another KV layout than decode-one-0 of pool 'one'" in line
    assert len(cluster.nodes()) == 4
    assert "refused a node" in cluster.run.log("router-0").read_text()

"""Bills of real processes add up to their time, kills included, and outlive their router."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from typing import Any

import httpx
import pytest
from rich.console import Console

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig
from cluster.launch import free_port, restart
from tests.waiting import wait_until
from tracehaul.runtime import clock

WORKERS = ("prefill-0", "decode-0")
SLOW_S = 120.0
"""For what takes seconds, on a machine that does much else."""


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(port=free_port(), kv_tokens=2048, store_bytes=64 << 20)


def call(cluster: Fleet, trace: str, max_tokens: int, **headers: str) -> httpx.Response:
    body = {
        "model": cluster.model,
        "messages": [{"role": "user", "content": f"Tell {trace} of gravity."}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    url, named = f"{cluster.url}/v1/chat/completions", {"X-Trace-Id": trace, **headers}
    return httpx.post(url, json=body, headers=named, timeout=120, trust_env=False)


def cost(cluster: Fleet, trace: str) -> dict[str, Any]:
    return httpx.get(f"{cluster.url}/v1/traces/{trace}", trust_env=False).json()["cost"]


def bill(cluster: Fleet) -> dict[str, dict[str, str]]:
    """By trace, and what is nobody's."""
    command = [sys.executable, "-m", "cluster.cli", "bill", "--from", "1h", "--csv", "--run-dir", str(cluster.run.path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert told.returncode == 0, told.stderr
    return {row["trace"]: row for row in csv.DictReader(io.StringIO(told.stdout))}


def amounts(rows: dict[str, dict[str, str]]) -> dict[str, float]:
    return {trace: float(row["worker_amount_worker_seconds"]) for trace, row in rows.items()}


def up_s(cluster: Fleet, *workers: str) -> float:
    """Of their lives as they are now."""
    return sum(node["load"]["up_s"] for node in cluster.nodes() if node["info"]["node"] in workers)


def kill(cluster: Fleet, node: str) -> None:
    os.kill(cluster.pids()[node], signal.SIGKILL)


def back(cluster: Fleet, node: str) -> None:
    restart(cluster.run, [node], Console(quiet=True))
    wait_until(lambda: {node["info"]["role"] for node in cluster.nodes()} == {"decode", "prefill", "store"}, SLOW_S)


def test_bills_add_up_with_a_worker_and_the_router_killed(cluster: Fleet) -> None:
    usage = call(cluster, "quiet", 8).json()["usage"]["tracehaul"]["cost"]
    assert usage["unit"] == "worker seconds"
    assert usage["prefill_s"] > 0 < usage["decode_s"]
    assert usage["amount"] == pytest.approx(usage["prefill_s"] + usage["recompute_s"] + usage["decode_s"])
    assert cost(cluster, "quiet")["amount"] == pytest.approx(usage["amount"], rel=0.05)

    # A worker dies in the middle of an answer, and nobody else can go on with it: it ends when the next is there.
    began_s, before_s, first_s = clock.perf_s(), up_s(cluster, *WORKERS), up_s(cluster, "decode-0")
    told = 0
    body = {"model": cluster.model, "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(timeout=60, trust_env=False) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=body, headers={"X-Trace-Id": "killed"}) as answer,
    ):
        for line in answer.iter_lines():
            told += line.startswith("data: {")
            if told > 10 and clock.perf_s() - began_s > 2.5:
                kill(cluster, "decode-0")
                break
    back(cluster, "decode-0")
    call(cluster, "after", 8)
    assert cost(cluster, "killed")["decode_s"] > 0

    wait_until(lambda: {"quiet", "killed", "after"} <= bill(cluster).keys(), SLOW_S)
    first = amounts(bill(cluster))
    kill(cluster, "router-0")
    back(cluster, "router-0")
    call(cluster, "later", 8)
    there_s = first_s + up_s(cluster, *WORKERS)
    wait_until(lambda: sum(amounts(bill(cluster)).values()) >= there_s, SLOW_S)

    found = amounts(bill(cluster))
    assert all(found[trace] >= first[trace] for trace in ("quiet", "killed", "after"))
    fleet = {name: found.pop(name) for name in ("(idle)", "(lost)", "(unclaimed)")}
    total = sum(found.values()) + sum(fleet.values())
    assert abs(fleet["(unclaimed)"]) <= 0.01 * total
    assert 0 < fleet["(lost)"] < 10.0
    # By another clock: two workers all along, but for what one took to come back.
    assert total <= before_s + 2 * (clock.perf_s() - began_s) + 2.0
    assert cost(cluster, "killed")["amount"] == pytest.approx(found["killed"], rel=0.05)


def test_a_budget_ends_an_answer_and_a_larger_one_goes_on(cluster: Fleet) -> None:
    short = call(cluster, "poor", 300, **{"X-Trace-Budget": "0.5"})
    assert short.status_code == 402, short.text
    assert short.json()["error"]["code"] == "budget_exceeded"
    refused = call(cluster, "poor", 300)
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "budget_exceeded")
    wait_until(lambda: cost(cluster, "poor")["amount"] >= 0.5, SLOW_S)
    spent = cost(cluster, "poor")["amount"]
    decode_s = max(node["load"]["decode_s"] for node in cluster.nodes())
    assert 0.5 <= spent < 0.5 + 10 * decode_s + 0.5
    refused = call(cluster, "poor", 300)
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "budget_exceeded")
    assert "x-trace-budget" in refused.json()["error"]["message"]
    assert cost(cluster, "poor")["amount"] == pytest.approx(spent, rel=0.02)
    again = call(cluster, "poor", 300, **{"X-Trace-Budget": "1000"})
    assert again.status_code == 200
    assert again.json()["usage"]["completion_tokens"] == 300
    told = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "explain", "poor", "--run-dir", str(cluster.run.path)],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "It has cost " in told
    assert "its budget is 1000" in told
    assert json.loads(again.content)["usage"]["tracehaul"]["cost"]["amount"] > 0

"""A router that is killed knows its traces again, and erases what it was told to erase."""

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from rich.console import Console

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig
from cluster.launch import free_port, restart
from tests.waiting import wait_until
from tracehaul.runtime import clock

pytestmark = pytest.mark.xdist_group("journal")


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(port=free_port(), kv_tokens=2048, store_bytes=64 << 20, traces_keep_s=86400.0)


def ask(cluster: Fleet, messages: list[dict[str, Any]], trace: str) -> dict[str, Any]:
    body = {"model": cluster.model, "messages": messages, "temperature": 0, "max_tokens": 24}
    url, headers = f"{cluster.url}/v1/chat/completions", {"X-Trace-Id": trace}
    answer = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    answer = answer.json()
    messages += [answer["choices"][0]["message"], {"role": "user", "content": "And more?"}]
    return answer["usage"]


def view(cluster: Fleet, trace: str) -> dict[str, Any]:
    return httpx.get(f"{cluster.url}/v1/traces/{trace}", trust_env=False).json()


def gauge(cluster: Fleet, name: str) -> float:
    page = httpx.get(f"{cluster.url}/metrics", trust_env=False).text
    return float(next(line for line in page.splitlines() if line.startswith(f"{name} ")).split()[1])


def kill(cluster: Fleet) -> None:
    os.kill(next(record.pid for record in cluster.run.records() if record.name == "router-0"), signal.SIGKILL)
    restart(cluster.run, ["router-0"], Console(quiet=True))
    wait_until(lambda: {node["info"]["role"] for node in cluster.nodes()} == {"decode", "prefill", "store"})


def test_a_killed_router_goes_on_as_if_nothing_had_happened(cluster: Fleet) -> None:
    talks: dict[str, list[dict[str, Any]]] = {
        name: [{"role": "user", "content": f"Tell {name} of gravity."}] for name in ("killed", "undisturbed", "secret")
    }
    for _ in range(2):
        for name, messages in talks.items():
            ask(cluster, messages, name)
    tokens = view(cluster, "undisturbed")["context_tokens"]
    undisturbed = ask(cluster, talks["undisturbed"], "undisturbed")
    wait_until(lambda: gauge(cluster, "tracehaul_journal_behind") == 0)
    told = view(cluster, "killed")
    assert httpx.delete(f"{cluster.url}/v1/traces/secret", trust_env=False).status_code == 200
    database = cluster.run.database("router-0")
    assert not any(b"secret of gravity" in file.read_bytes() for file in database.parent.iterdir())

    kill(cluster)

    known = view(cluster, "killed")
    for field in ("id", "state", "steps_count", "context_tokens", "home", "agent", "pinned_s"):
        assert known[field] == told[field], field
    assert [step["id"] for step in known["steps"]] == [step["id"] for step in told["steps"]]
    assert [d["decision"] for d in known["decisions"]] == [d["decision"] for d in told["decisions"]]
    assert httpx.get(f"{cluster.url}/v1/traces/secret", trust_env=False).status_code == 404
    after = ask(cluster, talks["killed"], "killed")
    for usage, before in ((undisturbed, tokens), (after, told["context_tokens"])):  # the last one has no KV
        assert usage["prompt_tokens_details"]["cached_tokens"] >= before - 1
    [step] = view(cluster, "killed")["steps"][-1:]
    assert step["parent"] == told["steps"][-1]["id"]
    assert step["hits"]["theoretical"] > undisturbed["prompt_tokens"] // 2


def told(
    cluster: Fleet, has: str | None = None, until: Callable[[int], bool] = lambda _: False
) -> list[tuple[str, str]]:
    """Ids and data of a keyed stream's events, as far as they are wanted."""
    body = {"model": cluster.model, "messages": [{"role": "user", "content": "Go on."}], "stream": True}
    body |= {"max_tokens": 1200, "ignore_eos": True, "temperature": 1.0}
    headers = {"Idempotency-Key": "one", "X-Trace-Id": "keyed"} | ({} if has is None else {"Last-Event-ID": has})
    events: list[tuple[str, str]] = []
    url = f"{cluster.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120, trust_env=False) as answer:
        assert answer.status_code == 200, answer.read()
        name = ""
        for line in answer.iter_lines():
            if line.startswith("id: "):
                name = line[4:]
            elif line.startswith("data: "):
                events.append((name, line[6:]))
                if until(len(events)):
                    break
    return events


def text(events: list[tuple[str, str]]) -> str:
    chunks = [json.loads(data) for _, data in events if data != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_a_stream_goes_on_after_the_router_was_killed_where_its_client_was(cluster: Fleet) -> None:
    began_s = clock.perf_s()
    first = told(cluster, until=lambda count: count > 20 and clock.perf_s() - began_s > 1.2)
    assert first[-1][1] != "[DONE]", "it was too fast to be killed in the middle"

    kill(cluster)

    rest = told(cluster, first[-1][0])
    whole = told(cluster)
    assert [int(name) for name, _ in first + rest] == list(range(1, len(whole) + 1))
    assert text(first + rest) == text(whole)
    assert whole[-1][1] == "[DONE]"
    assert gauge(cluster, "tracehaul_router_tokens_again_total") > 0, "it goes on behind what was written down"
    ends = [step["ending"] for step in view(cluster, "keyed")["steps"]]
    assert ends == ["router_lost", "length"]


def test_a_database_that_is_locked_costs_no_call_and_is_caught_up_with(cluster: Fleet) -> None:
    messages = [{"role": "user", "content": "What is light?"}]
    with sqlite3.connect(cluster.run.database("router-0"), isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        ask(cluster, messages, "locked")
        wait_until(lambda: gauge(cluster, "tracehaul_journal_failing") == 1)
        ask(cluster, messages, "locked")
        assert gauge(cluster, "tracehaul_journal_behind") > 0
        assert httpx.delete(f"{cluster.url}/v1/traces/killed", trust_env=False, timeout=30).status_code == 503
        other.execute("ROLLBACK")
    wait_until(lambda: gauge(cluster, "tracehaul_journal_failing") == 0)
    wait_until(lambda: gauge(cluster, "tracehaul_journal_behind") == 0)
    assert httpx.delete(f"{cluster.url}/v1/traces/killed", trust_env=False).status_code == 404
    log = cluster.run.log("router-0").read_text()
    assert log.count("the journal of traces stands still") == 1
    assert log.count("the journal of traces goes on") == 1
    kill(cluster)
    assert view(cluster, "locked")["steps_count"] == 2

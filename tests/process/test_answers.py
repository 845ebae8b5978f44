"""A router that is started anew goes on from what its traces' models wrote, though their clients spell it otherwise."""

import json
import os
import signal
from typing import Any

import httpx
import pytest
from rich.console import Console

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig
from cluster.launch import free_port, restart
from tests.waiting import wait_until

TOOL = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {"path": {"const": "a.py"}, "text": {"const": "print('caf\u00e9, and more')"}},
            "required": ["path", "text"],
            "additionalProperties": False,
        },
    },
}

pytestmark = pytest.mark.xdist_group("answers")


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(port=free_port(), kv_tokens=2048, store_bytes=64 << 20)


def step(cluster: Fleet, messages: list[dict[str, Any]], trace: str | None, **fields: Any) -> dict[str, Any]:
    body = {"model": cluster.model, "messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 400} | fields
    headers = {} if trace is None else {"X-Trace-Id": trace}
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def anew(cluster: Fleet, how: str) -> None:
    """The router ends and is there again, with the workers."""
    if how == "killed":
        wait_until(lambda: b"write" in cluster.run.answers("router-0").read_bytes())
        os.kill(next(record.pid for record in cluster.run.records() if record.name == "router-0"), signal.SIGKILL)
    restart(cluster.run, ["router-0"], Console(quiet=True))
    wait_until(lambda: {node["info"]["role"] for node in cluster.nodes()} == {"decode", "prefill", "store"})


@pytest.mark.parametrize(("trace", "how"), [("named", "restarted"), (None, "restarted"), ("killed", "killed")], ids=str)
def test_the_whole_answer_hits_after_a_restart(cluster: Fleet, trace: str | None, how: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Write a file, {trace}."}]
    stored = {"store": True, "metadata": {"how": how}}
    first = step(cluster, messages, trace, tool_choice="required", parallel_tool_calls=False, **stored)
    assert first.pop("store") is True
    kept_as = json.dumps(first, sort_keys=True)
    told = first["choices"][0]["message"]
    [call] = told["tool_calls"]
    call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True, indent=2)
    messages += [told, {"role": "tool", "content": "ok", "tool_call_id": call["id"]}]

    anew(cluster, how)

    again = httpx.get(f"{cluster.url}/v1/chat/completions/{first['id']}", trust_env=False).json()
    assert json.dumps({key: again[key] for key in first}, sort_keys=True) == kept_as
    assert again["metadata"] == {"how": how}
    usage = step(cluster, messages, trace)["usage"]
    # The token that ended the answer stands in the next prompt, and is computed there.
    written = first["usage"]["total_tokens"] - 1
    assert usage["prompt_tokens_details"]["cached_tokens"] >= written
    assert first["usage"]["completion_tokens"] > 20

    name = trace or next(iter(httpx.get(f"{cluster.url}/v1/traces", trust_env=False).json()["data"]))["id"]
    kept = cluster.run.answers("router-0")
    assert kept.stat().st_mode & 0o777 == 0o600
    before = kept.read_bytes().count(b"write")
    assert httpx.delete(f"{cluster.url}/v1/traces/{name}", trust_env=False).status_code == 200
    assert kept.read_bytes().count(b"write") < before

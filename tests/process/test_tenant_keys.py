"""Two tenants by their keys, on a whole cluster: none can read, end, drive out or measure what the other has.

What one computed makes no answer of the other faster: measured, beside what it saves the one itself.
"""

import random
import time  # noqa: TID251 - what a tenant can measure is what its own clock says
from collections.abc import Generator
from contextlib import contextmanager
from statistics import median
from typing import Any

import httpx
import msgspec
import pytest

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from router.http.config import ApiConfig
from router.http.keys import Key, KeyFile, hashed
from worker.config import WorkerConfig

BLOCK_BYTES = 32 * 23040
PROMPT_TOKENS = 480
BLOCKS = PROMPT_TOKENS // 32
ROUNDS = 7
SECRETS = {"acme": f"th-0123abcd-{'s' * 43}", "other": f"th-4567abcd-{'t' * 43}"}

pytestmark = pytest.mark.xdist_group("tenants")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = [
        Key(id=secret[3:11], sha256=hashed(secret), tenant=tenant, steer=False) for tenant, secret in SECRETS.items()
    ]
    path.write_bytes(msgspec.json.encode(KeyFile(tuple(keys))))
    path.chmod(0o600)
    return ClusterConfig(
        port=free_port(),
        nodes=NodeCounts(prefill=0),
        kv_tokens=640,  # room for one sequence: what the worker itself keeps is gone with the next
        store_bytes=4 * BLOCKS * BLOCK_BYTES,
        quota_bytes={"acme": (BLOCKS + 2) * BLOCK_BYTES},
        api=ApiConfig(keys_file=str(path)),
        worker=WorkerConfig(headroom_tokens=32),
    )


@contextmanager
def tenant(cluster: Fleet, name: str) -> Generator[httpx.Client, None, None]:
    headers = {"authorization": f"Bearer {SECRETS[name]}"}
    with httpx.Client(base_url=cluster.url, headers=headers, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture
def acme(cluster: Fleet) -> Generator[httpx.Client, None, None]:
    with tenant(cluster, "acme") as client:
        yield client


@pytest.fixture
def other(cluster: Fleet) -> Generator[httpx.Client, None, None]:
    with tenant(cluster, "other") as client:
        yield client


def prompt(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]


def ask(client: httpx.Client, model: str, seed: int) -> tuple[float, int]:
    """Seconds that one token of an answer took, and the prompt's tokens that were not computed for it."""
    began_s = time.perf_counter()
    answer = client.post("/v1/completions", json={"model": model, "prompt": prompt(seed), "max_tokens": 1})
    took_s = time.perf_counter() - began_s
    assert answer.status_code == 200, answer.text
    return took_s, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_what_one_computed_makes_no_answer_of_the_other_faster(
    cluster: Fleet, acme: httpx.Client, other: httpx.Client
) -> None:
    ask(acme, cluster.model, 0)
    took: dict[str, list[float]] = {"own": [], "foreign": [], "fresh": []}
    for at in range(1, 2 * ROUNDS, 2):
        first, cached = ask(acme, cluster.model, at)
        assert cached == 0
        own, cached = ask(acme, cluster.model, at)
        assert cached >= PROMPT_TOKENS - 64, "else nothing would be there to be measured"
        foreign, cached = ask(other, cluster.model, at)
        assert cached == 0
        fresh, _ = ask(other, cluster.model, at + 1)
        took["own"].append(own)
        took["foreign"].append(foreign)
        took["fresh"].append(fresh)
        assert first > 0
    middle = {kind: median(times) for kind, times in took.items()}
    assert middle["own"] < 0.6 * middle["fresh"], "the probe sees a prefix that is there"
    assert middle["foreign"] > 0.75 * middle["fresh"], took


def test_one_drives_nothing_of_the_other_out(cluster: Fleet, acme: httpx.Client, other: httpx.Client) -> None:
    ask(acme, cluster.model, 500)
    for seed in range(600, 606):
        ask(other, cluster.model, seed)
    _, cached = ask(acme, cluster.model, 500)
    assert cached >= PROMPT_TOKENS - 64, "within its quota it loses nothing"


def test_one_reads_and_steers_nothing_of_the_other(cluster: Fleet, acme: httpx.Client, other: httpx.Client) -> None:
    said: dict[str, Any] = {"model": cluster.model, "input": "Say hello.", "max_output_tokens": 4}
    kept = acme.post("/v1/responses", json=said, headers={"x-trace-id": "mine"}).json()
    assert acme.get(f"/v1/responses/{kept['id']}").status_code == 200
    assert other.get(f"/v1/responses/{kept['id']}").status_code == 404
    assert other.delete(f"/v1/responses/{kept['id']}").status_code == 404
    assert other.post("/v1/responses", json={**said, "previous_response_id": kept["id"]}).status_code in (400, 404)
    listed = [trace["id"] for trace in acme.get("/v1/traces").json()["data"]]
    assert "mine" in listed
    assert not set(listed) & {trace["id"] for trace in other.get("/v1/traces").json()["data"]}
    for method, path in (("GET", "mine"), ("DELETE", "mine"), ("POST", "mine/resume")):
        assert other.request(method, f"/v1/traces/{path}").status_code == 404
    for method, path in (("POST", "/v1/traces/mine/pin"), ("GET", "/cluster"), ("GET", "/metrics")):
        assert other.request(method, path, json={} if method == "POST" else None).status_code == 403
    assert acme.get("/v1/traces/mine").status_code == 200


def test_a_batch_is_run_by_the_cluster_for_its_tenant_alone(
    cluster: Fleet, acme: httpx.Client, other: httpx.Client
) -> None:
    body = {"model": cluster.model, "prompt": "One", "max_tokens": 2}
    call = msgspec.json.encode({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
    file = acme.post("/v1/files", data={"purpose": "batch"}, files={"file": ("calls", call)}).json()
    order = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "1h"}
    assert other.post("/v1/batches", json=order).status_code == 404
    batch = acme.post("/v1/batches", json=order).json()
    deadline_s = time.monotonic() + 60
    while batch["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline_s
        batch = acme.get(f"/v1/batches/{batch['id']}").json()
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}, batch
    answer = acme.get(f"/v1/files/{batch['output_file_id']}/content").json()
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 2
    for path in (f"/v1/batches/{batch['id']}", f"/v1/files/{batch['output_file_id']}/content"):
        assert other.get(path).status_code == 404


def test_without_a_key_nothing(cluster: Fleet) -> None:
    for path in ("/v1/models", "/v1/traces", "/v1/files", "/v1/batches", "/metrics", "/cluster"):
        assert httpx.get(f"{cluster.url}{path}", trust_env=False).status_code == 401

"""``tracehaul store`` over a real cluster: what operators look at and change while it serves, done wrong on purpose."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from cluster.metric_names import every
from tests.waiting import wait_until

BLOCK_TOKENS = 32
PROMPT = [random.Random(7).randrange(1000, 20000) for _ in range(10 * BLOCK_TOKENS + 5)]
TOLD_S = 60.0
"""In which nodes have told the router what is so: each look is a command, which takes seconds to start where much
else runs."""

pytestmark = pytest.mark.xdist_group("store-cli")


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(
        port=free_port(),
        nodes=NodeCounts(prefill=1, store=2),
        kv_tokens=2048,
        store_bytes=32 << 20,
        disk_bytes=64 << 20,
        traces_keep_s=3600.0,
    )


def store(cluster: Fleet, *args: object, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "store", *map(str, args), "--run-dir", str(cluster.run.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def answer(cluster: Fleet, *args: object) -> dict[str, Any]:
    """What the nodes said, as a script reads it."""
    done = store(cluster, *args, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["errors"] == {}
    return told["nodes"]


def refused(cluster: Fleet, *args: object, code: int = 1) -> str:
    """The one line on stderr of a command that does not succeed."""
    done = store(cluster, *args)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tracehaul:")]
    return line


@pytest.fixture
def tokens(cluster: Fleet, tmp_path: Path) -> Path:
    """A file of token ids whose blocks are in the store."""
    cluster.step("store-cli", PROMPT, 2)
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(PROMPT))
    wait_until(lambda: best(cluster, file)["tiers"].get("disk") == 10)
    return file


def health(cluster: Fleet, node: str) -> str | None:
    """As the router tells it; None if the node is no member."""
    return next((told["health"] for told in cluster.nodes() if told["info"]["node"] == node), None)


def best(cluster: Fleet, tokens: Path) -> dict[str, Any]:
    """What the node that has most of it has."""
    return max(answer(cluster, "query", "--tokens", tokens).values(), key=lambda held: held["run"])


@contextmanager
def frozen(cluster: Fleet, node: str) -> Generator[None, None, None]:
    pid = cluster.pids()[node]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_nodes_are_pinged_and_described(cluster: Fleet):
    trips = answer(cluster, "ping", "--count", 3)
    assert [len(node["round_trips_s"]) for node in trips.values()] == [3, 3]
    told = answer(cluster, "describe")
    assert sorted(told) == ["store-0", "store-1"]
    assert told["store-0"]["limits"]["leases_max"] == 1024
    assert [tier["name"] for tier in told["store-0"]["tiers"]] == ["memory", "disk"]
    for command in ("ping", "describe", "tiers", "pins", "limits"):
        shown = store(cluster, command)
        assert shown.returncode == 0, shown.stderr
        assert "store-1" in shown.stdout or command == "pins"


def pins_of(cluster: Fleet, trace: str) -> list[dict[str, Any]]:
    """Beside the router's own."""
    return [pin for node in answer(cluster, "pins").values() for pin in node["pins"] if pin["trace"] == trace]


def test_blocks_are_found_and_pinned_by_hand(cluster: Fleet, tokens: Path):
    held = best(cluster, tokens)
    assert (held["run"], held["blocks"], held["tiers"]) == (10, 10, {"memory": 10, "disk": 10})
    assert held["ranges"] == [[0, 9, "memory+disk"]]
    shown = store(cluster, "query", "--tokens", tokens)
    assert "leading run 10 blocks, 320 tokens" in shown.stdout
    salted = answer(cluster, "query", "--tokens", tokens, "--salt", "other")
    assert {node["held"] for node in salted.values()} == {0}
    pinned = store(cluster, "pin", "by-hand", "--tokens", tokens, "--hard", "--ttl", 60)
    assert "10 blocks, 10 of them held" in pinned.stdout, pinned.stderr
    (pin,) = pins_of(cluster, "by-hand")
    assert (pin["kind"], pin["held"]) == ("hard", 10)
    assert store(cluster, "unpin", "by-hand").returncode == 0
    assert not pins_of(cluster, "by-hand")


def test_a_text_is_tokenized_as_the_api_does(cluster: Fleet, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    text = "A quick brown fox jumps over the lazy dog. " * 40
    file.write_text(text)
    body = {"model": cluster.model, "prompt": text, "max_tokens": 1, "temperature": 0}
    assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200

    def found() -> bool:
        held = max(answer(cluster, "query", "--prompt", file).values(), key=lambda held: held["run"])
        return held["run"] == held["blocks"] > 5

    wait_until(found)


def test_a_scrub_checks_all_blocks(cluster: Fleet, tokens: Path):
    told = answer(cluster, "scrub")
    tiers = [tier for node in told.values() for tier in node["tiers"]]
    assert {node["state"] for node in told.values()} == {"done"}
    assert sum(tier["checked"] for tier in tiers) >= 20
    assert all((tier["checked"], tier["bad"]) == (tier["blocks"], 0) for tier in tiers)


def test_blocks_that_only_the_disk_has_are_brought_up(cluster: Fleet, tokens: Path):
    home = next(n for n, held in answer(cluster, "query", "--tokens", tokens).items() if held["run"] == 10)
    cluster.restart([home])
    wait_until(lambda: best(cluster, tokens)["tiers"] == {"memory": 0, "disk": 10})
    told = answer(cluster, "prefetch", home, "--tokens", tokens)
    assert (told[home]["state"], told[home]["done"], told[home]["missed"]) == ("done", 10, 0)
    assert best(cluster, tokens)["tiers"] == {"memory": 10, "disk": 10}
    again = store(cluster, "prefetch", home, "--tokens", tokens)
    assert (again.returncode, "Nothing to bring up" in again.stdout) == (0, True)


def test_limits_change_while_the_cluster_serves(cluster: Fleet):
    done = store(cluster, "limits", "store-0", "--set", "leases_max=512", "--set", "quota_bytes.alice=4MiB")
    assert done.returncode == 0, done.stderr
    assert "leases_max 1024 -> 512, until it restarts" in done.stdout
    limits = {name: node["limits"] for name, node in answer(cluster, "describe").items()}
    assert (limits["store-0"]["leases_max"], limits["store-1"]["leases_max"]) == (512, 1024)
    assert limits["store-0"]["quota_bytes"] == {"alice": 4 << 20}
    log = cluster.run.log("store-0").read_text()
    assert '"limit changed, until this node restarts" limit=leases_max old=1024 new=512' in log
    assert cluster.step("limits", PROMPT[:40], 2).tokens
    assert store(cluster, "limits", "store-0", "--set", "quota_bytes.alice=none").returncode == 0
    assert answer(cluster, "describe", "store-0")["store-0"]["limits"]["quota_bytes"] == {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("leases_max=0", "must be at least 1"),
        ("leeses_max=1", "no limit is called leeses_max; there are"),
        ("arena_bytes=1GiB", "restart the node with another --store-bytes"),
        ("disk_bytes=1GiB", "with another --disk-bytes: what fits is kept"),
        ("quota_bytes.a=1TiB", "must not promise more"),
        ("leases_max", "not NAME=VALUE"),
        ("scrub_bytes_s=fast", "not a size"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_in_one_line(cluster: Fleet, change: str, why: str):
    assert why in refused(cluster, "limits", "--set", "waiters_max=7", "--set", change)
    assert {node["limits"]["waiters_max"] for node in answer(cluster, "describe").values()} == {1024}


def test_a_bench_leaves_nothing_behind(cluster: Fleet, tokens: Path):
    wait_until(
        lambda: below(answer(cluster, "describe")) == below(answer(cluster, "describe"))
    )  # earlier steps' blocks
    before = answer(cluster, "describe")
    told = answer(cluster, "bench", "--bytes", "8MiB")
    for result in told.values():
        assert result["transport"] == "shm"
        assert result["blocks"] == (8 << 20) // result["block_bytes"]
        assert min(result["put_gb_s"], result["get_gb_s"], result["memcpy_gb_s"], result["exists_ms"]) > 0
    wait_until(lambda: [n["slots_free"] for n in answer(cluster, "describe").values()] == free(before))
    after = answer(cluster, "describe")
    assert [node["blocks"] for node in after.values()] == [node["blocks"] for node in before.values()]
    wait_until(lambda: below(answer(cluster, "describe")) == below(before))
    assert best(cluster, tokens)["tiers"] == {"memory": 10, "disk": 10}


def below(told: dict[str, Any]) -> list[int]:
    return [node["tiers"][1]["blocks"] for node in told.values()]


def free(told: dict[str, Any]) -> list[int]:
    return [node["slots_free"] for node in told.values()]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("ping", "store-7"), "no store node store-7; there are store-0, store-1"),
        (("query",), "say which blocks"),
        (("query", "--hash", "xyz"), "not a block hash"),
        (("query", "--tokens", "/nowhere"), "cannot read /nowhere"),
        (("pin", "t", "--hash", "00" * 16), "no node holds any of these"),
        (("ping", "--url", "http://127.0.0.1:9"), "no router answers at http://127.0.0.1:9"),
    ],
)
def test_what_is_asked_wrong_is_one_line(cluster: Fleet, args: tuple[str, ...], why: str):
    assert why in refused(cluster, *args)


def test_every_metric_of_every_node_is_described(cluster: Fleet, tokens: Path):
    known = {metric.name: (kind, metric) for kind, metric in every()}
    seen: set[str] = set()
    cluster.step("metrics", PROMPT, 2)
    for node in ("router-0", "prefill-0", "decode-0", "store-0"):
        page = httpx.get(f"http://{cluster.run.state(node).metrics}/metrics", trust_env=False).text
        for family in text_string_to_metric_families(page):
            assert family.documentation, family.name
            if not family.name.startswith("tracehaul_"):
                continue
            name = f"{family.name}_total" if family.type == "counter" else family.name
            kind, metric = known[name]
            assert (kind, metric.help) == (family.type, family.documentation)
            assert all(tuple(sample.labels) == metric.labels for sample in family.samples)
            seen.add(name)
    # Of what this cluster has not:
    elsewhere = (
        "tracehaul_s3_",
        "tracehaul_stack_",
        "tracehaul_adapter_",
        "tracehaul_handover_",
        "tracehaul_webhooks_broken",
        "tracehaul_webhooks_waiting",
    )
    assert seen == {name for name in known if not name.startswith(elsewhere)}


def test_a_node_is_drained_and_taken_back(cluster: Fleet, tokens: Path):
    found = answer(cluster, "query", "--tokens", tokens)
    home = next(node for node, held in found.items() if held["run"] == 10)
    other = next(node for node in found if node != home)
    try:
        done = store(cluster, "drain", home)
        assert done.returncode == 0, done.stderr
        assert f"{home} can be stopped" in done.stdout
        assert "drained" in done.stdout
        moved = answer(cluster, "query", "--tokens", tokens)
        assert (moved[home]["run"], moved[other]["run"]) == (10, 10)
        wait_until(lambda: "draining" in store(cluster, "ping").stdout)
        assert "was not measured" in refused(cluster, "bench", home)
    finally:
        assert answer(cluster, "drain", home, "--cancel")[home]["state"] == "serving"
    wait_until(lambda: "draining" not in store(cluster, "ping").stdout)


def test_a_drain_with_nowhere_to_go_says_so(cluster: Fleet, tokens: Path):
    with frozen(cluster, "store-1"):
        wait_until(lambda: health(cluster, "store-1") == "suspect")
    os.kill(cluster.pids()["store-1"], signal.SIGKILL)
    try:
        wait_until(lambda: health(cluster, "store-1") is None)
        assert "store-0 answers with an error" in refused(cluster, "drain", "store-0")
    finally:
        cluster.restart(["store-1"])


def test_a_frozen_node_costs_its_deadline_and_the_others_answer(cluster: Fleet):
    with frozen(cluster, "store-1"):
        done = store(cluster, "describe", "--json")
        assert done.returncode == 1
        told = json.loads(done.stdout)
        assert list(told["nodes"]) == ["store-0"]
        assert "did not answer within" in told["errors"]["store-1"]
        assert "store-1 did not answer within" in refused(cluster, "limits", "--set", "waiters_max=1024")
        assert "store-1 did not answer within" in refused(cluster, "bench", "store-1")
    wait_until(lambda: store(cluster, "ping").returncode == 0)


def test_a_dead_node_is_called_dead_and_how_to_bring_it_back(cluster: Fleet):
    os.kill(cluster.pids()["store-1"], signal.SIGKILL)
    try:
        wait_until(lambda: "store-1 is dead" in store(cluster, "describe").stderr)
        line = refused(cluster, "ping")
        assert line == "tracehaul: store-1 is dead; bring it back with: tracehaul restart store-1"
        assert "store-1 is dead" in refused(cluster, "drain", "store-1")
    finally:
        cluster.restart(["store-1"])


def test_without_a_router_the_nodes_are_still_found(cluster: Fleet):
    os.kill(cluster.pids()["router-0"], signal.SIGKILL)
    try:
        done = store(cluster, "ping")
        assert done.returncode == 0, done.stderr
        assert "no router answers" in done.stderr
        assert "router silent" in done.stdout
    finally:
        cluster.restart(["router-0"])
    wait_until(lambda: len(cluster.nodes()) == 4)


def test_ctrl_c_ends_a_command_that_waits(cluster: Fleet):
    command = [sys.executable, "-m", "cluster.cli", "store", "query", "--tokens", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--run-dir", str(cluster.run.path)], text=True, **pipes)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")


def test_where_nothing_runs_it_says_so(tmp_path: Path):
    command = [sys.executable, "-m", "cluster.cli", "store", "ping", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no cluster runs here" in done.stderr
    assert "tracehaul up" in done.stderr

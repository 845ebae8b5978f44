"""A fleet of three hosts from one file: launched from a bundle, its KV crossing hosts, changed while agents work."""

import json
import random
import subprocess
import sys
import time  # noqa: TID251 - a wait for other processes
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hosts.conftest import Operator
from tracehaul.wire.steps import Sampling

pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.timeout(600)]

HEAD = """\
host = "0.0.0.0"
port = 8130
transport = "{transport}"
dtype = "float32"
kv_tokens = 4096
store_bytes = 134217728
threads = 1
[api]
open = true
[worker]
local_prefill_tokens = 32
[dispatch]
policy = "sticky"
"""
HOST = """\
[[hosts]]
name = "{name}"
home = "/srv/tracehaul"
{how}
nodes = {nodes}
"""
INSTALLED = f'environment = "{sys.prefix}"'
OUTPUT = 8

Alone = Callable[[Sequence[int], Sampling], list[int]]


def fleet(transport: str = "tcp", **nodes: str) -> str:
    """A file: what runs on each host. Releases are on all but those whose nodes begin with ``+``."""
    text = HEAD.format(transport=transport)
    for name, said in nodes.items():
        how = "" if said.startswith("+") else INSTALLED
        text += HOST.format(name=name, how=how, nodes=said.lstrip("+"))
    return text


def prompt(seed: int, tokens: int = 300) -> list[int]:
    return random.Random(seed).choices(range(100, 49_000), k=tokens)


def crossed(operator: Operator, alone: Alone, seed: int) -> None:
    """A step is computed on b and pulled by c, as nothing is priced. Tokens are equal in any case; where b takes too
    long, for all that the machine does meanwhile, c computes alone, and another one is asked."""
    seen: list[object] = []
    for at in range(3):
        asked = prompt(100 * seed + at)
        answer = operator.step("a", f"{seed}-{at}", asked, OUTPUT)
        assert answer["choices"][0]["token_ids"] == alone(asked, Sampling(max_tokens=OUTPUT, temperature=0.0))
        told = answer["usage"]["tracehaul"]
        if told["pulled_tokens"] >= 256 and told["prefill_fallback"] == "":
            return
        seen.append(told)
    raise AssertionError(seen)


def test_a_trace_computed_on_one_host_is_decoded_on_another(operator: Operator, alone: Alone, tmp_path: Path) -> None:
    three = fleet(a="{ router = 1 }", b="+{ store = 1, prefill = 1 }", c="{ decode = 1 }")
    operator.write(three)
    assert "+ decode-c-0 starts on c" in operator.ask("plan")
    archive = operator.ask("bundle", str(tmp_path)).strip()
    told = operator.ask("launch", "--bundle", archive)
    assert told == f"ready {operator.url('a')}\n"
    before = operator.nodes()
    assert {name: node["state"] for name, node in before.items()} == dict.fromkeys(
        ["router-a-0", "store-b-0", "prefill-b-0", "decode-c-0"], "running"
    )
    releases = operator.rig.hosts["b"].run("sh", "-c", "readlink -f /proc/*/exe /srv/tracehaul/current | sort -u")
    assert "/srv/tracehaul/releases/" in releases, "b runs what came with the bundle"

    crossed(operator, alone, 1)
    assert operator.rig.hosts["c"].run("ls", "/srv/tracehaul/run/secrets").split() == [
        "ca.pem", "join.token", "node.key", "node.pem",
    ], "certificates, unless the file says that there are none"  # fmt: skip
    assert "authenticated" in operator.ask("logs", "decode-c-0", "--lines", "200")

    health = json.loads(operator.ask("doctor", "--json"))
    assert [each for each in health["findings"] if each["fatal"]] == []  # one way may be slow on a busy machine
    assert all(pair["read_bytes_s"] > 1e6 and not pair["fault"] for pair in health["pairs"].values())
    assert len(health["pairs"]) == 6

    operator.ask("launch", "--bundle", archive)
    assert {n: each["pid"] for n, each in operator.nodes().items()} == {n: each["pid"] for n, each in before.items()}

    nixl = three.replace('"tcp"', '"nixl"')
    operator.write(nixl)
    operator.ask("launch", "--bundle", archive)
    crossed(operator, alone, 2)


def test_hosts_come_and_go_while_agents_work(operator: Operator) -> None:
    two = {"a": "{ router = 1, store = 1, decode = 1 }", "b": "{ router = 1, store = 1, decode = 1 }"}
    operator.write(fleet(**two))
    operator.ask("stop")
    operator.ask("launch")
    with operator.agents(6, "a", "b") as seen:
        time.sleep(2.0)
        operator.write(fleet(**two, c="{ store = 1, decode = 1 }"))
        operator.ask("add-host", "c")
        time.sleep(2.0)
        operator.ask("remove-host", "c")
        operator.write(fleet(**two))
        time.sleep(1.0)
    assert seen["failed"] == []
    assert seen["steps"] > 12
    assert {name for name, node in operator.nodes().items() if node["pid"]} == {
        f"{role}-{host}-0" for role in ("router", "store", "decode") for host in ("a", "b")
    }


def test_an_upgrade_fails_no_request(operator: Operator) -> None:
    before = {name: node["pid"] for name, node in operator.nodes().items() if node["pid"]}
    operator.write("connections_max = 1000\n" + operator.file.read_text())
    told = operator.ask("plan")
    assert all(f"~ {name} is started anew" in told for name in before), "all of them read it"
    with operator.agents(6, "a", "b") as seen:
        time.sleep(2.0)
        operator.ask("upgrade")
        operator.ask("restart", "--rolling", "store-a-0", "decode-b-0")
        time.sleep(1.0)
    assert seen["failed"] == []
    assert seen["steps"] > 12
    after = operator.nodes()
    assert all(after[name]["pid"] not in (None, pid) for name, pid in before.items()), "each was started anew"
    assert "Nothing would change." in operator.ask("plan")


def test_nobody_has_to_remember_what_was_launched(operator: Operator) -> None:
    status = operator.ask("status")
    assert "router-a-0" in status
    pid = str(operator.nodes()["decode-b-0"]["pid"])
    operator.rig.hosts["b"].run("kill", "-9", pid)
    end_s = time.monotonic() + 60.0
    while (node := operator.nodes()["decode-b-0"])["pid"] in (None, int(pid)) or node["phase"] != "ready":
        assert time.monotonic() < end_s, node
        time.sleep(0.5)
    assert node["restarts"] == 1
    assert "decode-b-0" in operator.ask("logs", "decode-b-0", "--lines", "5")


def test_a_host_that_fails_takes_no_other_along(operator: Operator) -> None:
    operator.rig.hosts["b"].cut()
    try:
        told = operator.ask("launch", code=1)
        assert "b: ssh b:" in told
        assert "the others serve: a" in told
        assert "no answer" in operator.ask("status", code=1)
    finally:
        operator.rig.hosts["b"].mend()
    operator.ask("launch")


def test_a_damaged_bundle_is_not_installed(operator: Operator, tmp_path: Path) -> None:
    operator.ask("stop")
    operator.write(fleet(a="+{ router = 1, store = 1, decode = 1 }"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "x.whl").write_bytes(b"not what the manifest says")
    manifest = '{"version":"0.1.0","python":"3.11","machine":"x86_64","files":{"wheels/x.whl":"' + "0" * 64 + '"}}'
    (tmp_path / "manifest.json").write_text(manifest)
    subprocess.run(["tar", "cf", "bad.tar", "manifest.json", "wheels"], cwd=tmp_path, check=True)
    told = operator.ask("launch", "--bundle", str(tmp_path / "bad.tar"), code=1)
    assert "the bundle is damaged: wheels/x.whl has a wrong SHA-256" in told
    assert operator.rig.hosts["a"].run("ls", "/srv/tracehaul", check=False).split().count("current") == 0

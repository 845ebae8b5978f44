"""A fleet under certificates, from the same one file: what launch lays on each host, and renews while all serve."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hosts.conftest import ROOT, Operator
from tests.hosts.test_fleet import OUTPUT, fleet, prompt
from tracehaul.wire.steps import Sampling

pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.timeout(600)]

Alone = Callable[[Sequence[int], Sampling], list[int]]

SECURITY = """\
[security]
control = "mtls"
data = "tls"
token = true
authority = "{authority}"
"""

TRY = """
import asyncio, sys
from pathlib import Path
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.credentials import Credentials
from tracehaul.wire.errors import Untrusted

async def main():
    network = TcpNetwork(credentials=Credentials(Path(sys.argv[1])))
    try:
        await network.connect(sys.argv[2], timeout_s=10)
    except Untrusted as error:
        print(error)

asyncio.run(main())
"""
"""A connection by what a folder of secrets has; why it was refused."""


def test_a_fleet_under_certificates(operator: Operator, alone: Alone, tmp_path: Path) -> None:
    hosts = fleet(a="{ router = 1, store = 1 }", b="{ prefill = 1, decode = 1 }")
    secured = hosts.replace("[[hosts]]", SECURITY.format(authority=tmp_path / "authority") + "[[hosts]]", 1)
    operator.write(secured)
    operator.ask("launch")
    before = operator.nodes()
    asked = prompt(11)
    answer = operator.step("a", "one", asked, OUTPUT)
    assert answer["choices"][0]["token_ids"] == alone(asked, Sampling(max_tokens=OUTPUT, temperature=0.0))
    assert answer["usage"]["tracehaul"]["pulled_tokens"] >= 256, "computed on b, kept on a, pulled from there"

    files = ("ca.pem", "node.pem", "node.key", "join.token")
    held = {name: operator.rig.hosts["b"].run("cat", f"/srv/tracehaul/run/secrets/{name}") for name in files}
    modes = operator.rig.hosts["b"].run("sh", "-c", "stat -c %a /srv/tracehaul/run/secrets/*")
    assert set(modes.split()) == {"600"}
    operator.ask("launch")
    assert {n: each["pid"] for n, each in operator.nodes().items()} == {n: each["pid"] for n, each in before.items()}
    renewed = {name: operator.rig.hosts["b"].run("cat", f"/srv/tracehaul/run/secrets/{name}") for name in files}
    assert {name for name in files if held[name] != renewed[name]} == {"node.pem", "node.key"}
    asked = prompt(12)
    answer = operator.step("a", "two", asked, OUTPUT)
    assert answer["choices"][0]["token_ids"] == alone(asked, Sampling(max_tokens=OUTPUT, temperature=0.0))

    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("node.pem", "node.key"):
        (kept / name).write_text(operator.rig.hosts["b"].run("cat", f"/srv/tracehaul/run/secrets/{name}"))
    with operator.agents(3, "a") as seen:
        operator.ask("certificates", "rotate", "--ca")
        operator.ask("certificates", "rotate")
    assert seen["failed"] == []
    assert seen["steps"] > 3
    lines = [line.split() for line in operator.ask("certificates", "status").splitlines()]
    shown = [line for line in lines if line and line[0] in ("a", "b")]
    assert [line[0] for line in shown] == ["a", "b"]
    assert len({line[3] for line in shown}) == 1, "of one CA"
    assert all(line[3] == line[4] for line in shown), "which is the only one that is trusted"
    assert {n: each["pid"] for n, each in operator.nodes().items()} == {n: each["pid"] for n, each in before.items()}
    (kept / "ca.pem").write_text(operator.rig.hosts["a"].run("cat", "/srv/tracehaul/run/secrets/ca.pem"))
    address = f"{operator.rig.hosts['a'].address}:7000"
    ask = [sys.executable, "-c", TRY, str(kept), address]
    done = subprocess.run(operator.rig.at_control(*ask), capture_output=True, text=True, check=True, cwd=ROOT)
    assert "it does not trust the CA of this node's certificate" in done.stdout

    plain = hosts.replace("[[hosts]]", '[security]\ncontrol = "plain"\n[[hosts]]', 1)
    operator.write(plain)
    told = operator.ask("launch", code=1)
    assert 'a: what runs there has control = "mtls", data = "tls", token = true: say that in [security], or' in told
    assert {n: each["pid"] for n, each in operator.nodes().items()} == {n: each["pid"] for n, each in before.items()}

    operator.write(secured.replace(str(tmp_path / "authority"), str(tmp_path / "another")))
    told = operator.ask("launch", code=1)
    assert "the host trusts another CA" in told
    assert operator.step("a", "three", asked, OUTPUT)["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]

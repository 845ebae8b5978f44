"""Faults planted on hosts: the doctor names each in one line, with what to do."""

import json
import sys
from pathlib import Path

import pytest

from bench.hosts.rig import Host
from tests.hosts.conftest import Operator

pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.timeout(300)]

FILE = """\
host = "0.0.0.0"
port = 8130
transport = "tcp"
kv_tokens = 4096
store_bytes = 134217728
[api]
open = true
[security]
control = "plain"
[[hosts]]
name = "a"
home = "/srv/tracehaul"
environment = "{environment}"
model = "/srv/other.gguf"
gpus = 2
store_bytes = 109951162777600
nodes = {{ router = 1, store = 1, decode = 1 }}
[[hosts]]
name = "b"
home = "/srv/tracehaul"
environment = "{environment}"
python = "/srv/python"
ucx_devices = ["mlx5_9:1"]
nodes = {{ store = 1, decode = 1 }}
[[hosts]]
name = "c"
home = "/srv/tracehaul"
python = "/srv/old-python"
listen = "10.99.0.1"
nodes = {{ decode = 1 }}
"""


def test_each_planted_fault_has_a_line(operator: Operator) -> None:
    a, b, c = (operator.rig.hosts[name] for name in "abc")
    operator.write(FILE.format(environment=sys.prefix))
    try:
        plant(a, b, c)
        examine(operator)
        c.cut()
        assert "ssh c: " in operator.ask("doctor", code=1)
    finally:
        c.mend()
        a.run("ip", "link", "set", "eth0", "mtu", "1500")
        b.run("ip", "route", "flush", "type", "blackhole", check=False)


def plant(a: Host, b: Host, c: Host) -> None:
    """All at once: none may hide another."""
    a.begin("python3", "-c", "import socket; s = socket.create_server(('', 7200)); s.accept()")
    (a.root / "other.gguf").write_bytes(b"another model")
    a.run("ip", "link", "set", "eth0", "mtu", "1400")
    late = "import sys, time; real = time.time; time.time = lambda: real() - 3600; sys.argv = sys.argv[1:]"
    script(b.root / "python", f'exec python3 -c "{late}; exec(sys.stdin.read())" "$@"')
    b.run("ip", "route", "add", "blackhole", f"{a.address}/32")
    b.limit("nofile", 1024)
    script(c.root / "old-python", 'test "$1" = - && exec python3 "$@"; echo 3.8.10')
    (c.root / "tracehaul").mkdir()
    c.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/srv/tracehaul")
    c.run("mount", "-o", "remount,ro", "/srv/tracehaul")


def examine(operator: Operator) -> None:
    told = json.loads(operator.ask("doctor", "--json", code=1).split("\ntracehaul:")[0])
    found = {(each["host"], each["subject"]): each for each in told["findings"]}
    planted = {
        ("a", "ports"): "taken by others: 7200",
        ("a", "gpu"): "0 GPUs are seen, gpus = 2",
        ("a", "memory"): "need 102400",
        ("a", "model"): "/srv/other.gguf has other contents",
        ("a", "mtu"): "is 1400, others have 1500",
        ("b", "clock"): "3600 s behind",
        ("b", "nofile"): "at most 1024 open files",
        ("b", "rdma"): "no device mlx5_9:1",
        ("b", "network"): "does not read from a: cannot connect to",
        ("c", "python"): "/srv/old-python is 3.8.10",
        ("c", "disk"): "cannot be written: Read-only file system",
        ("c", "address"): "no socket can be bound to 10.99.0.1",
    }
    for key, words in planted.items():
        assert key in found, (key, sorted(found))
        assert words in found[key]["fault"], found[key]
        assert found[key]["remedy"]
        assert "\n" not in found[key]["fault"] + found[key]["remedy"]
    assert set(told["pairs"]) >= {"a<b", "b<a"}


def script(path: Path, text: str) -> None:
    """A program of the host's."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)

"""Our own supervisor over real nodes: they come back, or are left alone and told; they outlive it; they drain."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Generator
from pathlib import Path

import msgspec
import pytest

import cluster
from cluster.hosts.asks import Status, address, ask
from cluster.launch import down
from cluster.processes import start_ticks
from cluster.rundir import RunDir
from cluster.status import supervision
from tests.process.host_nodes import Host, by_name, encoded, make_order, pids
from tests.waiting import wait_until

STARTS_S = 60.0
"""For a node to be started four times, each time by a new Python, where others compute too."""


@pytest.fixture
def host(tmp_path: Path) -> Generator[Host, None, None]:
    host = Host(tmp_path / "run")
    yield host
    left = pids(host.status())
    host.ask("stop")
    assert ask(RunDir(host.path), Status(), timeout_s=5.0) is None
    assert all(start_ticks(pid) is None for pid in left.values() if pid)


def supervisor_of(host: Host) -> int:
    """The process that has the socket."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(address(RunDir(host.path)))
        return int.from_bytes(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def kill_supervisor(host: Host) -> None:
    """As out of memory."""
    victim = supervisor_of(host)
    assert os.getsid(victim) == victim  # no login's end reaches it
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: start_ticks(victim) is None)


def test_a_node_that_is_killed_comes_back_until_it_has_died_too_often(host: Host):
    order = make_order()
    there = host.apply(order)
    assert there.supervisor == "own"
    assert [(node.name, node.state, node.restarts) for node in there.nodes] == [
        ("router-0", "running", 0),
        ("store-0", "running", 0),
        ("store-1", "running", 0),
    ]
    for death in range(1, 3):
        back = host.comes_back("store-0", host.kill("store-0"))
        assert (back.restarts, back.exit_code) == (death, -signal.SIGKILL)
    host.kill("store-0")
    told = host.comes_to("store-0", lambda node: node.state == "given up")
    assert (told.pid, told.exit_code) == (None, -signal.SIGKILL)
    assert told.last_line
    (line,) = supervision(RunDir(host.path))
    assert line.startswith("store-0 is left alone: it died 3 times, the last time with code -9 (")
    assert line.endswith(f". Start it with: tracehaul restart store-0 --run-dir {host.path}")
    after = pids(host.status())
    assert [after[name] for name in ("router-0", "store-1")] == [there.nodes[0].pid, there.nodes[2].pid]
    # An operator who says so again has mended it.
    assert by_name(host.apply(order))["store-0"].state == "running"


def test_what_an_operator_must_mend_is_told_and_tried_until_it_is_mended(host: Host):
    order = make_order(1, "elsewhere")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", order.plan.node("store-0").control_port))
        taken.listen()
        host.ask("apply", given=encoded(order))
        told = host.comes_to("store-0", lambda node: node.state == "faulty" and node.restarts >= 3, STARTS_S)
        assert told.exit_code == 3
        assert "in use" in told.last_line
    host.comes_to("store-0", lambda node: node.phase == "joining", STARTS_S)


def test_nodes_outlive_their_supervisor_and_are_followed_on(host: Host):
    order = make_order(2, "elsewhere")
    there = host.apply(order)
    assert by_name(host.ask("stop", "store-1"))["store-1"].state == "stopped"
    assert msgspec.json.decode(host.call("logs", "store-1", "-n", "1").stdout)["lines"][0].endswith("ended")
    kill_supervisor(host)
    alone = host.ask("status")
    assert alone.supervisor == "none"
    assert pids(alone)["store-0"] == there.nodes[0].pid

    command = [sys.executable, "-m", "cluster.cli", "host", "supervise", "--run-dir", str(host.path)]
    supervisor = subprocess.Popen(command)
    try:
        wait_until(lambda: host.status().supervisor == "own")
        again = by_name(host.status())
        assert again["store-1"].state == "stopped"  # as an operator left it
        assert (again["store-0"].pid, again["store-0"].digest) == (there.nodes[0].pid, there.nodes[0].digest)
        second = subprocess.run(command, capture_output=True, timeout=30)
        assert second.returncode == 1
        assert b"have a supervisor already" in second.stderr

        adopted = host.kill("store-0")
        host.comes_back("store-0", adopted)
        assert by_name(host.ask("restart", "store-1"))["store-1"].pid
        assert b"no node store-9" in host.call("restart", "store-9").stderr
        left = pids(host.status())
    finally:
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=20) == 0
    assert all(start_ticks(pid or 0) is None for pid in left.values())
    assert RunDir(host.path).log_tail("store-0", 1)[0].endswith("ended")  # it was not killed


def test_only_what_changed_is_restarted_and_what_is_gone_is_stopped(host: Host):
    order = make_order(3, "elsewhere")
    there = pids(host.apply(order))
    plan = order.plan
    moved = msgspec.structs.replace(plan.nodes[2], listen="127.0.0.2", address="127.0.0.2")
    fewer = msgspec.structs.replace(order, plan=msgspec.structs.replace(plan, nodes=(*plan.nodes[:2], moved)))
    after = host.apply(fewer)
    assert [node.name for node in after.nodes] == ["store-0", "store-1"]
    assert pids(after)["store-0"] == there["store-0"]
    assert pids(after)["store-1"] != there["store-1"]
    assert start_ticks(there["store-2"] or 0) is None

    # A plan that nodes could not read is refused before anything is stopped.
    (host.path / "cluster.json").unlink()
    (host.path / "cluster.json").mkdir()
    refused = host.call("apply", given=encoded(order))
    assert refused.returncode == 1
    assert b"cannot write" in refused.stderr
    assert pids(host.status()) == pids(after)
    (host.path / "cluster.json").rmdir()


def test_another_release_takes_over_from_the_supervisor_of_the_last(host: Host, tmp_path: Path):
    order = make_order(1, "elsewhere")
    there = host.apply(order)
    last = supervisor_of(host)
    venv.create(tmp_path / "next", symlinks=True)
    paths = os.pathsep.join([str(Path(cluster.__file__).parents[1]), str(Path(msgspec.__file__).parents[1])])
    command = [tmp_path / "next/bin/python", "-m", "cluster.cli", "host", "apply", "--run-dir", host.path]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, input=encoded(order), capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert start_ticks(last) is None
    assert supervisor_of(host) != last
    after = host.status()
    assert after.release != there.release
    assert after.release.endswith("next/bin/python")
    assert start_ticks(there.nodes[0].pid or 0) is None
    run_by = Path(f"/proc/{after.nodes[0].pid}/cmdline").read_bytes()
    assert run_by.startswith(os.fsencode(tmp_path / "next/bin/python"))


def test_a_frozen_node_is_killed_and_an_emptied_folder_ends_nobody(host: Host):
    there = host.apply(make_order(2, "elsewhere"))
    frozen = there.nodes[1].pid
    assert frozen
    os.kill(frozen, signal.SIGSTOP)
    killed = by_name(host.ask("stop", "store-1"))["store-1"]
    assert (killed.state, killed.exit_code) == ("stopped", -signal.SIGKILL)

    shutil.rmtree(host.path)
    assert host.node("store-0").pid == there.nodes[0].pid
    assert host.comes_back("store-0", host.kill("store-0")).restarts == 1
    if os.geteuid() != 0:
        return  # only root can be somebody else
    with socket.socket(socket.AF_UNIX) as peer:
        os.seteuid(65534)
        try:
            peer.connect(address(RunDir(host.path)))
        finally:
            os.seteuid(0)
        peer.settimeout(10.0)
        try:
            peer.sendall(b'{"type":"stop"}\n')
            answer = peer.recv(100)
        except ConnectionError:
            answer = b""
        assert answer == b""
    assert host.node("store-0").state == "starting"


def test_a_host_that_nobody_supervises_is_stopped_and_down_stops_its_supervisor_too(host: Host):
    order = make_order(2, "elsewhere")
    there = pids(host.apply(order))
    kill_supervisor(host)
    alone = by_name(host.ask("stop", "store-1"))
    assert (alone["store-1"].state, alone["store-0"].pid) == ("stopped", there["store-0"])
    assert host.status().supervisor == "none"

    assert by_name(host.apply(order))["store-0"].pid == there["store-0"]
    stopped, killed = down(RunDir(host.path))
    assert (sorted(stopped), killed) == (["store-0", "store-1"], [])
    assert host.status().nodes == ()

"""Our own supervisor over real nodes: they come back, or are left alone and told; they outlive it; they drain."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import msgspec
import pytest

from cluster.hosts.asks import Status, address, ask
from cluster.rundir import RunDir, start_ticks
from tests.process.host_nodes import Host, by_name, encoded, make_order, pids
from tests.process.test_api_http import wait_until


@pytest.fixture
def host(tmp_path: Path) -> Generator[Host, None, None]:
    host = Host(tmp_path / "run")
    yield host
    host.ask("stop")
    assert ask(RunDir(host.path), Status(), timeout_s=5.0) is None


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
    for death in range(1, 4):
        victim = host.kill("store-0")
        if death < 3:
            back = host.comes_back("store-0", victim)
            assert (back.restarts, back.exit_code) == (death, -signal.SIGKILL)
    told = host.comes_to("store-0", lambda node: node.state == "given up")
    assert (told.pid, told.exit_code) == (None, -signal.SIGKILL)
    assert told.last_line
    assert {name: pid for name, pid in pids(host.status()).items() if name != "store-0"} == {
        name: pid for name, pid in pids(there).items() if name != "store-0"
    }
    # An operator who says so again has mended it.
    assert by_name(host.apply(order))["store-0"].state == "running"


def test_what_an_operator_must_mend_is_told_and_tried_until_it_is_mended(host: Host):
    order = make_order()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", order.plan.node("store-1").control_port))
        taken.listen()
        host.apply(order, wait_s=0)
        told = host.comes_to("store-1", lambda node: node.state == "faulty" and node.restarts > 3)
        assert told.exit_code == 3
        assert "in use" in told.last_line
    assert host.comes_to("store-1", lambda node: node.state == "running").phase == "ready"


def test_nodes_outlive_their_supervisor_and_are_followed_on(host: Host):
    order = make_order()
    there = host.apply(order)
    kill_supervisor(host)
    alone = host.ask("status")
    assert alone.supervisor == "none"
    assert pids(alone) == pids(there)

    again = host.apply(order)
    assert again.supervisor == "own"
    assert pids(again) == pids(there)
    assert [node.digest for node in again.nodes] == [node.digest for node in there.nodes]
    assert host.comes_back("store-0", host.kill("store-0")).state == "running"


def test_only_what_changed_is_restarted_and_what_is_gone_is_stopped(host: Host):
    order = make_order()
    there = pids(host.apply(order))
    plan = order.plan
    changed = msgspec.structs.replace(plan.config, s3_bytes=0, quota_bytes={"acme": 1 << 20})
    fewer = msgspec.structs.replace(order, plan=msgspec.structs.replace(plan, config=changed, nodes=plan.nodes[:2]))
    after = host.apply(fewer)
    assert [node.name for node in after.nodes] == ["router-0", "store-0"]
    assert pids(after)["router-0"] == there["router-0"]
    assert pids(after)["store-0"] != there["store-0"]
    assert start_ticks(there["store-1"] or 0) is None
    assert pids(host.apply(fewer)) == pids(after)

    # A plan that nodes could not read is refused before anything is stopped.
    shutil.rmtree(host.path / "cluster.json", ignore_errors=True)
    (host.path / "cluster.json").unlink()
    (host.path / "cluster.json").mkdir()
    refused = host.call("apply", given=encoded(order))
    assert refused.returncode == 1
    assert b"cannot write" in refused.stderr
    assert pids(host.status()) == pids(after)
    (host.path / "cluster.json").rmdir()


def test_stopped_nodes_stay_stopped_and_restart_brings_them_back(host: Host):
    order = make_order()
    there = host.apply(order)
    assert by_name(host.ask("stop", "store-1"))["store-1"].state == "stopped"
    assert msgspec.json.decode(host.call("logs", "store-1", "-n", "1").stdout)["lines"][0].endswith("ended")
    kill_supervisor(host)
    command = [sys.executable, "-m", "cluster.cli", "host", "supervise", "--run-dir", str(host.path)]
    supervisor = subprocess.Popen(command)
    try:
        wait_until(lambda: host.status().supervisor == "own")
        assert host.node("store-1").state == "stopped"
        assert pids(host.status())["store-0"] == there.nodes[1].pid
        second = subprocess.run(command, capture_output=True, timeout=30)
        assert second.returncode == 1
        assert b"have a supervisor already" in second.stderr

        assert by_name(host.ask("restart", "store-1", "--wait", "20"))["store-1"].state == "running"
        assert b"no node store-9" in host.call("restart", "store-9").stderr
    finally:
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=20) == 0
    assert all(start_ticks(node.pid or 0) is None for node in there.nodes)
    for name in ("router-0", "store-0", "store-1"):
        assert RunDir(host.path).log_tail(name, 1)[0].endswith("ended")


def test_a_frozen_node_is_killed_when_it_is_told_to_stop_and_an_emptied_folder_ends_nobody(host: Host):
    order = make_order()
    there = host.apply(order)
    frozen = there.nodes[2].pid
    assert frozen
    os.kill(frozen, signal.SIGSTOP)
    killed = by_name(host.ask("stop", "store-1"))["store-1"]
    assert (killed.state, killed.exit_code) == ("stopped", -signal.SIGKILL)

    shutil.rmtree(host.path)
    assert host.node("store-0").pid == there.nodes[1].pid
    assert host.comes_back("store-0", host.kill("store-0")).restarts == 1


def test_who_is_not_this_user_is_not_answered(host: Host):
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    host.apply(make_order(stores=1))
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
    assert host.status().supervisor == "own"

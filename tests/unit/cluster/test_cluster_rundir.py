"""The run directory: exactly the noted processes are stopped, however they take it."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from cluster.launch import down, refuse_if_running
from cluster.processes import ProcessRecord, alive, start_ticks, stop
from cluster.rundir import ClusterFault, NodeState, RunDir

DEAF = (
    "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def children() -> Generator[list[subprocess.Popen[bytes]], None, None]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        child.kill()
        child.wait()


def sleeper(children: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    children.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
    return children[-1]


def test_down_stops_what_is_noted_and_nothing_else(run: RunDir, children: list[subprocess.Popen[bytes]]):
    ours, other = sleeper(children), sleeper(children)
    run.record("decode-0", ours.pid)
    assert down(run) == (["decode-0"], [])
    assert ours.wait(5) != 0
    assert other.poll() is None
    assert run.records() == []
    assert down(run) == ([], [])


def test_a_pid_that_somebody_else_has_now_is_left_alone(run: RunDir, children: list[subprocess.Popen[bytes]]):
    other = sleeper(children)
    ticks = start_ticks(other.pid)
    assert ticks is not None
    reused = ProcessRecord("decode-0", other.pid, ticks - 1)
    assert not alive(reused)
    assert stop([reused], grace_s=1.0) == []
    assert other.poll() is None


def test_who_ignores_the_signal_is_killed(run: RunDir, children: list[subprocess.Popen[bytes]]):
    child = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, start_new_session=True)
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    record = run.record("store-0", child.pid)
    assert stop([record], grace_s=0.3) == ["store-0"]
    assert child.wait(5) == -9
    child.stdout.close()


def test_the_dead_count_as_stopped_even_before_they_are_reaped(children: list[subprocess.Popen[bytes]], run: RunDir):
    child = sleeper(children)
    record = run.record("x", child.pid)
    os.kill(child.pid, 9)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(record)
    assert stop([record], grace_s=5.0) == []


def test_a_running_cluster_is_not_started_twice(run: RunDir, children: list[subprocess.Popen[bytes]]):
    run.record("decode-0", 2**22 - 1)  # a stale note is no cluster
    refuse_if_running(run)
    run.record("store-0", sleeper(children).pid)
    with pytest.raises(ClusterFault, match=r"already runs.*store-0.*tracehaul down"):
        refuse_if_running(run)


def test_one_launch_at_a_time(run: RunDir):
    with run.lock(), pytest.raises(ClusterFault, match="another"), RunDir(run.path).lock():
        pass
    with run.lock():
        pass


def test_clearing_keeps_the_logs(run: RunDir):
    run.log("store-0").write_text("one\ntwo\nthree\n")
    run.record("store-0", os.getpid())
    run.write_state("store-0", NodeState("ready", "127.0.0.1:1"))
    assert run.state("store-0") == NodeState("ready", "127.0.0.1:1")
    run.clear()
    assert run.records() == []
    assert run.state("store-0") == NodeState("starting")
    assert run.log_tail("store-0", 2) == ["two", "three"]


def test_an_unusable_place_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterFault, match=r"--run-dir"):
        RunDir(tmp_path / "file" / "run").create()


def test_a_node_has_one_process_at_a_time(run: RunDir, children: list[subprocess.Popen[bytes]]):
    first = sleeper(children)
    run.record("store-0", first.pid)
    with pytest.raises(ClusterFault, match=rf"store-0 runs already, as process {first.pid}"):
        run.enter("store-0")
    first.kill()
    first.wait()
    run.enter("store-0")
    assert [r.pid for r in run.records()] == [os.getpid()]
    run.enter("store-0")  # the launcher has noted this very process

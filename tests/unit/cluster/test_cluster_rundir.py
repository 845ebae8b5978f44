"""The run directory: exactly the noted processes are stopped, however they take it."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from cluster.launch import down, refuse_if_running
from cluster.processes import ProcessRecord, alive, frozen, start_ticks, stop
from cluster.rundir import CannotWrite, ClusterFault, NodeState, Notes, RunDir
from cluster.status import outside
from tracehaul.runtime import durable

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


FAULTS = [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES]


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["open", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_one_line(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, code: int, where: str
):
    before = run.record("store-0", os.getpid())

    def refuse(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(durable.os, where, refuse)
        with pytest.raises(CannotWrite, match=os.strerror(code)):
            run.record("store-0", 1)
        with pytest.raises(CannotWrite, match="--run-dir"):
            run.create()
        notes = Notes(run, "store-0")
        notes.enter()
        notes.enter()
        assert notes.stats.unwritten == 2
    assert run.records() == [before]
    assert list((run.path / "processes").iterdir()) == [run.path / "processes" / "store-0.json"]


def test_what_must_survive_is_on_the_disk_with_its_folder(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    fsync = os.fsync

    def spy(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(durable.os, "fsync", spy)
    for write, folder in (
        (lambda: run.record("x", 1), run.path / "processes"),
        (lambda: run.write_plan(b"{}"), run.path),
        (lambda: run.write_operator_key(b"k"), run.path),
    ):
        synced.clear()
        write()
        assert len(synced) == 2
        assert synced[1] == str(folder)


def test_a_note_of_an_earlier_boot_is_of_nobody(run: RunDir):
    record = run.record("store-0", os.getpid())
    assert alive(record)
    assert not alive(msgspec.structs.replace(record, boot="another"))


def fake_node(children: list[subprocess.Popen[bytes]], run: RunDir, name: str) -> subprocess.Popen[bytes]:
    """A process whose command line is a node's."""
    program = run.path / "tracehaul"
    program.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, str(program), "node", name, "--config", str(run.plan_file)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    child.stdout.close()
    return child


@pytest.mark.parametrize("torn", [b"", b'{"name":"decode-0","pi', b"[]"])
def test_a_torn_note_hides_no_process(run: RunDir, children: list[subprocess.Popen[bytes]], torn: bytes):
    lost, other = fake_node(children, run, "decode-0"), sleeper(children)
    run.record("store-0", other.pid)
    (run.path / "processes" / "decode-0.json").write_bytes(torn)
    assert [(record.name, record.pid) for record in run.records()] == [("decode-0", lost.pid), ("store-0", other.pid)]
    with pytest.raises(ClusterFault, match=r"already runs.*decode-0, store-0"):
        refuse_if_running(run)
    with pytest.raises(ClusterFault, match="decode-0 runs already"):
        run.enter("decode-0")
    told: list[str] = []
    stopped, killed = down(run, told.append)
    assert (sorted(stopped), killed) == (["decode-0", "store-0"], [])
    assert len(told) == 1
    assert str(run.path / "processes" / "decode-0.json") in told[0]
    assert run.records() == []
    assert run.torn() == []


def test_who_is_no_member_is_not_ready(run: RunDir, children: list[subprocess.Popen[bytes]]):
    nodes = {name: fake_node(children, run, name) for name in ("router-0", "store-0", "decode-0")}
    for name in nodes:
        run.write_state(name, NodeState("ready"))
    nodes["store-0"].send_signal(signal.SIGSTOP)
    while not any(frozen(record) for record in run.records()):
        pass
    found = {local.name: local for local in outside(run, [*nodes, "decode-1"], [], answers=True)}
    assert {name: local.color for name, local in found.items()} == {
        "router-0": "green",
        "store-0": "yellow",
        "decode-0": "yellow",
        "decode-1": "red",
    }
    assert found["store-0"].health.startswith("frozen, no member (up ")
    assert found["decode-0"].health.startswith("alive, no member (up ")
    assert found["decode-1"].health == "dead"
    assert "decode-0" not in {local.name for local in outside(run, list(nodes), ["decode-0"], answers=True)}
    nodes["store-0"].send_signal(signal.SIGCONT)


def test_several_may_make_sure_of_it_at_once(run: RunDir) -> None:
    def often() -> list[bool]:
        return [run.is_writable() for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        found = [each.result() for each in [threads.submit(often) for _ in range(4)]]
    assert all(map(all, found))
    assert not list(run.path.rglob("*.tmp"))

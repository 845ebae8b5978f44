"""Whom `up` and `down` take for the supervisor of a run directory, and whom they leave alone."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cluster.hosts import asks, own
from cluster.hosts.asks import Status, Stranger, address, ask, supervisor_pid
from cluster.hosts.own import OwnSupervisor
from cluster.launch import down
from cluster.processes import record_of, start_ticks, supervised_folder, supervises
from cluster.rundir import ClusterFault, RunDir

NOBODY = 65534
LISTENS = """
import os, socket, sys, time
listening = socket.socket(socket.AF_UNIX)
if sys.argv[2]:
    os.setuid(int(sys.argv[2]))
listening.bind(bytes.fromhex(sys.argv[1]))
listening.listen()
print("up", flush=True)
time.sleep(60)
"""
Starts = Callable[[Sequence[str]], subprocess.Popen[bytes]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def starts() -> Generator[Starts]:
    """Python with these words, once it has said something."""
    with ExitStack() as stack:

        def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
            child = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, start_new_session=True)
            stack.enter_context(child)
            stack.callback(child.kill)
            assert child.stdout is not None
            assert child.stdout.readline()
            return child

        yield start


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asks, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(own, "LEAVE_TIMEOUT_S", 0.1)


def listener(starts: Starts, run: RunDir, user: str = "") -> subprocess.Popen[bytes]:
    """Who has the supervisor's name, and says nothing."""
    return starts(["-c", LISTENS, address(run).encode().hex(), user])


def ask_till_full(run: RunDir, stack: ExitStack) -> None:
    """Nobody takes these."""
    with suppress(BlockingIOError):
        while True:
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.setblocking(False)
            peer.connect(address(run))


def test_each_container_has_names_of_its_own(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    here = address(run)
    assert here == address(RunDir(run.path))
    assert here != address(RunDir(run.path / "other"))

    def another(path: str) -> str:
        assert path == "/proc/self/ns/pid"
        return "pid:[1]"

    with monkeypatch.context() as patched:
        patched.setattr(os, "readlink", another)
        assert address(run) != here


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_users_is_told_and_left_alone_and_down_ends_its_own_nodes(run: RunDir, starts: Starts):
    stranger = listener(starts, run, str(NOBODY))
    node = starts(["-c", "import time; print('up', flush=True); time.sleep(60)"])
    run.record("store-0", node.pid)
    with pytest.raises(ClusterFault, match=r"^the supervisor of .* is another user's$"):
        down(run)
    assert node.wait(timeout=10) == -signal.SIGTERM
    assert run.records() == []
    assert stranger.poll() is None
    with pytest.raises(ClusterFault, match="another user's"):
        ask(run, Status(), timeout_s=0.1)


def test_who_has_the_name_and_is_no_supervisor_is_not_killed(run: RunDir, starts: Starts):
    stranger = listener(starts, run)
    with pytest.raises(Stranger, match=f"process {stranger.pid} has the name"):
        OwnSupervisor(run).leave()
    assert stranger.poll() is None


def test_a_frozen_supervisor_that_too_many_have_asked_is_found_and_ended(run: RunDir):
    assert supervisor_pid(run) is None
    child = OwnSupervisor(run).begin()
    with child, ExitStack() as stack:
        stack.callback(child.kill)
        while supervisor_pid(run) is None:
            assert child.poll() is None
            threading.Event().wait(0.02)
        assert supervises(record_of("supervisor", child.pid), run.path, {os.geteuid()})
        assert not supervises(record_of("supervisor", child.pid), run.path, {os.geteuid() + 1})
        assert not supervises(record_of("supervisor", child.pid), run.path.parent, {os.geteuid()})
        os.kill(child.pid, signal.SIGSTOP)
        ask_till_full(run, stack)
        assert supervisor_pid(run) == child.pid
        with pytest.raises(ClusterFault, match="takes nobody who asks"):
            ask(run, Status(), timeout_s=0.1)
        assert OwnSupervisor(run).leave()
        assert start_ticks(child.pid) is None


def test_a_name_of_nobody_who_is_known_is_not_taken_for_none(run: RunDir):
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(address(run))
        listening.listen(0)
        ask_till_full(run, stack)
        with pytest.raises(Stranger, match="no process of ours"):
            supervisor_pid(run)


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("python3 -m cluster.hosts.supervise /run/a", "/run/a"),
        ("/venv/bin/python -m cluster.cli host supervise --run-dir /run/a", "/run/a"),
        ("/venv/bin/python /venv/bin/tracehaul host slurm-step a --at a=b --run-dir=/run/a", "/run/a"),
        ("/venv/bin/python /venv/bin/tracehaul host supervise", ".run"),
        ("/venv/bin/python /venv/bin/tracehaul host status --run-dir /run/a", None),
        ("python3 -m cluster.cli node store-0 --config /run/a/cluster.json", None),
        ("sudo python3 -m cluster.hosts.supervise /run/a", None),
        ("", None),
    ],
)
def test_a_supervisor_is_known_by_its_command_line(command: str, folder: str | None):
    words = [*map(os.fsencode, command.split(" ")), b""]
    assert supervised_folder(words) == (None if folder is None else os.fsencode(folder))

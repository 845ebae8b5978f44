"""A run directory that takes nothing, or is torn, ends no node and stops none; every command says what is so."""

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from cluster.config import ClusterConfig, NodeCounts, base_url
from cluster.launch import down, free_port, make_plan, restart, up
from cluster.plan import load_plan, save_plan
from cluster.processes import ProcessRecord, alive
from cluster.rundir import FAULT_EXIT, CannotWrite, RunDir
from tests.process.disk_faults import Kind, can_mount, refusing, small_disk
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.xdist_group("run-dir"),
    pytest.mark.skipif(os.getuid() != 0 or not can_mount(), reason="no file system can be mounted here"),
]
SOFT_LIMIT = 512
NODES = {"router-0", "store-0", "decode-0"}


@pytest.fixture(scope="module")
def run() -> Generator[RunDir]:
    """A running cluster on a small disk, started where few files may be open."""
    counts = NodeCounts(prefill=0)
    config = ClusterConfig(
        port=free_port(), nodes=counts, kv_tokens=2048, store_bytes=64 << 20, threads=1, restart="never"
    )
    with small_disk("2m") as disk:
        run = RunDir(disk / "run")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(SOFT_LIMIT, soft), hard))
        try:
            up(config, run, Console(quiet=True))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        try:
            yield run
        finally:
            down(run)


@pytest.fixture(autouse=True)
def whole_again(run: RunDir) -> Generator[None]:
    """Each test finds every node running, and noted."""
    yield
    lost = NODES - {record.name for record in run.records() if alive(record)}
    if lost == NODES:  # it was stopped, in the end
        return
    if lost:
        restart(run, sorted(lost), Console(quiet=True))
    for record in run.records():
        run.note(record)
    url = base_url(load_plan(run).config)
    wait_until(lambda: all(node["health"] == "ready" for node in httpx.get(f"{url}/cluster", trust_env=False).json()))


def tracehaul(*args: str | Path, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "cluster.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def ask(run: RunDir, tokens: int = 2, trace: str = "t") -> dict[str, Any]:
    body = {"model": "smollm2-135m-instruct", "prompt": "One", "max_tokens": tokens, "ignore_eos": True}
    url = f"{base_url(load_plan(run).config)}/v1/completions"
    answer = httpx.post(url, json=body, headers={"x-trace-id": trace}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def lives(url: str) -> dict[str, int]:
    answer = httpx.get(f"{url}/cluster", timeout=5, trust_env=False)
    return {node["info"]["node"]: node["info"]["generation"] for node in answer.json()}


def process(run: RunDir, name: str) -> ProcessRecord:
    return next(record for record in run.records() if record.name == name)


def kill(run: RunDir, name: str, number: signal.Signals = signal.SIGKILL) -> None:
    record = process(run, name)
    os.kill(record.pid, number)
    if number != signal.SIGSTOP:
        wait_until(lambda: not alive(record))


@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS", "EIO", "EACCES", "vanished"])
def test_a_disk_that_takes_nothing_ends_no_node_and_stops_none(run: RunDir, kind: Kind) -> None:
    before = run.records()
    url, folder = base_url(load_plan(run).config), run.path
    with refusing(kind, folder) as unprivileged:
        done = tracehaul("restart", "store-0", "--run-dir", folder, before=unprivileged)
        wait_until(lambda: httpx.get(f"{url}/health", trust_env=False).status_code == 200)
        assert set(lives(url)) == NODES - {"router-0"}
        assert all(alive(record) for record in before)
    ask(run)
    assert run.records() == before
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line]
    if kind in ("ENOSPC", "EROFS", "EACCES"):
        why = {"ENOSPC": "No space left", "EROFS": "Read-only file system", "EACCES": "Permission denied"}[kind]
        assert re.fullmatch(rf"tracehaul: cannot write the run directory .*{why}.*; nothing was stopped", line)
    else:
        assert re.match("tracehaul: (cannot read|no cluster runs here)", line)


def test_steps_are_answered_and_told_of_while_the_disk_is_full(run: RunDir) -> None:
    with refusing("ENOSPC", run.path):
        for number in range(3):
            assert ask(run, trace=f"full-{number}")["usage"]["completion_tokens"] == 2
        threading.Event().wait(0.7)  # what waits for the disk has been refused
        assert {record.name for record in run.records() if alive(record)} == NODES
    ask(run, trace="after")
    wait_until(lambda: '"after"' in run.decisions().read_text(), 5)


@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS", "EACCES"])
def test_a_node_whose_notes_are_refused_serves_and_drains(run: RunDir, kind: Kind, tmp_path: Path) -> None:
    url, plan, said = base_url(load_plan(run).config), run.plan_file, tmp_path / "said"
    kill(run, "store-0")
    wait_until(lambda: "store-0" not in lives(url))
    with refusing(kind, run.path) as unprivileged:
        command = [*unprivileged, sys.executable, "-m", "cluster.cli", "node", "store-0", "--config", str(plan)]
        # On the full disk its log is there, too.
        with (run.log("store-0") if kind == "ENOSPC" else said).open("ab") as log:
            node = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: "store-0" in lives(url))
            assert process(run, "store-0").pid == node.pid
            ask(RunDir(run.path))
        finally:
            node.send_signal(signal.SIGTERM)
            code = node.wait(20)
    assert code == 0
    if kind != "ENOSPC":
        assert said.read_text().count("not noted: the run directory cannot be written") == 1
        assert "ended" in said.read_text().splitlines()[-1]


def test_a_disk_that_fills_up_while_a_node_is_stopped_leaves_it_not_stopped(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, looked = RunDir.create, 0
    disk = refusing("ENOSPC", run.path)

    def check_and_fill(self: RunDir) -> None:
        nonlocal looked
        checked(self)
        looked += 1
        if looked == 1:
            disk.__enter__()

    before = process(run, "store-0")
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "create", check_and_fill)
        try:
            restart(run, ["store-0"], Console(quiet=True))
            with pytest.raises(CannotWrite):
                run.create()
            after = process(run, "store-0")
        finally:
            disk.__exit__(None, None, None)
    assert looked == 1
    assert after.pid != before.pid
    assert alive(after)


def test_a_step_that_runs_is_answered_though_its_node_stops_on_a_full_disk(run: RunDir) -> None:
    got: list[dict[str, Any]] = []
    decode = process(run, "decode-0")
    with refusing("ENOSPC", run.path):
        asking = threading.Thread(target=lambda: got.append(ask(run, 100, "long")))
        asking.start()
        url = base_url(load_plan(run).config)
        wait_until(lambda: "running" in httpx.get(f"{url}/v1/traces/long", trust_env=False).text)
        os.kill(decode.pid, signal.SIGTERM)
        asking.join(60)
        wait_until(lambda: not alive(decode))
    assert [answer["usage"]["completion_tokens"] for answer in got] == [100]


def test_a_frozen_node_is_not_ready(run: RunDir) -> None:
    kill(run, "store-0", signal.SIGSTOP)
    try:
        seen = tracehaul("status", "--run-dir", run.path)
    finally:
        os.kill(process(run, "store-0").pid, signal.SIGCONT)
    health = {line.split()[0]: line for line in seen.stdout.splitlines() if line.split()}
    assert "frozen" in health["store-0"]
    assert "ready" not in health["store-0"]
    assert "ready" in health["decode-0"]


def test_one_torn_note_hides_no_other(run: RunDir) -> None:
    torn = run.path / "processes" / "decode-0.json"
    before = run.records()
    torn.write_bytes(b"")
    hint = run.path / "state" / "store-0.json"
    told = hint.read_bytes()
    hint.write_bytes(b'{"phase":')
    seen = tracehaul("status", "--run-dir", run.path)
    hint.write_bytes(told)
    assert seen.returncode == 0
    assert str(torn) in seen.stderr
    assert all(name in seen.stdout for name in NODES)
    assert run.records() == before  # it is found by its command line
    refused = tracehaul("up", "--run-dir", run.path)
    assert "already runs" in refused.stderr
    assert "decode-0" in refused.stderr


def test_without_its_router_a_cluster_is_shown_explained_and_mended(run: RunDir) -> None:
    ask(run, trace="told")
    wait_until(lambda: '"told"' in run.decisions().read_text())
    kill(run, "router-0")
    seen = tracehaul("status", "--run-dir", run.path)
    assert seen.returncode == 1
    rows = {line.split()[0]: line for line in seen.stdout.splitlines() if line.split()}
    assert "dead" in rows["router-0"]
    for name in ("store-0", "decode-0"):
        assert "alive, no member" in rows[name]
    assert f"tracehaul restart router-0 --run-dir {run.path}" in seen.stderr
    told = tracehaul("explain", "told", "--run-dir", run.path)
    assert told.returncode == 0, told.stderr
    assert "no router answers" in told.stdout
    assert "ended (length)" in told.stdout
    restart(run, ["router-0"], Console(quiet=True))
    wait_until(lambda: set(lives(base_url(load_plan(run).config))) == NODES - {"router-0"})
    assert tracehaul("status", "--run-dir", run.path).returncode == 0
    again = tracehaul("explain", "told", "--run-dir", run.path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("Trace told is ")
    assert "1 step" in again.stdout
    assert tracehaul("explain", "never", "--run-dir", run.path).returncode == 1


def test_open_files_are_what_the_config_promises(run: RunDir) -> None:
    api = load_plan(run).config.api.connections_max
    least = {"router-0": api + 1024, "store-0": 1024, "decode-0": 1024}
    for record in run.records():
        limits = Path(f"/proc/{record.pid}/limits").read_text()
        found = re.search(r"Max open files +(\d+)", limits)
        assert found is not None
        assert int(found[1]) > least[record.name] > SOFT_LIMIT


def test_a_limit_of_open_files_that_is_too_low_is_one_line(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "run")
    other.create()
    save_plan(other, make_plan(ClusterConfig(nodes=NodeCounts(prefill=0)), Console(file=io.StringIO())))
    limited = ["prlimit", "--nofile=300:300"]
    done = tracehaul("node", "store-0", "--config", other.plan_file, before=limited)
    assert done.returncode == FAULT_EXIT
    line = done.stderr.splitlines()[-1]
    assert "may open 300 files" in line
    assert "connections_max" in line


def test_down_stops_all_whatever_the_disk_takes(run: RunDir) -> None:
    records = run.records()
    (run.path / "processes" / "decode-0.json").write_bytes(b"{")
    copy = Path(shutil.copy(run.plan_file, run.path.parent / "plan"))
    with refusing("EROFS", run.path):
        done = tracehaul("down", "--run-dir", run.path)
    assert done.returncode == 0
    assert not any(alive(record) for record in records)
    assert "Stopped" in done.stdout
    assert "Had to be killed" not in done.stderr
    assert "cannot read" in done.stderr
    assert "Read-only file system" in done.stderr
    with suppress(FileNotFoundError):
        copy.unlink()

"""The command line over real processes: a cluster comes up, answers, is seen, and goes; or says in one line why not."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from cluster.processes import alive
from cluster.rundir import RunDir
from tests.waiting import wait_until
from tracehaul.runtime import clock
from tracehaul.runtime.ports import free_port

SMALL = ["--kv-tokens", "4096", "--store-bytes", "64MiB", "--restart", "never"]


def tracehaul(*args: str | Path, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture
def run(tmp_path: Path) -> Generator[RunDir, None, None]:
    run = RunDir(tmp_path / "run")
    yield run
    tracehaul("down", "--run-dir", run.path)


def refused(*args: str | Path) -> str:
    """The one line that a failing command leaves on stderr."""
    done = tracehaul(*args)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("tracehaul:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def ask(port: int) -> str:
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "What is the capital of France? Answer in English."}],
        "temperature": 0,
        "max_tokens": 8,
    }
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_cluster_from_start_to_end(run: RunDir):
    port = free_port()
    bystander = subprocess.Popen(["sleep", "300"], start_new_session=True)
    try:
        done = tracehaul("up", "--run-dir", run.path, "--port", port, *SMALL)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"ready http://127.0.0.1:{port}\n"
        assert "Paris" in ask(port)

        records = run.records()
        assert [r.name for r in records] == ["decode-0", "prefill-0", "router-0", "store-0"]
        assert all(os.getsid(r.pid) == r.pid for r in records)

        seen = tracehaul("status", "--run-dir", run.path)
        assert seen.returncode == 0, seen.stderr
        for name in ("decode-0", "prefill-0", "store-0", "ready", "smollm2-135m-instruct"):
            assert name in seen.stdout
        assert tracehaul("status", "--url", f"http://127.0.0.1:{port}").stdout.count("ready") == 3
        for name in ("decode-0", "prefill-0", "store-0", "router-0"):
            page = httpx.get(f"http://{run.state(name).metrics}/metrics", trust_env=False).text
            assert "process_cpu_seconds_total" in page
            assert "tracehaul_" in page

        assert "already runs" in refused("up", "--run-dir", run.path, "--port", free_port(), *SMALL)
        assert "cannot listen" in refused("up", "--run-dir", run.path.parent / "other", "--port", port, *SMALL)
        assert all(alive(r) for r in records)

        assert "runs already" in tracehaul("node", "store-0", "--config", run.plan_file).stderr.splitlines()[-1]
        os.kill(next(r.pid for r in records if r.name == "prefill-0"), signal.SIGKILL)
        wait_until(lambda: "dead" in tracehaul("status", "--run-dir", run.path).stdout)
        assert "Paris" in ask(port)

        assert tracehaul("down", "--run-dir", run.path).returncode == 0
        assert not any(alive(r) for r in records)
        assert bystander.poll() is None
        again = tracehaul("down", "--run-dir", run.path)
        assert (again.returncode, again.stdout) == (0, "Nothing runs here.\n")
        assert "no cluster runs here" in refused("status", "--run-dir", run.path)
        assert all("ended" in run.log_tail(r.name, 1)[0] for r in records if r.name != "prefill-0")
    finally:
        bystander.kill()
        bystander.wait()


def test_a_node_that_dies_while_starting_takes_the_launch_back(run: RunDir):
    """Also what a launch does when it is interrupted: the same way back."""
    command = [sys.executable, "-m", "cluster.cli", "up", "--run-dir", str(run.path), "--port", str(free_port())]
    launch = subprocess.Popen([*command, *SMALL], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    victim = wait_for(run, "decode-0", launch)
    others = [r for r in run.records() if r.name not in ("up", "decode-0")]
    os.kill(victim, signal.SIGKILL)
    _, errors = launch.communicate(timeout=60)
    assert launch.returncode == 1
    assert "decode-0 was ended by SIGKILL" in errors
    assert "Traceback" not in errors
    assert others
    assert not any(alive(r) for r in others)
    assert run.records() == []


@pytest.mark.parametrize("how", ["ctrl-c", "down"])
def test_an_interrupted_launch_leaves_nothing(run: RunDir, how: str):
    command = [sys.executable, "-m", "cluster.cli", "up", "--run-dir", str(run.path), "--port", str(free_port())]
    launch = subprocess.Popen([*command, *SMALL], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(run, "decode-0", launch)
    records = [r for r in run.records() if r.name != "up"]
    if how == "ctrl-c":
        launch.send_signal(signal.SIGINT)
    else:
        assert tracehaul("down", "--run-dir", run.path).returncode == 0
    output, errors = launch.communicate(timeout=60)
    assert launch.returncode == 1, errors
    assert output == ""
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert records
    assert not any(alive(r) for r in records)


def wait_for(run: RunDir, name: str, launch: subprocess.Popen[str]) -> int:
    """Until that node has been started; its pid."""
    deadline = clock.perf_s() + 60
    while clock.perf_s() < deadline:
        assert launch.poll() is None, launch.communicate()[1]
        if (run.path / "processes").is_dir():
            found = [r.pid for r in run.records() if r.name == name and alive(r)]
            if found:
                return found[0]
    raise AssertionError(f"{name} was not started")


def test_a_port_in_use_is_one_line(tmp_path: Path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        line = refused("up", "--run-dir", tmp_path / "run", "--port", str(holder.getsockname()[1]))
    assert "cannot listen" in line
    assert "--port" in line


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path):
    line = refused("up", "--run-dir", tmp_path / "run", "--port", str(free_port()), "--model", tmp_path / "no.gguf")
    assert "no.gguf" in line


def test_an_arena_that_cannot_fit_is_one_line(tmp_path: Path):
    line = refused("up", "--run-dir", tmp_path / "run", "--port", str(free_port()), "--store-bytes", "900TiB")
    assert "not enough memory" in line
    assert "--store-bytes" in line


def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "--run-dir" in refused("up", "--run-dir", tmp_path / "file" / "run")


def test_a_config_with_a_wrong_name_is_one_line(tmp_path: Path):
    config = tmp_path / "cluster.toml"
    config.write_text("[worker]\nchunks = 1\n")
    assert "chunks" in refused("up", "--config", config, "--run-dir", tmp_path / "run")


def test_a_node_without_a_plan_says_so(tmp_path: Path):
    done = tracehaul("node", "store-0", "--config", tmp_path / "cluster.json")
    assert done.returncode == 3
    assert "no cluster runs here" in done.stderr.splitlines()[-1]

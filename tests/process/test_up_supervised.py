"""A cluster of `tracehaul up` is supervised: its nodes come back or are left alone and told, and nothing stays."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from cluster.hosts.asks import supervisor_pid
from cluster.launch import free_port
from cluster.processes import alive, start_ticks
from cluster.rundir import RunDir
from tests.process.test_cluster_up import ask, refused, tracehaul
from tests.process.test_run_dir import kill, process
from tests.waiting import wait_until

pytestmark = pytest.mark.xdist_group("up-supervised")
WAIT_S = 90.0
OPTIONS = ["--prefill", "0", "--kv-tokens", "2048", "--store-bytes", "64MiB"]


def health(port: int) -> dict[str, str]:
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/cluster", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return {}
    return {node["info"]["node"]: node["health"] for node in answer.json()}


def test_a_cluster_of_up_is_supervised_from_start_to_end(tmp_path: Path) -> None:
    run, port = RunDir(tmp_path / "run"), free_port()
    place = ["--run-dir", run.path]
    try:
        done = tracehaul("up", *place, "--port", str(port), *OPTIONS)
        assert done.returncode == 0, done.stderr
        before = {record.name: record.pid for record in run.records()}
        assert tracehaul("status", *place).stderr == ""

        # A worker that is killed comes back by itself, and serves.
        kill(run, "decode-0")
        wait_until(lambda: alive(process(run, "decode-0")), WAIT_S)
        wait_until(lambda: health(port).get("decode-0") == "ready" and run.state("decode-0").phase == "ready", WAIT_S)
        assert process(run, "decode-0").pid != before["decode-0"]
        assert "Paris" in ask(port)

        # Without its supervisor the nodes serve on, and `status` says who would not come back.
        supervisor = supervisor_pid(run)
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: start_ticks(supervisor) is None)
        seen = tracehaul("status", *place)
        assert seen.returncode == 0
        assert f"tracehaul up --run-dir {run.path}" in seen.stderr.replace("\n", "")
        kill(run, "store-0")
        living = {record.name: record.pid for record in run.records() if alive(record)}
        assert set(living) == {"router-0", "decode-0"}

        # `up` brings it back: what runs is followed on, what died meanwhile is started.
        again = tracehaul("up", *place)
        assert (again.returncode, again.stdout) == (0, f"ready http://127.0.0.1:{port}\n"), again.stderr
        records = run.records()
        assert {record.name: record.pid for record in records if record.name != "store-0"} == living
        assert alive(process(run, "store-0"))
        assert "already runs" in refused("up", *place)

        assert tracehaul("down", *place).returncode == 0
        assert supervisor_pid(run) is None
        assert not any(alive(record) for record in records)
        assert run.records() == []
        assert not run.host_file.exists()
    finally:
        tracehaul("down", *place)

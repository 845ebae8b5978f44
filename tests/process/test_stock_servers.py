"""A cluster whose workers start a stock server each: it answers, is told its options, and ends with its worker."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from rich.console import Console

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import down, free_port, up
from cluster.plan import load_plan, with_engine
from cluster.rundir import ClusterFault, RunDir
from engines.adapter.config import AdapterConfig
from engines.adapter.server_keeper import others
from tracehaul.engine.fake import expected_output
from tracehaul.runtime import clock
from tracehaul.wire.steps import Sampling
from worker.config import WorkerConfig

ROOT = Path(__file__).parents[2]
VOCABULARY = 49_152
PROMPT = list(range(100, 140))

pytestmark = pytest.mark.xdist_group("stock servers")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Fleet, None, None]:
    folder = tmp_path_factory.mktemp("stock")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.process.stock_process "$@"\n')
    python.chmod(0o755)
    quick = AdapterConfig(poll_s=0.1, answer_timeout_s=1.0, down_timeout_s=1.0, stop_timeout_s=1.0)
    port = free_port()
    there = PoolConfig(prefill=0, engine="sglang", attach={"decode-there-0": f"http://127.0.0.1:{port}"}, adapter=quick)
    stock = PoolConfig(prefill=0, engine="vllm", engine_python=str(python), adapter=quick, engine_args=("--tp", "2"))
    config = ClusterConfig(
        port=free_port(),
        store_bytes=64 << 20,
        pools={"stock": stock, "there": there},
        worker=WorkerConfig(use_store=False),
    )
    of_its_own = [str(python), "-m", "sglang.launch_server", "--served-model-name", "there", "--port", str(port)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "STOCK_NOTES": str(folder / "there")}
    server = subprocess.Popen(of_its_own, env=environ, start_new_session=True)
    run, console = RunDir(folder / "run"), Console(quiet=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("STOCK_NOTES", str(folder / "notes"))
        environment.setenv("STOCK_ITERATION_S", "0.01")
        fleet = Fleet(config, run, up(config, run, console)[0], console)
    try:
        yield fleet
    finally:
        fleet.close()
        down(run)
        assert server.poll() is None, "a server that was there before stays"
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def notes(cluster: Fleet) -> dict[str, Any]:
    return msgspec.json.decode((cluster.run.path.parent / "notes").read_bytes())


def complete(cluster: Fleet, **more: Any) -> httpx.Response:
    body = {"model": "stock", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "return_token_ids": True} | more
    return httpx.post(f"{cluster.url}/v1/completions", json=body, trust_env=False, timeout=30)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what: Callable[[], bool], within_s: float = 20.0) -> None:
    until_s = clock.perf_s() + within_s
    while not what():
        assert clock.perf_s() < until_s
        threading.Event().wait(0.05)


def of_group(group: int) -> list[int]:
    return [pid for pid in others(group) if not gone(pid)]


def test_a_pool_of_stock_servers_answers_through_the_router(cluster: Fleet) -> None:
    answer = complete(cluster)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == expected_output(PROMPT, Sampling(6, temperature=0.0), VOCABULARY)
    (node, other) = [node["info"] for node in cluster.nodes() if node["info"]["role"] == "decode"]
    assert (other["engine"], other["model"]) == ("sglang", "there")
    assert (node["engine"], node["pool"], node["model"]) == ("vllm", "stock", "stock")
    assert "seeds" in node["lacks"]
    told = notes(cluster)["arguments"]
    assert told[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert told[-2:] == ["--tp", "2"], "an operator's options come last, and so win"
    assert "--kv-transfer-config" not in told, "without a store there is nothing to share through"
    refused = complete(cluster, prompt=[5] * 2000)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_server_dies_with_its_worker_and_with_all_that_it_started(cluster: Fleet) -> None:
    server, run = notes(cluster)["pid"], cluster.run
    group = os.getpgid(server)
    assert len(of_group(group)) == 3, "who keeps it, itself, and what it has started"
    (worker,) = [record.pid for record in run.records() if record.name == "decode-stock-0"]
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not of_group(group))


def test_a_worker_ends_with_its_server_and_comes_back_with_another(cluster: Fleet) -> None:
    from cluster.launch import restart

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("STOCK_NOTES", str(cluster.run.path.parent / "notes"))
        restart(cluster.run, ["decode-stock-0"], Console(quiet=True))
    assert complete(cluster).status_code == 200
    (record,) = [record for record in cluster.run.records() if record.name == "decode-stock-0"]
    group = os.getpgid(notes(cluster)["pid"])
    os.kill(notes(cluster)["pid"], signal.SIGKILL)
    wait_for(lambda: gone(record.pid))
    wait_for(lambda: not of_group(group))
    assert "has ended with code" in cluster.run.log("decode-stock-0").read_text()


def test_a_frozen_server_gets_no_work_until_it_answers_again(cluster: Fleet) -> None:
    wanted = expected_output(PROMPT, Sampling(6, temperature=0.0), VOCABULARY)
    assert complete(cluster, model="there").json()["choices"][0]["token_ids"] == wanted
    server = msgspec.json.decode((cluster.run.path.parent / "there").read_bytes())["pid"]

    def fault() -> str:
        return next(node["load"]["fault"] for node in cluster.nodes() if node["info"]["pool"] == "there")

    os.kill(server, signal.SIGSTOP)
    try:
        wait_for(lambda: "does not answer" in fault())
        assert complete(cluster, model="there").status_code in (404, 503)
    finally:
        os.kill(server, signal.SIGCONT)
    wait_for(lambda: complete(cluster, model="there").status_code == 200)


def test_a_node_may_be_told_its_engine_and_where_a_server_answers(cluster: Fleet) -> None:
    plan = load_plan(cluster.run)
    told = with_engine(plan, "decode-stock-0", "sglang", "http://127.0.0.1:9")
    assert told.pool("stock").config.engine == "sglang"
    assert told.pool("stock").config.attach == {"decode-stock-0": "http://127.0.0.1:9"}
    assert with_engine(plan, "decode-stock-0", None, "") is plan
    for name, engine, attach, why in (
        ("store-0", "vllm", "", "no worker"),
        ("decode-stock-0", "tensorrt", "", "no engine"),
        ("decode-stock-0", "native", "http://127.0.0.1:9", "other engines"),
    ):
        with pytest.raises(ClusterFault, match=why):
            with_engine(plan, name, engine, attach)

"""What a launch finds out before it starts anything, and how counts become metrics."""

import asyncio
import json
import threading
from pathlib import Path

import httpx
import msgspec
import pytest

from cluster.config import ClusterConfig, authority
from cluster.launch import check_port, free_port
from cluster.metrics import NodeMetrics
from cluster.model import kv_layout
from cluster.rundir import ClusterFault
from tracehaul.model.source import ModelSource
from tracehaul.wire.cluster import NodeLoad

SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


def folder(tmp_path: Path, config: object) -> ModelSource:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ModelSource("m", tmp_path, "hf", "llama")


@pytest.mark.parametrize(
    ("config", "kv_heads", "head_dim"),
    [(SHAPE, 2, 8), (SHAPE | {"head_dim": 16}, 2, 16), (SHAPE | {"num_key_value_heads": None}, 8, 8)],
)
def test_the_size_of_kv_follows_from_the_models_files(
    tmp_path: Path, config: dict[str, object], kv_heads: int, head_dim: int
):
    layout = kv_layout(folder(tmp_path, config), "float32")
    assert layout.token_bytes == 3 * 2 * kv_heads * head_dim * 4


@pytest.mark.parametrize("config", [{}, [], SHAPE | {"num_hidden_layers": "many"}])
def test_files_that_do_not_tell_are_refused_by_name(tmp_path: Path, config: object):
    with pytest.raises(ClusterFault, match="m"):
        kv_layout(folder(tmp_path, config), "bfloat16")


def test_a_host_that_is_not_ours_is_refused():
    check_port(ClusterConfig(port=free_port()))
    with pytest.raises(ClusterFault, match="--host"):
        check_port(ClusterConfig(host="192.0.2.1", port=free_port()))


class Counts(msgspec.Struct):
    """Counts of a node."""

    steps: int = 0
    pull_s: float = 0.0
    misses: dict[str, int] = msgspec.field(default_factory=dict[str, int])


def test_every_count_is_a_metric_and_is_read_when_asked():
    counts = Counts()
    metrics = NodeMetrics({"worker": counts}, lambda: NodeLoad(running=7))
    counts.steps = 3
    counts.pull_s = 0.5
    counts.misses["absent"] = 2
    lines = metrics.render().decode().splitlines()
    assert "tracehaul_worker_steps_total 3.0" in lines
    assert "tracehaul_worker_pull_seconds_total 0.5" in lines
    assert 'tracehaul_worker_misses_total{reason="absent"} 2.0' in lines
    assert "tracehaul_node_running 7.0" in lines


def test_the_metrics_page_is_read_on_the_loop_and_binds_where_it_is_told_to():
    threads = []

    def load():
        threads.append(threading.get_ident())
        return NodeLoad(running=7)

    async def main():
        page = await NodeMetrics({"worker": Counts(steps=3)}, load).serve("127.0.0.2")
        try:
            async with httpx.AsyncClient(base_url=f"http://{authority(page.host, page.port)}", trust_env=False) as http:
                answer = await http.get("/metrics")
                assert (await http.get("/")).status_code == 404
                assert (await http.post("/metrics")).status_code == 405
                with pytest.raises(httpx.ConnectError):
                    await http.get(f"http://127.0.0.1:{page.port}/metrics")
            return answer, page.host
        finally:
            await page.close()

    answer, host = asyncio.run(main())
    assert host == "127.0.0.2"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert {"tracehaul_worker_steps_total 3.0", "tracehaul_node_running 7.0"} <= set(answer.text.splitlines())
    assert set(threads) == {threading.get_ident()}

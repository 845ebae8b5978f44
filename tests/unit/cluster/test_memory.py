"""What the nodes of a host need is counted whole, and a shortage says what to make smaller."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.config import ClusterConfig, NodeCounts, PoolConfig, pools_of
from cluster.launch import check_memory
from cluster.memory import (
    GIB,
    MIB,
    PROCESS_BYTES,
    SERVER_BYTES,
    STAGING_BYTES,
    WORKER_BYTES,
    Available,
    ModelSize,
    Need,
    needs,
    shortage,
)
from cluster.model import model_size
from cluster.plan import PoolPlan, nodes_of
from cluster.rundir import ClusterFault
from engines.adapter.footprint import Footprint
from engines.blocks.config import EngineConfig
from tracehaul.model.source import ModelSource
from worker.config import WorkerConfig

SOURCE = ModelSource("m", Path("/models/m"), "hf", "llama")
SIZE = ModelSize(3 * GIB, "", 1000)
SHARED = SIZE._replace(shared="m bfloat16 None")


def plans(config: ClusterConfig) -> list[PoolPlan]:
    pools = pools_of(config).items()
    return [PoolPlan(name, msgspec.structs.replace(SOURCE, name=name or "m"), pool) for name, pool in pools]


def asked(config: ClusterConfig, size: ModelSize, *, on_gpu: bool = False) -> dict[str, int]:
    pools = plans(config)
    sizes = {pool.name: size for pool in pools}
    found = needs(config, nodes_of(config), pools, sizes, staging_bytes=MIB, on_gpu=on_gpu)
    assert found == sorted(found, key=lambda need: -need.nbytes)
    assert all(need.option for need in found)
    return {need.what: need.nbytes for need in found}


CONFIG = ClusterConfig(nodes=NodeCounts(prefill=1, decode=2, store=2), kv_tokens=1 << 20, store_bytes=2 * GIB)


def test_everything_that_takes_memory_is_counted() -> None:
    assert asked(CONFIG, SIZE) == {
        "the arenas of 2 store nodes": 4 * GIB,
        "KV of 3 workers of m": 3 * (1 << 20) * 1000,
        "weights of 3 workers of m": 9 * GIB,
        "staging of 3 workers of m": 3 * 64 * MIB,
        "3 processes of workers": 3 * WORKER_BYTES,
        "3 other processes": 3 * PROCESS_BYTES,
    }


def test_weights_that_are_mapped_count_once_also_over_pools() -> None:
    assert asked(CONFIG, SHARED)["weights of 3 workers of m, shared"] == 3 * GIB
    config = ClusterConfig(pools={"a": PoolConfig(prefill=0, decode=1), "b": PoolConfig(prefill=0, decode=1)})
    assert sum(nbytes for what, nbytes in asked(config, SHARED).items() if "weights" in what) == 3 * GIB
    assert sum(nbytes for what, nbytes in asked(config, SIZE).items() if "weights" in what) == 6 * GIB


def test_what_a_gpu_holds_is_not_the_hosts() -> None:
    assert not any("KV" in what or "weights" in what for what in asked(CONFIG, SIZE, on_gpu=True))


def test_only_the_nodes_of_the_host_count() -> None:
    pools = plans(CONFIG)
    stores = [node for node in nodes_of(CONFIG) if node.role == "store"]
    found = needs(CONFIG, stores, pools, {"": SIZE}, staging_bytes=MIB, on_gpu=False)
    assert sum(need.nbytes for need in found) == 4 * GIB + 2 * PROCESS_BYTES


def test_a_plugins_staging_is_what_it_takes() -> None:
    assert EngineConfig("name", "revision").staging_bytes == STAGING_BYTES


def test_stock_servers_take_what_their_options_say_and_their_processes() -> None:
    vllm = PoolConfig(engine="vllm", prefill=0, decode=3, attach={"decode-a-2": "http://h:1"})
    sizes = SIZE._replace(stock=Footprint(5 * GIB, 0, 2, "--kv"))
    config = ClusterConfig(pools={"a": vllm}, store_bytes=GIB)
    assert asked(config, sizes) == {
        "the arenas of 1 store node": GIB,
        "processes of 2 servers of a": 2 * 2 * SERVER_BYTES,
        "staging of 2 servers of a": 2 * 2 * 256 * MIB,
        "KV of 2 servers of a": 2 * 5 * GIB,
        "weights of 2 servers of a": 2 * 3 * GIB,
        "3 processes of workers": 3 * WORKER_BYTES,
        "2 other processes": 2 * PROCESS_BYTES,
    }
    pages = SIZE._replace(stock=Footprint(5 * GIB, 7 * GIB, 1, "--kv"))
    on_gpu = asked(config, pages, on_gpu=True)
    assert on_gpu["host pages of 2 servers of a"] == 14 * GIB
    assert not any("KV" in what or "weights" in what for what in on_gpu)
    alone = msgspec.structs.replace(config, worker=WorkerConfig(use_store=False))
    assert not any("staging" in what or "pages" in what for what in asked(alone, pages))


@pytest.mark.parametrize(
    ("engine", "args", "computed", "host", "ranks"),
    [
        ("vllm", (), 0, 0, 1),
        ("vllm", ("--kv-cache-memory-bytes", "1G", "--tensor-parallel-size=2"), 2 << 30, 0, 2),
        ("vllm", ("--kv-cache-memory-bytes=5k", "--kv-cache-memory-bytes", "1000"), 1000, 0, 1),
        ("vllm", ("-tp", "2", "-pp", "3", "--kv-cache-memory-bytes", "7"), 42, 0, 6),
        ("vllm", ("--kv-cache-memory-bytes", "auto"), 0, 0, 1),
        ("vllm", ("--kv-cache-memory-bytes",), 0, 0, 1),
        ("sglang", (), 0, 0, 1),
        ("sglang", ("--max-total-tokens", "100", "--tp", "2"), 100 * 192, 200 * 192, 2),
        ("sglang", ("--max-total-tokens", "100", "--hicache-ratio", "1.5"), 100 * 192, 150 * 192, 1),
        ("sglang", ("--hicache-size", "30", "--tp-size", "4"), 0, 120 * 10**9, 4),
    ],
)
def test_a_servers_footprint_is_read_from_its_options(
    tmp_path: Path, engine: Any, args: tuple[str, ...], computed: int, host: int, ranks: int
) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(SHAPE))
    (tmp_path / "model.safetensors").write_bytes(bytes(777))
    source = ModelSource("m", tmp_path, "hf", "llama")
    size = model_size(source, PoolConfig(engine=engine, engine_args=args), "bfloat16")
    assert size.token_bytes == 192
    assert size.weights_bytes == 777
    assert size.stock is not None
    assert size.stock[:3] == (computed, host, ranks)
    assert size.stock.option
    unshared = PoolConfig(engine=engine, engine_args=args, worker=WorkerConfig(use_store=False))
    assert model_size(source, unshared, "bfloat16").stock[1] == 0  # pyright: ignore[reportOptionalSubscript]


def test_a_shortage_says_what_and_which_option() -> None:
    some = [Need("weights", 3 * GIB, "--weights int8"), Need("arenas", 500 * MIB, "--store-bytes")]
    assert shortage(some, Available(4 * GIB, "this machine's")) is None
    assert shortage(some, Available(3 * GIB, "what memory.max of the control group /pod leaves")) == (
        "not enough memory: 3.5 GiB asked, 3.0 GiB available (what memory.max of the control group /pod leaves): "
        "3.0 GiB for weights (--weights int8); 500 MiB for arenas (--store-bytes)"
    )


SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("weights", "dtype", "bytes_each"), [(None, "float32", 4), (None, "bfloat16", 2), ("int8", "bfloat16", 1)]
)
def test_weights_follow_from_the_models_shape(tmp_path: Path, weights, dtype, bytes_each) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(SHAPE))
    size = model_size(ModelSource("m", tmp_path, "hf", "llama"), PoolConfig(weights=weights), dtype)
    layer = 64 * 64 * 2 + 2 * 64 * 16 + 3 * 64 * 96
    assert size.weights_bytes == (3 * layer + 100 * 64) * bytes_each
    assert bool(size.shared) == (weights == "int8")


def test_a_launch_asks_this_machine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(SHAPE))
    source = ModelSource("m", tmp_path, "hf", "llama")

    def check(config: ClusterConfig) -> None:
        check_memory(config, nodes_of(config), [PoolPlan("", source, pools_of(config)[""])], MIB)

    check(ClusterConfig(kv_tokens=1024, store_bytes=1 << 20))
    with pytest.raises(ClusterFault, match=r"not enough memory: .*KV of 2 workers of m \(--kv-tokens\)"):
        check(ClusterConfig(kv_tokens=1 << 40))

"""The cluster's config: strict, merged from file and command line, and the sizes that follow from it."""

import re
from pathlib import Path

import pytest

from cluster.config import (
    ClusterConfig,
    NodeCounts,
    base_url,
    disk_path,
    parse_bytes,
    parse_quota,
    pools_of,
    store_config,
)
from cluster.config_file import load_config
from cluster.journal import rows_of
from cluster.plan import nodes_of, threads_of
from cluster.rundir import ClusterFault, RunDir
from tracehaul.wire.hashing import KVLayout

LAYOUT = KVLayout(model="m", dtype="bfloat16", layers=30, kv_heads=3, head_dim=64, element_bytes=2)


def test_defaults_need_no_file():
    assert load_config(None, {}) == ClusterConfig()


def test_the_command_line_wins_over_the_file(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text("port = 9000\ndtype = 'float32'\n[nodes]\ndecode = 3\n[worker]\nchunk_tokens = 64\n")
    config = load_config(file, {"port": 9001, "nodes.prefill": 2, "worker.chunk_tokens": None})
    assert (config.port, config.dtype) == (9001, "float32")
    assert config.nodes == NodeCounts(prefill=2, decode=3, store=1)
    assert config.worker.chunk_tokens == 64


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ports = 1", "ports"),
        ("[worker]\nchunk = 1", "chunk"),
        ("port = 70000", "port"),
        ("[nodes]\ndecode = 0", "nodes.decode"),
        ("port = 'x'", "port"),
        ("port = ", "TOML"),
        ("[api]\nfiles_url = 's3:/bucket'", "api.files_url"),
        ("[api]\nfiles_url = 's3://bucket/a'\nfiles_dir = '/tmp'", "not both"),
        ("database = 'postgresql://h/d'", "line 1.: with `database` a cluster has a `name`"),
    ],
)
def test_what_no_config_has_is_refused_by_name(tmp_path: Path, text: str, part: str):
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    with pytest.raises(ClusterFault, match=part) as caught:
        load_config(file, {})
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_clusters_share_a_database_but_no_rows():
    assert rows_of(ClusterConfig(), "router-0") == "router-0"
    assert rows_of(ClusterConfig(name="ours", database="postgresql://h/d"), "router-0") == "ours"
    with pytest.raises(ClusterFault, match="`name`"):
        rows_of(ClusterConfig(database="postgresql://h/d"), "router-0")


def test_quotas_reach_the_store_nodes(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text('store_bytes = 67108864\n[quota_bytes]\nacme = 33554432\n"b.c d" = 1048576\n')
    config = store_config(load_config(file, {}), [LAYOUT])
    assert config.quota_bytes == {"acme": 32 << 20, "b.c d": 1 << 20}
    with pytest.raises(ClusterFault, match="quota_bytes"):
        store_config(load_config(file, {"quota_bytes": {"acme": 65 << 20}}), [LAYOUT])
    assert parse_quota("a=b=2MiB") == ("a=b", 2 << 20)
    for wrong in ("acme", "acme=much"):
        with pytest.raises(ValueError, match="not a"):
            parse_quota(wrong)


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(ClusterFault, match=r"none\.toml"):
        load_config(tmp_path / "none.toml", {})


def test_an_override_cannot_reach_into_a_value(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text("nodes = 3")
    with pytest.raises(ClusterFault, match="nodes"):
        load_config(file, {"nodes.decode": 1})


def test_every_node_has_a_name_and_the_router_comes_first():
    config = ClusterConfig(nodes=NodeCounts(prefill=0, decode=2, store=1))
    assert [(n.name, n.role) for n in nodes_of(config)] == [
        ("router-0", "router"),
        ("store-0", "store"),
        ("decode-0", "decode"),
        ("decode-1", "decode"),
    ]


@pytest.mark.parametrize(
    ("cores", "prefill", "decode", "threads"), [(1, 1, 1, 1), (2, 1, 1, 2), (16, 1, 1, 8), (4, 4, 4, 2)]
)
def test_cores_are_divided_but_two_are_shared(cores: int, prefill: int, decode: int, threads: int):
    assert threads_of(ClusterConfig(), prefill + decode, cores) == threads
    assert threads_of(ClusterConfig(threads=5), prefill + decode, cores) == 5


def test_a_slot_holds_a_block_in_whole_pages():
    store = store_config(ClusterConfig(store_bytes=64 << 20), [LAYOUT])
    assert store.slot_bytes % 4096 == 0
    assert LAYOUT.block_bytes <= store.slot_bytes < LAYOUT.block_bytes + 4096
    with pytest.raises(ClusterFault, match="--store-bytes"):
        store_config(ClusterConfig(store_bytes=1 << 20), [KVLayout("m", "float32", 80, 8, 128, 4, block_tokens=256)])


def test_a_disk_tier_is_off_unless_asked_for_and_lies_in_the_run_directory(tmp_path: Path):
    assert ClusterConfig().disk_bytes == 0
    assert disk_path(ClusterConfig(), RunDir(tmp_path), "store-0") == tmp_path / "disk" / "store-0.blocks"
    assert disk_path(ClusterConfig(disk_dir="/data"), RunDir(tmp_path), "store-1") == Path("/data/store-1.blocks")
    with pytest.raises(ClusterFault, match="--disk-bytes"):
        store_config(ClusterConfig(disk_bytes=4096), [LAYOUT])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (ClusterConfig(s3_url="s3://bucket/x"), "needs both"),
        (ClusterConfig(s3_bytes=1 << 30), "needs both"),
        (ClusterConfig(s3_url="https://bucket/x", s3_bytes=1 << 30), "not an address"),
        (ClusterConfig(s3_url="s3://bucket/x", s3_bytes=4096), "--s3-bytes"),
        (ClusterConfig(s3_url="s3://bucket/x", s3_bytes=1 << 60), "--s3-bytes"),
    ],
)
def test_an_s3_tier_is_asked_for_with_all_that_it_needs(wrong: ClusterConfig, why: str):
    store_config(ClusterConfig(s3_url="s3://bucket/x", s3_bytes=1 << 30), [LAYOUT])
    with pytest.raises(ClusterFault, match=why):
        store_config(wrong, [LAYOUT])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1048576", 1 << 20), ("512MiB", 512 << 20), ("2 GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("4G", 4 * 10**9)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1 apple", "1e400G", "nan", "--"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_the_url_is_one_a_client_can_use():
    assert base_url(ClusterConfig(host="0.0.0.0", port=81)) == "http://127.0.0.1:81"
    assert base_url(ClusterConfig(host="::", port=81)) == "http://[::1]:81"
    assert base_url(ClusterConfig(host="::1", port=81)) == "http://[::1]:81"


POOLS = """
kv_tokens = 4096
[nodes]
store = 2
[pools.chat]
serves = "org/chat"
decode = 2
[pools.code]
model = "/models/code"
prefill = 0
dtype = "float32"
"""


def test_pools_have_workers_of_their_own_and_inherit_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(POOLS)
    config = load_config(file, {"threads": 3})
    pools = pools_of(config)
    assert [(name, pool.serves, pool.dtype, pool.kv_tokens) for name, pool in pools.items()] == [
        ("chat", "org/chat", "bfloat16", 4096),
        ("code", "code", "float32", 4096),
    ]
    assert [(spec.name, spec.pool) for spec in nodes_of(config)] == [
        ("router-0", ""),
        ("store-0", ""),
        ("store-1", ""),
        ("prefill-chat-0", "chat"),
        ("decode-chat-0", "chat"),
        ("decode-chat-1", "chat"),
        ("decode-code-0", "code"),
    ]
    assert threads_of(config, 4, 8) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('model = "m"\n[pools.a]\n', "each pool says its own model"),
        ("[nodes]\nprefill = 2\n[pools.a]\n", "each pool says its own prefill"),
        ('[pools."a/b"]\n', "Expected `str` matching regex"),
        ("[pools.a]\n[pools.b]\nserves = 'a'\n", "two pools serve one name (a, a)"),
        ("[pools.a]\ndecodes = 1\n", "decodes"),
    ],
)
def test_pools_that_make_no_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ClusterFault, match=re.escape(words)):
        load_config(file, {})

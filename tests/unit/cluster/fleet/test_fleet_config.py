"""A fleet's file: strict, each error with its line and key; where its nodes go."""

from pathlib import Path

import pytest

from cluster.config_file import line_of, load_config
from cluster.fleet.placing import order_for, place, pools_on
from cluster.plan import NodeSpec, Plan, PoolPlan
from cluster.rundir import ClusterFault
from kvstore.config import StoreConfig
from tracehaul.model.source import ModelSource

FLEET = """\
kv_tokens = 4096
[prices]
h200 = 3.5

[[hosts]]
name = "gpu-1"
ssh = "ops@10.0.0.1"
address = "10.0.0.1"
gpus = 4
kind = "h200"
nodes = { router = 1, store = 1, prefill = 2, decode = "per-gpu" }

[[hosts]]
name = "gpu-2"
address = "fd00::2"
listen = "::"
data_address = "fd01::2"
store_bytes = 2147483648
kv_tokens = 8192
threads = 3
nodes = { store = 2, decode = 1 }
"""


def fleet(tmp_path: Path, text: str = FLEET) -> Path:
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    return file


def test_nodes_are_named_after_their_hosts_and_have_fixed_ports(tmp_path: Path) -> None:
    nodes = place(load_config(fleet(tmp_path), {}), {})
    assert [(spec.name, spec.control_port, spec.gpus) for spec in nodes] == [
        ("router-gpu-1-0", 7000, ()),
        ("store-gpu-1-0", 7200, ()),
        ("store-gpu-2-0", 7200, ()),
        ("store-gpu-2-1", 7203, ()),
        ("prefill-gpu-1-0", 7400, (0,)),
        ("prefill-gpu-1-1", 7403, (1,)),
        ("decode-gpu-1-0", 7600, (2,)),
        ("decode-gpu-1-1", 7603, (3,)),
        ("decode-gpu-1-2", 7606, (0,)),
        ("decode-gpu-1-3", 7609, (1,)),
        ("decode-gpu-2-0", 7600, ()),
    ]
    last = nodes[-1]
    assert (last.control, last.data_port, last.metrics_port) == ("[fd00::2]:7600", 7601, 7602)
    assert (last.listen, last.data_address) == ("::", "fd01::2")
    ports = [(spec.host, port) for spec in nodes for port in (spec.control_port, spec.data_port, spec.metrics_port)]
    assert len(set(ports)) == len(ports)


def test_hosts_that_come_and_go_change_no_other_node(tmp_path: Path) -> None:
    both = place(load_config(fleet(tmp_path), {}), {})
    alone = FLEET[: FLEET.index('[[hosts]]\nname = "gpu-2"')]
    assert place(load_config(fleet(tmp_path, alone), {}), {}) == tuple(n for n in both if n.host == "gpu-1")


def test_an_address_is_asked_for_only_where_none_is_said(tmp_path: Path) -> None:
    config = load_config(fleet(tmp_path, FLEET.replace('address = "10.0.0.1"\n', "")), {})
    nodes = place(config, {"gpu-1": "gpu-1.example"})
    assert nodes[0].control == "gpu-1.example:7000"
    assert nodes[0].listen == "gpu-1.example"


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("gpus = 4", "gpu = 4", 9, "unknown field `gpu`"),
        ('address = "fd00::2"', "address = 7", 15, r"hosts\[1\].address"),
        ("prefill = 2,", "prefil = 2,", 11, "unknown field `prefil`"),
        ('kind = "h200"', 'kind = "h100"', 10, "has no h100"),
        ("gpus = 4\n", "", 10, "has no GPUs"),
        ('name = "gpu-2"', 'name = "gpu-1"', 14, "two hosts are called gpu-1"),
        ('name = "gpu-2"', 'name = "Gpu 2"', 14, r"hosts\[1\].name"),
        ("decode = 1 }", "decode = { big = 1 } }", 21, "a number: there are no"),
        ("kv_tokens = 4096", "kv_tokens = 4096\n[nodes]\ndecode = 2", 2, "each host says its own nodes"),
        ("kv_tokens = 8192", 'kv_tokens = "8k"', 19, r"hosts\[1\].kv_tokens"),
        ("kv_tokens = 4096", "kv_tokens = 4096\nkv_token = 1", 2, "unknown field `kv_token`"),
        ("router = 1, ", "", 5, "no host has a router"),
        ("router = 1", "router = 2", 11, r"nodes.router"),
        ("h200 = 3.5", "h200 = -1", 2, "prices"),
        ("kv_tokens = 8192", 'ucx_tls = ["rc,tcp"]', 19, r"ucx_tls"),
    ],
)  # fmt: skip
def test_each_error_names_its_line_and_its_key(tmp_path: Path, before: str, after: str, line: int, words: str) -> None:
    assert before in FLEET
    with pytest.raises(ClusterFault, match=words) as caught:
        load_config(fleet(tmp_path, FLEET.replace(before, after, 1)), {})
    assert f"cluster.toml, line {line})" in str(caught.value)


def test_a_host_says_what_ucx_may_use(tmp_path: Path) -> None:
    text = FLEET.replace("kv_tokens = 8192", 'ucx_tls = ["rc", "tcp"]\nucx_devices = ["mlx5_0:1"]')
    nodes = {spec.name: spec for spec in place(load_config(fleet(tmp_path, text), {}), {})}
    there = nodes["decode-gpu-2-0"].data
    assert (there.devices, there.ucx_tls) == (("mlx5_0:1",), "rc,tcp")
    assert nodes["decode-gpu-1-0"].data.ucx_tls == ""


def test_what_is_no_toml_is_said_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ClusterFault, match="line 2"):
        load_config(fleet(tmp_path, "port = 1\nport 2\n"), {})


def test_keys_are_found_where_tables_are_nested() -> None:
    text = 'a.b = 1\n[x]\ny = 2\n[x.z]\nk = 3\n[[l]]\nq = 1\n[l.m]\nr = 2\n[[l]]\n[l.m]\nr = 3\n"odd key" = 1\n'
    assert line_of(text, ["a", "b"]) == 1
    assert line_of(text, ["x", "y"]) == 3
    assert line_of(text, ["x", "z", "k"]) == 5
    assert line_of(text, ["l", 0, "m", "r"]) == 9
    assert line_of(text, ["l", 1, "m", "r"]) == 12
    assert line_of(text, ["l", 1, "m", "odd key"]) == 13
    assert line_of(text, ["l", 1, "m", "none"]) == 11
    assert line_of(text, ["none"]) is None


POOLS = """\
[pools.chat]
model = "smollm2-135m-instruct"
[pools.code]
model = "/models/code"
[[hosts]]
name = "a"
address = "10.0.0.1"
model = { code = "/data/code" }
nodes = { router = 1, store = 1, decode = { chat = 2, code = 1 } }
[[hosts]]
name = "b"
address = "10.0.0.2"
nodes = { decode = { chat = 1 } }
"""


def _plan(tmp_path: Path, text: str) -> Plan:
    config = load_config(fleet(tmp_path, text), {})
    pools = tuple(
        PoolPlan(name, ModelSource(name, Path(f"/here/{name}.gguf"), "gguf", "llama"), pool)
        for name, pool in config.pools.items()
    )
    return Plan(config, pools, StoreConfig(1 << 30, 1 << 20), place(config, {}))


def test_a_host_reads_the_plan_with_what_is_said_of_it_alone(tmp_path: Path) -> None:
    plan = _plan(tmp_path, POOLS)
    assert [spec.name for spec in plan.nodes if spec.role == "decode"] == [
        "decode-chat-a-0", "decode-chat-a-1", "decode-code-a-0", "decode-chat-b-0",
    ]  # fmt: skip
    hosts = {host.name: host for host in plan.config.hosts}
    assert pools_on(plan, "a") == ["chat", "code"]
    assert pools_on(plan, "b") == ["chat"]
    order = order_for(hosts["a"], plan, "/home/ops/.tracehaul", {"chat": "0" * 64, "code": "1" * 64})
    assert [str(pool.model.path) for pool in order.plan.pools] == [
        f"/home/ops/.tracehaul/models/{'0' * 16}/chat.gguf",
        "/data/code",
    ]
    assert order.plan.pools[1].config.model == "/data/code"
    assert [spec.name for spec in order.nodes] == [
        "router-a-0", "store-a-0", "decode-chat-a-0", "decode-chat-a-1", "decode-code-a-0",
    ]  # fmt: skip


def test_with_pools_counts_are_said_by_pool(tmp_path: Path) -> None:
    with pytest.raises(ClusterFault, match=r"line 13\).*said as by pool"):
        load_config(fleet(tmp_path, POOLS.replace("decode = { chat = 1 }", "decode = 1")), {})
    with pytest.raises(ClusterFault, match="there is no pool chit"):
        load_config(fleet(tmp_path, POOLS.replace("decode = { chat = 1 }", "decode = { chit = 1 }")), {})
    with pytest.raises(ClusterFault, match="no host has a decode worker of code"):
        load_config(fleet(tmp_path, POOLS.replace(", code = 1 }", " }")), {})


def test_routers_are_known_by_their_addresses(tmp_path: Path) -> None:
    plan = _plan(tmp_path, POOLS)
    assert plan.routers == ("10.0.0.1:7000",)
    assert plan.workers_on("a") == 3
    assert plan.node("store-a-0") == NodeSpec(
        "store-a-0", "store", "", "a", "10.0.0.1", "10.0.0.1", "", 7200, 7201, 7202
    )
    with pytest.raises(ClusterFault, match="no node store-b-0"):
        plan.node("store-b-0")

"""What a host's facts, and hosts compared, show to be wrong; one line of what to do for each."""

import msgspec
import pytest

from cluster.config import ClusterConfig
from cluster.fleet.config import HostConfig, HostNodes
from cluster.fleet.doctor import of_pairs, of_reports
from cluster.fleet.facts import Facts, Gpu, Interface, RdmaPort, Seen, UcxDevice
from cluster.fleet.findings import of_fleet, of_host, of_transport
from cluster.hosts.orders import HostReport, NodeReport
from cluster.hosts.pair import Measured
from cluster.memory import Need
from cluster.plan import NodeSpec
from cluster.security.config import SecurityConfig

GIB = 2**30
GOOD = Facts(
    boot_id="1",
    machine="x86_64",
    glibc="2.36",
    python="3.11.7",
    python_lacks="",
    home="/root/.tracehaul",
    home_fault="",
    home_free_bytes=100 * GIB,
    memfd_fault="",
    available_bytes=60 * GIB,
    nofile_hard=1 << 20,
    interfaces=(Interface("eth0", 9000, True, 100_000, ("10.0.0.1",)),),
    rdma=(RdmaPort("mlx5_0:1", True), RdmaPort("mlx5_1:1", False)),
    gpus=(Gpu("H200", 140 * GIB, 139 * GIB, "580"), Gpu("H200", 140 * GIB, 139 * GIB, "580")),
    listen_fault="",
    ports_taken=(),
    models={"": "d" * 64},
    wall_s=0.0,
)
HOST = HostConfig("a", HostNodes(router=1, store=1, decode=2), address="10.0.0.1", gpus=2)
NODES = [NodeSpec("store-a-0", "store", host="a", listen="10.0.0.1")]


def found(facts: Facts, host: HostConfig = HOST, *, skew_s: float = 0.0, running: bool = False):
    return of_host(host, Seen(facts, skew_s, 0.3), NODES, [Need("arenas", GIB, "--store-bytes")], running)


def test_a_good_host_has_nothing_wrong():
    assert found(GOOD) == []


@pytest.mark.parametrize(
    ("facts", "host", "subject", "words"),
    [
        ({"python_lacks": "there is none", "python": ""}, {}, "python", "python3: there is none"),
        ({"python": "3.9.2"}, {}, "python", "python3 is 3.9.2"),
        ({"glibc": ""}, {}, "system", "not glibc"),
        ({"glibc": "2.17"}, {}, "system", "2.17"),
        ({"home_fault": "Read-only file system"}, {}, "disk", "cannot be written: Read-only file system"),
        ({"home_free_bytes": GIB}, {}, "disk", "1.0 GiB free"),
        ({"memfd_fault": "Operation not permitted"}, {}, "shm", "cannot share memory"),
        ({"nofile_hard": 1024}, {}, "nofile", "at most 1024 open files"),
        ({"listen_fault": "Cannot assign requested address"}, {}, "address", "10.0.0.1: Cannot assign"),
        ({"ports_taken": (7200, 7201)}, {}, "ports", "taken by others: 7200, 7201"),
        ({"available_bytes": GIB // 2}, {}, "memory", "need 1.0 GiB, 0.5 GiB are available"),
        ({"gpus": ()}, {}, "gpu", "0 GPUs are seen, gpus = 2"),
        ({}, {"ucx_devices": ("mlx5_1:1",)}, "rdma", "mlx5_1:1 is not active"),
        ({}, {"ucx_devices": ("mlx5_7:1",)}, "rdma", "no device mlx5_7:1"),
    ],
)
def test_each_fault_is_one_line_with_what_to_do(facts, host, subject, words):
    findings = found(msgspec.structs.replace(GOOD, **facts), msgspec.structs.replace(HOST, **host))
    assert [finding.subject for finding in findings] == [subject]
    assert words in findings[0].fault
    assert findings[0].fatal
    assert findings[0].remedy
    assert "\n" not in findings[0].fault + findings[0].remedy


def test_a_clock_is_judged_by_more_than_the_questions_own_time():
    assert found(GOOD, skew_s=1.9) == []
    ahead, behind = found(GOOD, skew_s=3600.0)[0], found(GOOD, skew_s=-7.0)[0]
    assert "3600 s ahead of" in ahead.fault
    assert "7 s behind" in behind.fault
    assert not ahead.fatal


def test_what_runs_has_its_ports_and_its_memory():
    facts = msgspec.structs.replace(GOOD, ports_taken=(7200,), available_bytes=0, home_free_bytes=GIB)
    assert found(facts, running=True) == []


def test_an_environment_that_is_there_needs_no_python():
    host = msgspec.structs.replace(HOST, environment="/opt/tracehaul")
    assert found(msgspec.structs.replace(GOOD, python="", python_lacks="there is none"), host) == []


UCX_SEES = (UcxDevice("eth0", ("tcp",)), UcxDevice("mlx5_0:1", ("rc_verbs", "ud_verbs")))


@pytest.mark.parametrize(
    ("transport", "data", "host", "ucx", "words"),
    [
        ("auto", "auth", {}, UCX_SEES, ["KV moves by UCX, which neither proves nor encrypts"]),
        ("auto", "auth", {}, (), ["KV moves by UCX, which neither proves nor encrypts"]),
        ("auto", "auth", {}, UCX_SEES[:1], ["UCX does not find mlx5_0:1", "KV moves by UCX"]),
        ("auto", "tls", {}, UCX_SEES, ['not used: mlx5_0:1, by data = "tls"']),
        ("auto", "auth", {"ucx_devices": ("eth0",)}, UCX_SEES, ["not used: mlx5_0:1, by `ucx_devices` or `ucx_tls`"]),
        ("auto", "auth", {"ucx_tls": ("tcp",)}, UCX_SEES, ["not used: mlx5_0:1, by `ucx_devices` or `ucx_tls`"]),
        ("auto", "auth", {"ucx_tls": ("rc", "tcp")}, UCX_SEES, ["KV moves by UCX"]),
        ("nixl", "auth", {"ucx_tls": ("^rc", "ib")}, UCX_SEES, ["KV moves by UCX"]),
        ("nixl", "auth", {"ucx_devices": ("eth0",)}, UCX_SEES, ["not used: mlx5_0:1", "KV moves by UCX"]),
        ("tcp", "auth", {}, UCX_SEES, ['not used: mlx5_0:1, by transport = "tcp"']),
    ],
)
def test_what_kv_does_not_use_and_what_nobody_proves(transport, data, host, ucx, words):
    config = ClusterConfig(transport=transport, security=SecurityConfig("mtls", data, True))
    facts = msgspec.structs.replace(GOOD, ucx=ucx)
    findings = of_transport(config, msgspec.structs.replace(HOST, **host), facts)
    assert len(findings) == len(words)
    for finding, said in zip(findings, words, strict=True):
        assert said in finding.fault
        assert finding.remedy
        assert not finding.fatal


def test_where_there_is_no_rdma_there_is_nothing_to_say_of_it():
    facts = msgspec.structs.replace(GOOD, rdma=(RdmaPort("mlx5_1:1", False),))
    assert of_transport(ClusterConfig(transport="auto"), HOST, facts) == []


def test_hosts_are_compared():
    config = ClusterConfig(
        hosts=(HOST, HostConfig("b", address="10.0.0.2", model="/models/m"), HostConfig("c", model="/models/m"))
    )
    b = msgspec.structs.replace(
        GOOD, boot_id="2", models={"": "e" * 64}, interfaces=(Interface("eth0", 1500, True, 0, ("10.0.0.2",)),)
    )
    c = msgspec.structs.replace(GOOD, models={"": ""})
    seen = {name: Seen(facts, 0.0, 0.1) for name, facts in {"a": GOOD, "b": b, "c": c}.items()}
    findings = of_fleet(config, seen, {"": "d" * 64}, {"a": "10.0.0.1", "b": "10.0.0.2"})
    assert [(each.host, each.subject) for each in findings] == [
        ("b", "model"), ("c", "address"), ("c", "model"), ("b", "mtu"),
    ]  # fmt: skip
    assert "other contents" in findings[0].fault
    assert "the same machine as a" in findings[1].fault
    assert "there is no /models/m" in findings[2].fault
    assert "1500, others have 9000" in findings[3].fault


def test_ways_between_hosts_are_judged_by_each_other():
    good = Measured("", 1e-4, 1e-3, 10e9, 10e9)
    pairs = {
        ("a", "b"): good,
        ("b", "a"): good,
        ("a", "c"): msgspec.structs.replace(good, read_bytes_s=3e9),
        ("c", "a"): msgspec.structs.replace(good, ping_s=0.02),
        ("b", "c"): Measured("cannot connect to 10.0.0.3:7190: no answer"),
        ("c", "b"): Measured("tcp: timed out", ping_s=0.1),
    }
    findings = of_pairs(pairs)
    assert [(each.host, each.fatal) for each in findings] == [
        ("a", False),
        ("c", False),
        ("b", True),
        ("c", False),
        ("c", True),
    ]
    assert "3.00 GB/s from c, others 10.00" in findings[0].fault
    assert "20.0 ms to a" in findings[1].fault
    assert "does not read from c: cannot connect to 10.0.0.3:7190" in findings[2].fault
    assert "100.0 ms to b" in findings[3].fault, "which may be why"
    assert "does not read from b" in findings[4].fault


def test_nodes_that_were_given_up_are_told():
    nodes = (
        NodeReport("store-a-0", "store", "running", 7),
        NodeReport("decode-a-0", "decode", "given up", last_line="out of memory"),
    )
    findings = of_reports({"a": HostReport("a", "own", nodes, "1")})
    assert [finding.fault for finding in findings] == ["decode-a-0 is given up: out of memory"]
    assert "tracehaul restart decode-a-0" in findings[0].remedy

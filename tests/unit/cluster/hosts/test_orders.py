"""What a host shall run: which nodes, what they read, and so which of them a change restarts."""

import msgspec
import pytest

from cluster.config import ClusterConfig
from cluster.hosts.changes import Changes, changes
from cluster.hosts.orders import (
    READ_BY,
    HostReport,
    NodeCondition,
    NodeReport,
    Order,
    digests,
    environment,
    role_of,
    stages,
    variables,
)
from router.dispatch.config import DispatchConfig
from tests.unit.cluster.hosts.plans import MIB, order, plan

RELEASE = "1.0 /srv/tracehaul/1.0"
WORKERS = {"prefill-a-0", "decode-a-0"}
ALL = {"router-a-0", "store-a-0", *WORKERS}


def changed(after: Order, release: str = RELEASE) -> set[str]:
    """Nodes of host ``a`` whose digest is not what it was."""
    before, now = digests(order(), RELEASE), digests(after, release)
    return {name for name in before if before[name] != now[name]}


def test_an_order_is_of_one_host_and_goes_through_json():
    assert [spec.name for spec in order("b").nodes] == ["store-b-0", "decode-b-0"]
    data = msgspec.json.encode(order(), enc_hook=str)
    again = msgspec.json.decode(data, type=Order, dec_hook=lambda kind, value: kind(value))
    assert again == order()
    assert digests(again, RELEASE) == digests(order(), RELEASE)


@pytest.mark.parametrize(
    ("config", "restarted"),
    [
        (ClusterConfig(), set[str]()),
        (ClusterConfig(start_timeout_s=1.0, prices={"big": 2.0}), set[str]()),
        (ClusterConfig(port=9000), {"router-a-0"}),
        (ClusterConfig(dispatch=DispatchConfig(use_store=False)), {"router-a-0"}),
        (ClusterConfig(disk_bytes=64 * MIB), {"store-a-0"}),
        (ClusterConfig(threads=3), WORKERS),
        (ClusterConfig(transport="tcp"), ALL - {"router-a-0"}),
        (ClusterConfig(drain_timeout_s=99.0), ALL),
    ],
)
def test_a_change_restarts_those_who_read_it(config: ClusterConfig, restarted: set[str]):
    assert changed(order(config=config)) == restarted


def test_a_release_restarts_all_and_a_host_that_joins_none():
    assert changed(order(), "1.1 /srv/tracehaul/1.1") == ALL
    there = plan()
    more = msgspec.structs.replace(there.nodes[2], name="store-c-0", host="c", address="10.0.0.3")
    grown = msgspec.structs.replace(there, nodes=(*there.nodes, more))
    assert changed(Order(grown, "a")) == set()


def test_a_router_that_moves_is_restarted_and_found_by_those_who_join_it():
    there = plan()
    moved = msgspec.structs.replace(there.nodes[0], control_port=7003)
    assert changed(Order(msgspec.structs.replace(there, nodes=(moved, *there.nodes[1:])), "a")) == {"router-a-0"}


def test_fields_that_have_readers_are_fields():
    assert READ_BY.keys() <= set(ClusterConfig.__struct_fields__)


def test_a_node_sees_its_gpus_among_those_that_its_supervisor_sees():
    spec = order("b").nodes[1]
    assert environment(order("b"), spec, RELEASE)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment(order("b"), spec, RELEASE, "4,5,6,7")["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert "CUDA_VISIBLE_DEVICES" not in environment(order("b"), order("b").nodes[0], RELEASE, "4,5")


def test_who_lets_work_in_stops_first_and_who_keeps_it_last():
    roles = {spec.name: spec.role for spec in plan().nodes if spec.host == "a"}
    assert stages(roles) == [["router-a-0"], ["prefill-a-0", "decode-a-0"], ["store-a-0"]]
    assert role_of("decode-pool.x-0") == "decode"
    assert role_of("supervisor") is None


def test_an_environment_file_is_lines_of_variables():
    text = '# secret\nAWS_ACCESS_KEY_ID=abc\n\nAWS_SECRET_ACCESS_KEY="d=e f"\nnothing\n'
    assert variables(text) == {"AWS_ACCESS_KEY_ID": "abc", "AWS_SECRET_ACCESS_KEY": "d=e f"}


def report(**states: NodeCondition) -> HostReport:
    """Nodes of host ``a`` as they are, with what they would be started with today."""
    now = digests(order(), RELEASE)
    names = {name.replace("_", "-"): state for name, state in states.items()}
    nodes = [
        NodeReport(name, role_of(name) or "store", state, digest=now.get(name, "")) for name, state in names.items()
    ]
    return HostReport("a", "own", tuple(nodes), "1.0")


def todo(there: HostReport) -> Changes:
    return changes(there, order(), digests(order(), RELEASE))


def test_on_an_empty_host_all_is_started_in_the_plans_order():
    assert todo(report()) == Changes(start=("router-a-0", "store-a-0", "prefill-a-0", "decode-a-0"))


def test_what_is_as_it_shall_be_is_untouched():
    there = report(router_a_0="running", store_a_0="starting", prefill_a_0="backoff", decode_a_0="faulty")
    assert todo(there) == Changes()


def test_what_was_left_alone_is_started_but_not_one_whose_name_another_has():
    there = report(router_a_0="stopped", store_a_0="fenced", prefill_a_0="given up", decode_a_0="running")
    assert todo(there) == Changes(start=("router-a-0", "prefill-a-0"))


@pytest.mark.parametrize("state", ["running", "starting", "backoff", "faulty", "fenced"])
def test_what_changed_is_restarted(state: NodeCondition):
    there = report(router_a_0="running", store_a_0=state, prefill_a_0="running", decode_a_0="running")
    old = tuple(
        msgspec.structs.replace(node, digest="old") if node.name == "store-a-0" else node for node in there.nodes
    )
    assert todo(msgspec.structs.replace(there, nodes=old)) == Changes(restart=("store-a-0",))


def test_what_is_no_more_of_this_host_is_stopped():
    there = report(
        router_a_0="running", store_a_0="running", prefill_a_0="running", decode_a_0="running", decode_a_7="running"
    )
    assert todo(there) == Changes(stop=("decode-a-7",))

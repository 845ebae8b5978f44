from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet.lists import CHANGES_MAX, MemberList
from tracehaul.rpc.views import Views
from tracehaul.wire.cluster import NodeInfo, Role, Viewer
from tracehaul.wire.ids import Epoch, Generation, NodeId


def info(name: str, role: Role = "store", generation: int = 1, pool: str = "") -> NodeInfo:
    return NodeInfo(NodeId(name), Generation(generation), role, f"{name}:1", pool=pool, epoch=Epoch(generation))


STORE, PREFILL, OTHER, DECODE = info("s"), info("p", "prefill", pool="x"), info("q", "prefill"), info("d", "decode")
ALL = (STORE, PREFILL, OTHER, DECODE)


@pytest.mark.parametrize(
    ("viewer", "needed"),
    [
        (Viewer("store", ""), {"s"}),
        (Viewer("prefill", "x"), {"s"}),
        (Viewer("decode", "x"), {"s", "p"}),
        (Viewer("decode", ""), {"s", "q"}),
    ],
)
def test_a_node_is_told_of_whom_it_asks(viewer: Viewer, needed: set[str]) -> None:
    told = MemberList(viewer, ALL, ()).whole(Epoch(3), 2.0)
    assert {str(node.node) for node in told.nodes} == needed
    assert (told.epoch, told.settles_s) == (3, 2.0)


def test_what_does_not_concern_it_is_no_change() -> None:
    told = MemberList(Viewer("store", ""), ALL, ())
    assert not told.publish({DECODE.node: None, PREFILL.node: info("p", "prefill", 2, "x")}, [DECODE.node])
    assert not told.publish({STORE.node: STORE}, ())
    assert told.version == 1
    assert told.publish({}, [STORE.node, DECODE.node])
    (change,) = told.since(1) or []
    assert (change.joined, change.left, change.draining) == ((), (), (STORE.node,))


def test_who_comes_and_goes_between_two_tellings_was_never_there() -> None:
    told = MemberList(Viewer("store", ""), (), ())
    assert not told.publish({STORE.node: None}, ())


def test_who_missed_too_much_gets_the_whole_list() -> None:
    told = MemberList(Viewer("store", ""), (), ())
    for number in range(CHANGES_MAX + 1):
        assert told.publish({STORE.node: info("s", generation=number + 1)}, ())
    assert told.since(told.version) == []
    assert len(told.since(2) or []) == CHANGES_MAX
    assert told.since(1) is None
    assert told.since(told.version + 1) is None


lives = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.one_of(st.none(), st.integers(1, 3)), min_size=1, max_size=3
)


@given(st.lists(st.tuples(lives, st.sets(st.sampled_from(["a", "b", "c"]))), max_size=12), st.integers(0, 11))
def test_a_list_and_its_changes_make_the_list_that_there_is(
    plan: list[tuple[Mapping[str, int | None], set[str]]], joins_at: int
) -> None:
    told = MemberList(Viewer("store", ""), (), ())
    views = Views(10.0)
    views.add("r")
    there: dict[str, NodeInfo] = {}
    draining: set[str] = set()
    version: int | None = None
    for turn, (changes, now_draining) in enumerate(plan):
        touched = {NodeId(name): info(name, generation=g) if g is not None else None for name, g in changes.items()}
        told.publish(touched, {NodeId(name) for name in now_draining})
        there.update({str(node): life for node, life in touched.items() if life is not None})
        there = {name: life for name, life in there.items() if touched.get(NodeId(name), life) is not None}
        draining = now_draining & there.keys()
        if version is None and turn >= joins_at:
            views.listed("r", told.whole(Epoch(1), 0.0), 0.0)
            version = told.version
        elif version is not None:
            for change in told.since(version) or []:
                assert views.changed("r", change, 0.0)
            version = told.version
        if version is not None:
            expected = tuple(there[name] for name in sorted(there))
            assert views.merged(0.0) == (expected, tuple(sorted(draining)))

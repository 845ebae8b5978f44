"""What a node makes of the lists of several routers; no clock: the time is told."""

from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from tracehaul.rpc.views import Views
from tracehaul.wire.cluster import Members, MembersChanged, NodeInfo
from tracehaul.wire.ids import Epoch, Generation, NodeId

GRACE_S = 10.0


def life(name: str, epoch: int = 1, generation: int = 1) -> NodeInfo:
    return NodeInfo(NodeId(name), Generation(generation), "store", f"{name}:1", epoch=Epoch(epoch))


A, B, B2 = life("a"), life("b"), life("b", 2, 7)


def whole(*nodes: NodeInfo, version: int = 1, draining: tuple[str, ...] = (), settles_s: float = 0.0) -> Members:
    return Members(version, nodes, tuple(NodeId(name) for name in draining), settles_s=settles_s)


def made(routers: list[str]) -> Views:
    views = Views(GRACE_S)
    for router in routers:
        views.add(router)
    return views


def nodes(views: Views, now_s: float) -> tuple[NodeInfo, ...]:
    return views.merged(now_s)[0]


def test_the_union_of_what_routers_say_by_name() -> None:
    views = made(["r", "s"])
    assert nodes(views, 0.0) == ()
    views.listed("r", whole(B), 0.0)
    views.listed("s", whole(A), 0.0)
    assert nodes(views, 0.0) == (A, B)
    assert views.changed("s", MembersChanged(2, joined=(B,)), 1.0)
    assert views.changed("r", MembersChanged(2, left=(B.node,)), 1.0)
    assert nodes(views, 1.0) == (A, B), "one of them still hears it"
    assert views.changed("s", MembersChanged(3, left=(B.node,)), 1.0)
    assert nodes(views, 1.0) == (A,)


def test_of_two_lives_of_a_name_the_higher_rank_counts() -> None:
    views = made(["r", "s"])
    views.listed("r", whole(B2), 0.0)
    views.listed("s", whole(B), 0.0)
    assert nodes(views, 0.0) == (B2,)
    views.lost("r", 1.0)
    assert nodes(views, 1.0) == (B2,), "the older one is about to be fenced"


def test_a_gap_changes_nothing_and_is_told() -> None:
    views = made(["r"])
    assert not views.changed("r", MembersChanged(1, joined=(A,)), 0.0)
    views.listed("r", whole(A, version=4), 0.0)
    for version in (4, 6):
        assert not views.changed("r", MembersChanged(version, joined=(B,)), 0.0)
    assert nodes(views, 0.0) == (A,)
    assert views.changed("r", MembersChanged(5, joined=(B,)), 0.0)
    assert nodes(views, 0.0) == (A, B)


def test_what_the_only_router_said_outlives_it_for_ever_and_until_its_list_is_whole_again() -> None:
    views = made(["r"])
    views.listed("r", whole(A, B, draining=("b",)), 0.0)
    views.lost("r", 1.0)
    assert views.deadline_s(1.0) is None
    assert views.merged(1e6) == ((A, B), (B.node,))
    views.listed("r", whole(A, settles_s=6.0), 1e6)
    assert nodes(views, 1e6 + 5.9) == (A, B), "B may not have come back yet"
    assert views.deadline_s(1e6) == 1e6 + 6.0
    assert nodes(views, 1e6 + 6.0) == (A,)
    assert views.deadline_s(1e6 + 6.0) is None


def test_a_router_that_knows_everybody_removes_who_is_absent_at_once() -> None:
    views = made(["r"])
    views.listed("r", whole(A, B), 0.0)
    views.lost("r", 1.0)
    views.listed("r", whole(A), 2.0)
    assert nodes(views, 2.0) == (A,)


def test_who_leaves_a_router_that_stood_still_stays_for_a_while() -> None:
    views = made(["r"])
    views.listed("r", whole(A, B), 0.0)
    views.changed("r", MembersChanged(2, left=(A.node, B.node), settles_s=10.0), 1.0)
    assert nodes(views, 1.0) == (A, B)
    views.changed("r", MembersChanged(3, joined=(B,)), 2.0)
    assert nodes(views, 10.9) == (A, B)
    assert nodes(views, 11.0) == (B,)


def test_what_a_lost_router_said_ends_after_a_grace_where_another_knows() -> None:
    views = made(["r", "s"])
    views.listed("r", whole(A, B), 0.0)
    views.listed("s", whole(A, settles_s=4.0), 0.0)
    views.lost("r", 1.0)
    assert views.deadline_s(1.0) == 4.0
    assert nodes(views, 13.9) == (A, B)
    assert views.deadline_s(5.0) == 14.0
    assert nodes(views, 14.0) == (A,)


def test_a_router_that_is_heard_says_who_left_for_those_that_are_not() -> None:
    views = made(["r", "s"])
    views.listed("r", whole(A, B), 0.0)
    views.listed("s", whole(A, B), 0.0)
    views.lost("r", 1.0)
    views.changed("s", MembersChanged(2, left=(B.node,)), 2.0)
    assert nodes(views, 2.0) == (A,)


def test_an_older_life_that_left_takes_no_newer_one_along() -> None:
    views = made(["r", "s"])
    views.listed("r", whole(B2), 0.0)
    views.listed("s", whole(B), 0.0)
    views.lost("r", 1.0)
    views.changed("s", MembersChanged(2, left=(B.node,)), 2.0)
    assert nodes(views, 2.0) == (B2,)


Step = tuple[Literal["list", "change", "lose", "wait"], int, frozenset[str], float]
NAMES = ("a", "b", "c")
steps = st.lists(
    st.tuples(
        st.sampled_from(["list", "change", "lose", "wait"]),
        st.integers(0, 1),
        st.frozensets(st.sampled_from(NAMES)),
        st.sampled_from([0.0, 3.0, 12.0]),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_nobody_whom_a_heard_router_lists_is_missing_and_nobody_else_stays_for_ever(plan: list[Step]) -> None:
    views = made(["0", "1"])
    heard: dict[str, set[str]] = {}
    versions: dict[str, int] = {}
    ever: set[str] = set()
    now_s = 0.0
    for kind, number, names, seconds in plan:
        router = str(number)
        if kind == "list":
            versions[router] = 1
            heard[router] = set(names)
            views.listed(router, whole(*(life(name) for name in names), settles_s=seconds), now_s)
        elif kind == "change" and router in heard:
            versions[router] += 1
            joined = [life(name) for name in sorted(names - heard[router])]
            left = [NodeId(name) for name in sorted(heard[router] - names)]
            heard[router] = set(names)
            assert views.changed(router, MembersChanged(versions[router], tuple(joined), tuple(left)), now_s)
        elif kind == "lose":
            heard.pop(router, None)
            views.lost(router, now_s)
        elif kind == "wait":
            now_s += seconds
        ever |= {name for listed in heard.values() for name in listed}
        there = {str(info.node) for info in nodes(views, now_s)}
        assert set[str]().union(*heard.values()) <= there <= ever
        # Whatever happens, time alone ends at what is heard, or at what was heard last where nobody is.
        if heard and plan[-1] == (kind, number, names, seconds):
            while (deadline_s := views.deadline_s(now_s)) is not None:
                assert deadline_s > now_s
                now_s = deadline_s
                nodes(views, now_s)
            assert {str(info.node) for info in nodes(views, now_s)} == set[str]().union(*heard.values())


def test_a_router_that_is_none_any_more_is_forgotten_once_others_know_whom_it_named() -> None:
    views = made(["r", "s"])
    views.listed("r", whole(A), 0.0)
    views.lost("r", 1.0)
    views.end("r", 1.0)
    assert nodes(views, 100.0) == (A,), "nobody else knows"
    views.listed("s", whole(B), 100.0)
    assert nodes(views, 100.0 + GRACE_S - 1.0) == (A, B)
    assert nodes(views, 100.0 + GRACE_S) == (B,)
    views.add("r")
    assert nodes(views, 200.0) == (B,), "it begins anew"


def test_a_router_that_comes_back_meanwhile_is_one_as_before() -> None:
    views = made(["r", "s"])
    views.listed("r", whole(A), 0.0)
    views.lost("r", 1.0)
    views.end("r", 1.0)
    views.add("r")
    views.listed("r", whole(A, B), 2.0)
    views.listed("s", whole(), 2.0)
    assert nodes(views, 2.0 + 2 * GRACE_S) == (A, B)

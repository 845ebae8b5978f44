import asyncio
import logging

import msgspec
import pytest

from router.fleet.index import Index, Match, TierRun
from router.fleet.members import MemberRegistry
from router.policy.placement import choose_home
from tracehaul.rpc.base import NO_CONTEXT
from tracehaul.wire.blocks import Events, Moved, Removed, Snapshot, Stored
from tracehaul.wire.cluster import Heartbeat, Join, NodeInfo, NodeLoad
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId
from tracehaul.wire.version import WIRE

A, B = NodeId("store-0"), NodeId("store-1")
G = Generation(7)
T = TraceId("t")


def block(n: int) -> BlockHash:
    return BlockHash(n.to_bytes(16, "big"))


def test_index_follows_a_snapshot_in_parts_and_the_events_after_it() -> None:
    index = Index()
    index.snapshot(A, Snapshot(G, 5, (block(1),), last=False))
    assert not index.events(A, Events(G, 6, (Stored(block(9)),))), "events before the snapshot's end do not count"
    index.snapshot(A, Snapshot(G, 5, (block(2),), last=True))
    assert index.events(A, Events(G, 5, (Removed(block(1)), Stored(block(3)), Removed(block(2)))))
    assert index.held(A) == {block(1): 0, block(3): 0}, "event 5 was part of the snapshot already"


def test_index_refuses_a_hole_and_another_generation() -> None:
    index = Index()
    index.snapshot(A, Snapshot(G, 5, (block(1),), last=True))
    assert not index.events(A, Events(G, 7, (Stored(block(2)),)))
    assert not index.events(A, Events(Generation(8), 6, (Stored(block(2)),)))
    index.snapshot(A, Snapshot(Generation(8), 0, (block(4),), last=True))
    assert index.held(A) == {block(4): 0}


def test_index_matches_the_leading_run_over_all_nodes() -> None:
    index = Index()
    index.snapshot(A, Snapshot(G, 0, (block(1), block(3)), last=True))
    index.snapshot(B, Snapshot(G, 0, (block(2), block(5)), last=True))
    assert index.match([block(n) for n in (1, 2, 3, 4, 5)]) == Match(3, {A: 1}, (TierRun(3, 0),))
    index.forget(B)
    assert index.match([block(n) for n in (1, 2, 3)]) == Match(1, {A: 1}, (TierRun(1, 0),))
    assert index.match([]) == Match(0, {})


def test_homes_are_kept_spread_and_replaced() -> None:
    stores = [NodeId(f"store-{i}") for i in range(3)]
    assert choose_home(stores, T, NodeId("store-2")) == "store-2"
    assert choose_home([], T, None) is None
    homes = {TraceId(f"t{i}"): choose_home(stores, TraceId(f"t{i}"), None) for i in range(90)}
    assert all(20 <= sum(home == store for home in homes.values()) <= 40 for store in stores)
    moved = {t: choose_home(stores[:2], t, None) for t in homes}
    assert all(moved[t] == home for t, home in homes.items() if home != "store-2"), "only the lost node's traces move"


def test_a_member_that_falls_silent_is_told_once_and_when_it_is_heard_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("router.fleet.members.clock.now_s", lambda: now_s[0])
    info = NodeInfo(NodeId("store-0"), G, "store", "x:1")

    async def main() -> None:
        members = MemberRegistry(lambda nodes: None)
        joined = members.stream(Join(info, wire=WIRE), NO_CONTEXT)
        await anext(joined)
        assert [node.node for node in members.live("store")] == ["store-0"]
        now_s[0] += 10
        assert members.live("store") == members.live("store") == []
        await members.call(Heartbeat(info.node, G, NodeLoad()), NO_CONTEXT)
        assert len(members.live("store")) == 1
        await joined.aclose()

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert [record.getMessage() for record in caplog.records if record.name == "router.fleet.members"] == [
        "a node joined",
        "a node is silent: no new work for it",
        "a node is heard again",
        "a node left",
    ]


@pytest.mark.parametrize("tier", [-1, 8, 10**9])
def test_a_tier_that_no_node_has_is_refused_where_it_arrives(tier: int) -> None:
    for change in (Stored(block(1), tier), Moved(block(1), tier)):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(Events(G, 1, (change,))), type=Events)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(Snapshot(G, 1, (), last=True, tier=tier)), type=Snapshot)

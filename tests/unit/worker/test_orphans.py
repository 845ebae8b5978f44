"""What is remembered of steps whose router is lost: for how long, how much, and for whom."""

import pytest

from tracehaul.wire.steps import StepUsage
from worker.orphans import ANSWERS_MAX, BYTES_MAX, LATELY_S, LEASE_S, Orphans, Said

USAGE = StepUsage(prompt_tokens=3)


def said(packed: bytes, *, over: bool = False) -> Said:
    return Said(packed, USAGE, "stop" if over else None)


@pytest.fixture
def orphans() -> Orphans:
    orphans = Orphans()
    orphans.ended(b"a", "old", said(b"1111"), 0.0)
    orphans.ended(b"b", "old", said(b"2222", over=True), 1.0)
    orphans.ended(b"c", "other", said(b"3333", over=True), 1.0)
    return orphans


def test_a_lost_router_leaves_its_own_for_a_lease(orphans: Orphans) -> None:
    assert orphans.names(2.0) == ()
    assert orphans.lost("old", 2.0)
    assert not orphans.lost("nobody", 2.0)
    assert orphans.names(2.0) == (b"a", b"b")
    assert orphans.find(b"a", "new", b"", 2.0 + LEASE_S) == said(b"1111")
    assert orphans.names(2.1 + LEASE_S) == ()
    assert orphans.find(b"a", "new", b"", 2.1 + LEASE_S) is None


def test_what_ended_long_before_its_router_is_lost_is_known_to_who_comes_after(orphans: Orphans) -> None:
    assert orphans.lost("old", 0.5 + LATELY_S)
    assert orphans.names(0.5 + LATELY_S) == (b"b",)


def test_what_was_cut_is_any_other_routers_at_once_and_what_was_over_once_its_own_is_lost(orphans: Orphans) -> None:
    assert orphans.find(b"a", "old", b"", 1.0) is None
    assert orphans.find(b"a", "new", b"", 1.0) == said(b"1111")
    assert orphans.find(b"b", "new", b"", 1.0) is None


def test_only_what_follows_what_is_there_is_of_use(orphans: Orphans) -> None:
    orphans.lost("old", 1.0)
    assert orphans.find(b"a", "new", b"11", 1.0) is not None
    assert orphans.find(b"a", "new", b"1111", 1.0) is None
    assert orphans.find(b"a", "new", b"12", 1.0) is None
    assert orphans.find(b"a", "new", b"11111", 1.0) is None
    done = orphans.find(b"b", "new", b"2222", 1.0)
    assert done is not None
    assert done.done is not None, "that it is over was not heard"


def test_who_took_it_over_has_it_until_it_is_lost_as_well(orphans: Orphans) -> None:
    orphans.lost("old", 2.0)
    orphans.ended(b"a", "new", said(b"11112222"), 3.0)
    assert orphans.names(3.0) == (b"b",)
    orphans.lost("new", 4.0)
    assert orphans.find(b"a", "newer", b"1111", 4.0) == said(b"11112222")


def test_no_more_is_kept_than_there_is_room_for() -> None:
    orphans = Orphans()
    for at in range(ANSWERS_MAX + 10):
        orphans.ended(at.to_bytes(4), "old", said(b"1"), 0.0)
    orphans.lost("old", 0.0)
    names = orphans.names(0.0)
    assert (len(names), names[0]) == (ANSWERS_MAX, (10).to_bytes(4))
    orphans = Orphans()
    for at in range(3):
        orphans.ended(bytes([at]), "old", said(bytes(BYTES_MAX // 2)), 0.0)
    orphans.lost("old", 0.0)
    assert orphans.names(0.0) == (b"\1", b"\2")

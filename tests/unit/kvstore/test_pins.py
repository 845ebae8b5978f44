"""What pins and quotas promise, case by case."""

import pytest

from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from kvstore.index.pins import HARD, Pins
from kvstore.index.tenants import Tenants, tenant_key
from tracehaul.wire.blocks import BlockSpec, Full, Pin, PinInfo, PinKind, Pinned, Publication, Removed, Slot
from tracehaul.wire.ids import BlockHash, Checksum, TraceId

SLOT = 4096
ROOT = BlockHash(b"root" * 4)


def config(slots: int, **changes: object) -> StoreConfig:
    settings: dict[str, object] = {"hard_share_max": 1.0, "hard_tenant_share_max": 1.0, "pin_half_life_s": 10.0}
    return StoreConfig(arena_bytes=slots * SLOT, slot_bytes=SLOT, **(settings | changes))  # type: ignore[arg-type]


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b"."))


def reserve(arena: Arena, name: str, parent: str | None = None, tenant: str = "", now_s: float = 0.0) -> object:
    spec = BlockSpec(h(name), ROOT if parent is None else h(parent), 100)
    (outcome,) = arena.reserve([spec], "w", now_s, tenant)
    arena.check()
    return outcome


def put(arena: Arena, name: str, parent: str | None = None, tenant: str = "", now_s: float = 0.0) -> bool:
    """False if there was no room."""
    slot = reserve(arena, name, parent, tenant, now_s)
    if not isinstance(slot, Slot):
        assert isinstance(slot, Full)
        return False
    assert arena.publish([Publication(h(name), slot.generation, Checksum(7))], "w", now_s) == ["published"]
    arena.check()
    return True


def pin(
    arena: Arena,
    trace: str,
    *names: str,
    kind: PinKind = "soft",
    priority: float = 1024.0,
    ttl_s: float = 1000.0,
    now_s: float = 0.0,
    tenant: str = "",
) -> Pinned | str:
    pinned = arena.pin(Pin(TraceId(trace), tuple(map(h, names)), ttl_s, kind, priority, tenant), now_s)
    arena.check()
    return pinned


def held(arena: Arena, names: str) -> str:
    return "".join(name for name in names if arena.exists([h(name)])[0])


def test_a_hard_pin_is_never_evicted_and_ends() -> None:
    arena = Arena(config(2))
    put(arena, "a")
    put(arena, "b")
    assert pin(arena, "t", "a", "b", kind="hard", ttl_s=5.0) == Pinned(2, 2, 5.0)
    assert arena.next_deadline_s() == 5.0
    assert not put(arena, "c", now_s=4.9)
    assert put(arena, "c", now_s=5.0)
    assert arena.pins == 0


def test_a_pins_end_is_capped() -> None:
    arena = Arena(config(2, pin_ttl_max_s=7.0))
    assert pin(arena, "t", "a", kind="hard", ttl_s=float("inf")) == Pinned(1, 0, 7.0)
    assert pin(arena, "u", "a", priority=2.0, ttl_s=1e9) == Pinned(1, 0, 7.0)


def test_unpinned_blocks_go_before_softly_pinned_ones() -> None:
    arena = Arena(config(2))
    put(arena, "a")
    put(arena, "b")
    pin(arena, "t", "a")
    assert put(arena, "c")
    assert held(arena, "abc") == "ac"
    assert put(arena, "d")
    assert held(arena, "acd") == "ad"
    pin(arena, "u", "d")
    assert put(arena, "e"), "nothing unpinned is left: a soft pin gives way"
    assert held(arena, "ade") == "de", "the older pin has decayed further"


def test_of_two_soft_pins_the_one_that_has_decayed_further_goes_first() -> None:
    arena = Arena(config(2))
    put(arena, "a")
    put(arena, "b")
    pin(arena, "high", "a", priority=64.0, now_s=0.0)
    pin(arena, "low", "b", priority=16.0, now_s=30.0)
    assert put(arena, "c", now_s=30.0)
    assert held(arena, "abc") == "bc", "64 has decayed to 8 in three half-lives"


def test_a_soft_pin_ends_when_its_priority_is_that_of_an_unpinned_block() -> None:
    arena = Arena(config(2))
    put(arena, "a")
    put(arena, "b")
    assert pin(arena, "t", "a", priority=4.0) == Pinned(1, 1, 20.0)
    assert pin(arena, "none", "a", priority=1.0) == Pinned(1, 1, 0.0)
    assert arena.pins == 1
    assert put(arena, "c", now_s=20.0)
    assert held(arena, "abc") == "bc", "the least recently used, as if there had been no pin"


def test_a_pin_covers_the_resident_prefix_and_what_comes_later() -> None:
    arena = Arena(config(4))
    put(arena, "a")
    put(arena, "b", "a")
    assert pin(arena, "t", "c", "b", kind="hard") == Pinned(3, 2, 1000.0)
    put(arena, "c", "b")
    put(arena, "x")
    for name in "yz":
        put(arena, name)
    assert held(arena, "abcxyz") == "abcz"


def test_a_pin_grows_with_the_prefix_of_what_it_covers() -> None:
    """In whatever order its blocks come."""
    for order in (["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"], ["c", "a", "b"]):
        arena = Arena(config(8, hard_share_max=0.5, hard_tenant_share_max=0.5))
        assert isinstance(pin(arena, "t", "c", kind="hard"), Pinned)
        parents = {"a": None, "b": "a", "c": "b"}
        for name in order:
            assert put(arena, name, parents[name])
            arena.check()
        (listed,) = arena.list_pins(None, 0.0)
        assert (listed.kind, listed.blocks, listed.held) == ("hard", 3, 3), order
        refused = pin(arena, "u", "x", "y", kind="hard")
        assert isinstance(refused, str), "what is kept for a trace counts, even if it came later"


def test_a_hard_pin_that_outgrows_its_limits_is_softened() -> None:
    arena = Arena(config(4, hard_share_max=0.5, hard_tenant_share_max=0.5))
    assert isinstance(pin(arena, "t", "c", kind="hard"), Pinned)
    for name, parent in (("c", "b"), ("b", "a"), ("a", None)):
        assert put(arena, name, parent)
        arena.check()
    (listed,) = arena.list_pins(None, 0.0)
    assert (listed.kind, listed.blocks) == ("soft", 3)
    assert put(arena, "x")
    assert put(arena, "y"), "a softly pinned block makes room where nothing else can"
    assert put(arena, "z")
    assert held(arena, "abc") == "abc", "but last"
    arena.check()


def test_pinning_again_adds_and_renews() -> None:
    arena = Arena(config(4))
    for name in "ab":
        put(arena, name)
    pin(arena, "t", "a", kind="hard", ttl_s=5.0)
    assert pin(arena, "t", "b", kind="soft", now_s=4.0) == Pinned(2, 2, 100.0)
    put(arena, "x", now_s=50.0)
    assert held(arena, "abx") == "abx"
    assert arena.list_pins(None, 50.0) == [PinInfo(TraceId("t"), "", "soft", 2, 2, 200, 54.0)]


def test_what_was_hard_and_is_soft_now_can_go() -> None:
    arena = Arena(config(1))
    put(arena, "a")
    pin(arena, "t", "a", kind="hard")
    assert not put(arena, "b")
    pin(arena, "t", kind="soft")
    assert put(arena, "b")


def test_a_block_is_kept_for_the_strongest_of_its_pins() -> None:
    arena = Arena(config(1))
    put(arena, "a")
    pin(arena, "soft", "a", tenant="one")
    pin(arena, "hard", "a", kind="hard")
    assert not put(arena, "b")
    arena.unpin("", TraceId("hard"))
    arena.unpin("", TraceId("nobody"))
    assert put(arena, "b")


def test_traces_of_other_tenants_are_others() -> None:
    arena = Arena(config(2))
    put(arena, "a")
    pin(arena, "t", "a", kind="hard", tenant="one")
    arena.unpin("two", TraceId("t"))
    assert [info.tenant for info in arena.list_pins(None, 0.0)] == ["one"]
    assert arena.list_pins("two", 0.0) == []


def test_pins_have_limits_and_a_refusal_changes_nothing() -> None:
    arena = Arena(config(10, hard_share_max=0.5, hard_tenant_share_max=0.3, pins_max=3, pins_tenant_max=2))
    assert isinstance(pin(arena, "t", *"abc", kind="hard", tenant="one"), Pinned)
    before = arena.list_pins(None, 0.0)
    assert "hard" in str(pin(arena, "t", "d", kind="hard", tenant="one"))
    assert "hard" in str(pin(arena, "t", *"def", kind="hard", tenant="two"))
    assert "too many" in str(pin(arena, "t", *"0123456789x", tenant="two"))
    assert arena.list_pins(None, 0.0) == before
    assert isinstance(pin(arena, "t", "d", tenant="one"), Pinned), "as a soft pin it may grow"
    assert isinstance(pin(arena, "u", *"ab", kind="hard", tenant="one"), Pinned)
    assert "of this tenant" in str(pin(arena, "v", tenant="one"))
    assert isinstance(pin(arena, "v", tenant="two"), Pinned)
    assert "open" in str(pin(arena, "v", tenant="three"))


def test_hard_pins_stay_within_their_tenants_quota() -> None:
    """Else others could not have what they were promised."""
    arena = Arena(config(6, quota_bytes={"a": 2 * SLOT, "b": 2 * SLOT}))
    assert isinstance(pin(arena, "t", *"12", kind="hard", tenant="a"), Pinned)
    assert "quota" in str(pin(arena, "t", "3", kind="hard", tenant="a"))
    assert isinstance(pin(arena, "t", "4", kind="hard", tenant="x"), Pinned)
    assert "quota" in str(pin(arena, "t", *"56", kind="hard", tenant="y"))
    assert isinstance(pin(arena, "t", "5", kind="hard", tenant="y"), Pinned)


def test_renewing_for_ever_leaves_no_trace() -> None:
    pins = Pins(config(4))
    for now_s in range(2000):
        assert pins.pin(("", TraceId("t")), [h("a")], "hard", 1.0, 30.0, float(now_s)) is None
    assert pins.rank(h("a")) == HARD
    assert len(pins._heap) < 100  # it is the heap that could grow
    assert pins.deadline_s() == 2029.0
    pins.end(("", TraceId("t")))
    assert (pins.deadline_s(), pins.rank(h("a"))) == (None, None)
    pins.check()


def test_a_tenant_above_its_quota_gives_way_first() -> None:
    arena = Arena(config(4, quota_bytes={"a": 2 * SLOT, "b": 2 * SLOT}))
    put(arena, "1", tenant="b")
    for name in "234":
        assert put(arena, name, tenant="a"), "what nobody claims may be used"
    assert arena.bytes_used("a") == 3 * SLOT
    assert put(arena, "5", tenant="b")
    assert held(arena, "12345") == "1345", "the oldest of a, which is over, not the oldest of all"
    assert put(arena, "6", tenant="b")
    assert held(arena, "13456") == "3456", "now b is at its quota, and pays itself"


def test_a_tenant_cannot_evict_another_within_its_quota() -> None:
    arena = Arena(config(3, quota_bytes={"a": 2 * SLOT}))
    put(arena, "1", tenant="a")
    put(arena, "2", tenant="a")
    for name in "xyz":
        assert put(arena, name, tenant="whoever")
    assert held(arena, "12xyz") == "12z"
    pin(arena, "t", "z", kind="hard")
    assert not put(arena, "w", tenant="somebody else")
    assert held(arena, "12z") == "12z"


def test_a_tenant_without_a_quota_shares_the_rest() -> None:
    arena = Arena(config(3, quota_bytes={"a": SLOT}))
    for name, tenant in zip("123", ("b", "c", ""), strict=True):
        put(arena, name, tenant=tenant)
    assert arena.bytes_used("b") == arena.bytes_used("") == 3 * SLOT
    assert put(arena, "4", tenant="a")
    assert held(arena, "1234") == "234"
    assert put(arena, "5", tenant="a")
    assert held(arena, "2345") == "235"


def test_a_tenant_within_its_quota_may_evict_even_softly_pinned_blocks_of_one_above() -> None:
    arena = Arena(config(2, quota_bytes={"a": SLOT}))
    put(arena, "1", tenant="b")
    put(arena, "2", tenant="b")
    pin(arena, "t", "1", "2", tenant="b")
    assert put(arena, "3", tenant="a")
    assert held(arena, "123") == "23"


def test_furthest_above_first() -> None:
    tenants = Tenants({"a": SLOT, "b": SLOT}, SLOT, 10)
    shared, a, b = (tenants.group(tenant_key(name)) for name in ("", "a", "b"))
    for group in (a, a, b, b, b):
        tenants.take(group)
    assert list(tenants.yielding(shared)) == [b, a, shared]
    assert list(tenants.yielding(a)) == [a, b], "with the slot that it asks for, a is as far above: the asker first"
    for _ in range(3):
        tenants.give(b)
    assert list(tenants.yielding(b)) == [a, b]


@pytest.mark.parametrize("last", ["a", "b", "c"])
def test_a_forged_cycle_of_parents_gets_no_slot(last: str) -> None:
    """Each block of it would keep the next one for ever."""
    names = "abcabc"["abc".index(last) + 1 :][:3]
    arena = Arena(config(4))
    parent = {"a": "c", "b": "a", "c": "b"}
    for name in names[:2]:
        assert put(arena, name, parent[name])
    assert names[2] == last
    assert isinstance(reserve(arena, last, parent[last]), Full)
    for name in "wxyz":
        assert put(arena, name)
    assert held(arena, "abcwxyz") == "wxyz"


def test_a_reserved_block_counts_in_a_cycle() -> None:
    arena = Arena(config(4))
    assert isinstance(reserve(arena, "a", "b"), Slot)
    assert isinstance(reserve(arena, "b", "a"), Full)
    assert isinstance(reserve(arena, "c", "c"), Full)


def test_the_ends_of_reservations_are_told() -> None:
    arena = Arena(config(4))
    put(arena, "a")
    assert arena.take_ended() == [h("a")]
    slot = reserve(arena, "b")
    assert isinstance(slot, Slot)
    assert arena.quiet_at_s(h("b")) is not None
    arena.abandon([(h("b"), slot.generation)], "w")
    reserve(arena, "c")
    arena.disconnected("w", 0.0)
    assert arena.take_ended() == [h("b"), h("c")]
    assert arena.quiet_at_s(h("c")) is None
    assert [type(change) for change in arena.take_changes()] != [Removed]


@pytest.mark.parametrize(
    "changes",
    [
        {"quota_bytes": {"a": 2 * SLOT, "b": 3 * SLOT}},
        {"quota_bytes": {"a": -1}},
        {"hard_share_max": 1.5},
        {"pin_half_life_s": 0.0},
        {"pins_max": 0},
    ],
)
def test_contradictory_limits_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        config(4, **changes)

"""Limits that change while a node serves, and blocks that their tenant discards."""

import random
from typing import Any

import msgspec
import pytest

from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from kvstore.index.tenants import tenant_key
from kvstore.node.limits import FIXED, LIVE, LIVE_TIERING, changed
from kvstore.tiers.base import TierBlock
from kvstore.tiers.slots import SlotIndex
from kvstore.tiers.tiering import TieringConfig
from tracehaul.wire.blocks import BlockSpec, Full, Pin, Pinned, Publication, Removed, Slot
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId, TraceId
from tracehaul.wire.operations import TenantUsage

SLOT = 4096
ROOT = BlockHash(b"root" * 4)


def config(slots: int = 4, **changes: Any) -> StoreConfig:
    return StoreConfig(arena_bytes=slots * SLOT, slot_bytes=SLOT, **changes)


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b"."))


def put(arena: Arena, name: str, tenant: str = "", *, owner: str = "w") -> bool:
    (slot,) = arena.reserve([BlockSpec(h(name), ROOT, 100)], owner, 0.0, tenant)
    arena.check()
    if not isinstance(slot, Slot):
        assert isinstance(slot, Full)
        return False
    assert arena.publish([Publication(h(name), slot.generation, Checksum(7))], owner, 0.0) == ["published"]
    arena.check()
    return True


def held(arena: Arena, names: str) -> str:
    return "".join(name for name in names if arena.exists([h(name)])[0])


def pinned(arena: Arena, trace: str, *names: str, tenant: str = "") -> bool:
    pin = Pin(TraceId(trace), tuple(map(h, names)), 1000.0, "hard", tenant=tenant)
    return isinstance(arena.pin(pin, 0.0), Pinned)


# --- the configs --------------------------------------------------------------------------------------------


def test_every_limit_is_either_live_or_fixed_with_a_reason():
    """A new field of a config must be decided on: what modules read once cannot be live."""
    fields = {field.name for kind in (StoreConfig, TieringConfig) for field in msgspec.structs.fields(kind)}
    assert fields == set(LIVE) | set(LIVE_TIERING) | set(FIXED) - {"disk_bytes", "s3_bytes"}
    assert not set(LIVE) & set(LIVE_TIERING)
    assert not (set(LIVE) | set(LIVE_TIERING)) & set(FIXED)


def test_changes_are_made_whole():
    store, tiering = changed(config(), TieringConfig(), {"leases_max": 7, "scrub_bytes_s": 0})
    assert (store.leases_max, store.pins_max) == (7, config().pins_max)
    assert tiering == TieringConfig(scrub_bytes_s=0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"leases_max": 0}, "leases_max must be at least 1"),
        ({"leases_max": 1.5}, "Expected `int`"),
        ({"leases_max": "7"}, "Expected `int`"),
        ({"lease_ttl_max_s": -1.0}, "must be positive"),
        ({"hard_share_max": 1.5}, "from 0 to 1"),
        ({"quota_bytes": {"a": 5 * SLOT}}, "must not promise more"),
        ({"scrub_bytes_s": -1}, "scrub_bytes_s not negative"),
        ({"leases_max": 7, "leeses_max": 7}, "no limit is called leeses_max"),
        ({"arena_bytes": 8 * SLOT}, "registered with the transports"),
        ({"disk_bytes": 8 * SLOT}, "laid out at the start"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(changes: dict[str, Any], why: str):
    with pytest.raises(InvalidRequest, match=why):
        changed(config(), TieringConfig(), changes)


def test_a_node_without_a_tier_has_no_limits_of_one():
    with pytest.raises(InvalidRequest, match="no tier below"):
        changed(config(), None, {"scrub_bytes_s": 1})


# --- the arena ----------------------------------------------------------------------------------------------


def test_a_lower_limit_holds_from_the_next_request_on():
    arena = Arena(config())
    assert put(arena, "a")
    assert arena.lease([h("a")], "r", 10.0, 0.0) is not None
    assert arena.lease([h("a")], "r", 10.0, 0.0) is not None
    assert arena.reconfigure(config(leases_max=1, lease_ttl_max_s=2.0), 0.0) is None
    assert arena.lease([h("a")], "r", 10.0, 0.0) is None
    leased = arena.lease([h("a")], "s", 10.0, 0.0)
    assert leased is not None
    assert leased.ttl_s == 2.0
    arena.check()


def test_a_shorter_reservation_ends_the_open_ones_that_are_older():
    arena = Arena(config())
    arena.reserve([BlockSpec(h("a"), ROOT, 1)], "w", 0.0)
    arena.reserve([BlockSpec(h("b"), ROOT, 1)], "w", 4.0)
    assert arena.reconfigure(config(reservation_ttl_s=3.0), 5.0) is None
    assert (arena.quiet_at_s(h("a")) is not None, arena.quiet_at_s(h("b")) is not None) == (False, True)
    assert arena.next_deadline_s() == 7.0
    arena.check()


@pytest.mark.parametrize(
    "changes",
    [{"pins_max": 1}, {"pins_tenant_max": 1}, {"hard_share_max": 0.25}, {"hard_tenant_share_max": 0.25}]
    + [{"quota_bytes": {"t": SLOT}}],
)
def test_limits_below_what_pins_hold_are_refused_and_nothing_changes(changes: dict[str, Any]):
    before = config(hard_share_max=1.0, hard_tenant_share_max=1.0)
    arena = Arena(before)
    for name in "ab":
        assert put(arena, name, "t")
        assert pinned(arena, name, name, tenant="t")
    refusal = arena.reconfigure(msgspec.structs.replace(before, **changes), 0.0)
    assert refusal is not None
    arena.check()
    assert put(arena, "c", "t")
    assert pinned(arena, "c", "c", tenant="t")
    arena.unpin("t", TraceId("a"))
    arena.unpin("t", TraceId("b"))
    assert arena.reconfigure(msgspec.structs.replace(before, **changes), 0.0) is None
    arena.check()


def test_a_tenant_that_gets_a_quota_takes_its_blocks_along():
    arena = Arena(config())
    for name, tenant in (("a", "t"), ("b", "other"), ("c", "t"), ("d", "other")):
        assert put(arena, name, tenant)
    assert arena.reconfigure(config(quota_bytes={"t": 2 * SLOT}), 0.0) is None
    arena.check()
    assert arena.usage() == [TenantUsage("", 2 * SLOT, 2 * SLOT), TenantUsage("t", 2 * SLOT, 2 * SLOT)]
    assert arena.quota_shares() == {"t": 0.5}
    for name in "ef":
        assert put(arena, name, "other")
    assert held(arena, "abcdef") == "acef"
    assert arena.bytes_used("t") == 2 * SLOT


def test_a_tenant_that_loses_its_quota_shares_with_the_others():
    arena = Arena(config(quota_bytes={"s": SLOT, "t": 2 * SLOT}))
    for name, tenant in (("a", "t"), ("b", "t"), ("c", "s"), ("d", "")):
        assert put(arena, name, tenant)
    assert arena.reconfigure(config(quota_bytes={"s": SLOT}), 0.0) is None
    arena.check()
    assert arena.usage() == [TenantUsage("", 3 * SLOT, 3 * SLOT), TenantUsage("s", SLOT, SLOT)]
    for name in "efg":
        assert put(arena, name)
    assert held(arena, "abcdefg") == "cefg"


def test_quotas_change_under_leases_and_pins():
    arena = Arena(config())
    for name in "abc":
        assert put(arena, name, "t")
    leased = arena.lease([h("a")], "r", 10.0, 0.0)
    assert leased is not None
    arena.pin(Pin(TraceId("p"), (h("b"),), 100.0, "soft"), 0.0)
    assert put(arena, "d")
    assert put(arena, "e")  # a search has come across the pinned one
    assert arena.reconfigure(config(quota_bytes={"t": SLOT}), 0.0) is None
    arena.check()
    arena.release(leased.lease, "r")
    arena.check()
    for name in "fgh":
        assert put(arena, name)
    arena.check()


# --- discarding ---------------------------------------------------------------------------------------------


def test_a_tenant_discards_its_own_blocks_only():
    arena = Arena(config(4))
    for name, tenant in (("a", ""), ("b", "bench"), ("c", "bench")):
        assert put(arena, name, tenant)
    arena.take_changes()
    arena.discard([h("a"), h("b"), h("b"), h("x")], tenant_key("bench"))
    arena.check()
    assert held(arena, "abcx") == "ac"
    assert arena.take_changes() == [Removed(h("b"))]
    assert arena.slots_free == 2
    assert arena.evicted == 0


def test_what_a_pin_covers_is_not_discarded():
    arena = Arena(config(4))
    assert put(arena, "a", "bench")
    assert pinned(arena, "t", "a", tenant="bench")
    arena.discard([h("a")], tenant_key("bench"))
    assert held(arena, "a") == "a"


def test_a_discarded_block_keeps_its_slot_until_its_leases_end():
    arena = Arena(config(1))
    assert put(arena, "a", "bench")
    leased = arena.lease([h("a")], "r", 10.0, 0.0)
    assert leased is not None
    arena.discard([h("a")], tenant_key("bench"))
    arena.check()
    assert held(arena, "a") == ""
    assert not put(arena, "b")
    arena.release(leased.lease, "r")
    assert put(arena, "b")


def test_a_discarded_prefix_leaves_what_continues_it():
    arena = Arena(config(4))
    for name, parent in (("a", ROOT), ("b", h("a"))):
        (slot,) = arena.reserve([BlockSpec(h(name), parent, 100)], "w", 0.0, "bench")
        assert isinstance(slot, Slot)
        arena.publish([Publication(h(name), slot.generation, Checksum(7))], "w", 0.0)
    arena.discard([h("a")], tenant_key("bench"))
    arena.check()
    assert held(arena, "ab") == "b"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_between_changes_of_quotas_the_index_agrees_with_itself(seed: int):
    rng = random.Random(seed)
    base = config(8, hard_share_max=1.0, hard_tenant_share_max=1.0)
    arena = Arena(base)
    leases: list[LeaseId] = []
    for now_s in range(200):
        name, tenant = rng.choice("abcdefghijklmnop"), rng.choice(["", "s", "t", "u"])
        match rng.randrange(7):
            case 0 | 1:
                parent = h(rng.choice("abcd")) if rng.random() < 0.3 else ROOT
                spec = BlockSpec(h(name), parent if parent != h(name) else ROOT, 100)
                (slot,) = arena.reserve([spec], "w", now_s, tenant)
                if isinstance(slot, Slot) and rng.random() < 0.9:
                    arena.publish([Publication(h(name), slot.generation, Checksum(7))], "w", now_s)
            case 2:
                leased = arena.lease([h(name)], "r", 5.0, now_s)
                leases += [leased.lease] if leased is not None else []
            case 3 if leases:
                arena.release(leases.pop(rng.randrange(len(leases))), "r")
            case 4:
                kind = rng.choice(["soft", "hard"])
                arena.pin(Pin(TraceId(name), (h(name),), 20.0, kind, tenant=tenant), now_s)
            case 5:
                arena.discard([h(name), h("a")], tenant_key(tenant))
            case _:
                quotas = {t: rng.randrange(3) * SLOT for t in rng.sample(["s", "t", "u"], rng.randrange(4))}
                arena.expire(now_s)
                before = arena.usage()
                refusal = arena.reconfigure(msgspec.structs.replace(base, quota_bytes=quotas), now_s)
                assert refusal is None or arena.usage() == before
                assert sum(u.used_bytes for u in arena.usage()) == sum(u.used_bytes for u in before)
        arena.check()


@pytest.mark.parametrize("seed", range(10))
def test_a_tier_shares_its_slots_anew_at_any_time(seed: int):
    rng = random.Random(seed)
    index = SlotIndex(8, SLOT)
    for _ in range(200):
        name = rng.choice("abcdefghijklmnop")
        match rng.randrange(4):
            case 0 | 1:
                block = TierBlock(h(name), ROOT, 100, Checksum(1), tenant_key(rng.choice(["", "s", "t"])))
                (placement,) = index.place([block])
                if placement is not None:
                    if rng.random() < 0.5:
                        index.reshare({"s": 0.25})
                        index.check()
                    index.commit(placement.slot)
                    index.take_stale([placement.slot])
            case 2:
                index.touch(h(name))
            case _:
                index.reshare({t: rng.choice([0.0, 0.25, 0.5]) for t in rng.sample(["s", "t"], rng.randrange(3))})
        index.check()
    index.reshare({"t": 0.5})
    fill = [TierBlock(h(f"{n}"), ROOT, 100, Checksum(1), tenant_key("t" if n < 4 else "s")) for n in range(20)]
    for block in fill:
        (placement,) = index.place([block])
        assert placement is not None
        index.commit(placement.slot)
    assert {h(f"{n}") for n in range(4)} <= set(index.held()), "within its share, a tenant loses nothing to others"

"""What the arena promises, case by case."""

from collections.abc import Sequence

import msgspec
import pytest

from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from tracehaul.wire.blocks import (
    BlockSpec,
    Full,
    InFlight,
    Leased,
    Present,
    Publication,
    Removed,
    Slot,
    Stored,
    TooLarge,
)
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId, SlotGeneration

SLOT = 4096
ROOT = BlockHash(b"root" * 4)


def config(slots: int = 4, **changes: float) -> StoreConfig:
    return msgspec.structs.replace(
        StoreConfig(
            arena_bytes=slots * SLOT,
            slot_bytes=SLOT,
            reservation_ttl_s=10.0,
            lease_ttl_max_s=30.0,
            late_write_s=20.0,
        ),
        **changes,
    )


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b"."))


def spec(name: str, parent: str | None = None, size: int = 100) -> BlockSpec:
    return BlockSpec(h(name), ROOT if parent is None else h(parent), size)


def reserve(arena: Arena, block: BlockSpec, owner: str = "w", now_s: float = 0.0) -> object:
    (outcome,) = arena.reserve([block], owner, now_s)
    arena.check()
    return outcome


def publish(arena: Arena, block: BlockSpec, slot: object, owner: str = "w", now_s: float = 0.0) -> str:
    assert isinstance(slot, Slot)
    (outcome,) = arena.publish([Publication(block.hash, slot.generation, Checksum(7))], owner, now_s)
    arena.check()
    return outcome


def put(arena: Arena, name: str, parent: str | None = None, now_s: float = 0.0) -> Slot:
    block = spec(name, parent)
    slot = reserve(arena, block, now_s=now_s)
    assert publish(arena, block, slot, now_s=now_s) == "published"
    assert isinstance(slot, Slot)
    return slot


def lease(arena: Arena, names: Sequence[str], ttl_s: float = 5.0, now_s: float = 0.0, holder: str = "r") -> Leased:
    leased = arena.lease([h(name) for name in names], holder, ttl_s, now_s)
    arena.check()
    assert leased is not None
    return leased


def held(arena: Arena, *names: str) -> list[int]:
    return list(arena.exists([h(name) for name in names]))


def test_a_block_is_invisible_until_published() -> None:
    arena = Arena(config())
    slot = reserve(arena, spec("a"))
    assert held(arena, "a") == [0]
    assert lease(arena, ["a"]).blocks == (None,)
    assert arena.take_changes() == []
    assert publish(arena, spec("a"), slot) == "published"
    assert held(arena, "a") == [1]
    assert arena.take_changes() == [Stored(h("a"))]


def test_slots_are_whole_and_apart() -> None:
    arena = Arena(config(4))
    outcomes = arena.reserve([spec(name, size=SLOT) for name in "abcd"], "w", 0.0)
    assert sorted(o.offset for o in outcomes if isinstance(o, Slot)) == [0, SLOT, 2 * SLOT, 3 * SLOT]


@pytest.mark.parametrize("size", [0, -1, SLOT + 1])
def test_what_does_not_fit_a_slot_is_too_large(size: int) -> None:
    assert isinstance(reserve(Arena(config()), spec("a", size=size)), TooLarge)


def test_a_second_writer_is_told_who_is_first() -> None:
    arena = Arena(config())
    reserve(arena, spec("a"), now_s=1.0)
    arena.renew([(h("a"), SlotGeneration(1))], "w", 1.5)
    arena.renew([(h("a"), SlotGeneration(1))], "w", 2.25)
    assert reserve(arena, spec("a"), "other", now_s=3.0) == InFlight(since_s=2.0, owner="w")
    arena.publish([Publication(h("a"), SlotGeneration(1), Checksum(7))], "w", 4.0)
    assert isinstance(reserve(arena, spec("a"), "other", now_s=4.0), Present)


def test_a_silent_writers_block_passes_on_and_its_publish_is_fenced() -> None:
    arena = Arena(config(reservation_ttl_s=10.0, reservation_quiet_s=1.0))
    first = reserve(arena, spec("a"))
    assert isinstance(first, Slot)
    arena.renew([(h("a"), first.generation)], "w", 2.0)
    arena.renew([(h("a"), first.generation)], "other", 9.0)
    assert arena.quiet_at_s(h("a")) == 3.0
    second = reserve(arena, spec("a"), "other", now_s=9.5)
    assert isinstance(second, Slot)
    assert second.offset != first.offset, "a late write may still land there"
    assert (arena.slots_quarantined, arena.passed_on) == (1, 1)
    arena.check()
    assert publish(arena, spec("a"), first, "w", 9.6) == "fenced"
    assert publish(arena, spec("a"), second, "other", 9.7) == "published"
    assert publish(arena, spec("a"), first, "w", 9.8) == "fenced"
    arena.check()


def test_a_silent_writer_that_nobody_contests_may_publish() -> None:
    arena = Arena(config(reservation_ttl_s=10.0, reservation_quiet_s=1.0))
    slot = reserve(arena, spec("a"))
    assert publish(arena, spec("a"), slot, "w", 9.0) == "published"


def test_what_nobody_can_take_over_stays_its_silent_writers() -> None:
    arena = Arena(config(1, reservation_quiet_s=1.0))
    slot = reserve(arena, spec("a"))
    assert isinstance(reserve(arena, spec("a"), "other", now_s=2.0), Full)
    assert publish(arena, spec("a"), slot, "w", 2.5) == "published"
    arena.check()


def test_only_the_reserving_owner_publishes() -> None:
    arena = Arena(config())
    slot = reserve(arena, spec("a"))
    assert publish(arena, spec("a"), slot, owner="other") == "fenced"
    assert held(arena, "a") == [0]


def test_publishing_again_is_harmless_and_changes_nothing() -> None:
    arena = Arena(config())
    slot = put(arena, "a")
    assert publish(arena, spec("a"), slot) == "published"
    assert arena.take_changes() == [Stored(h("a"))]
    other = Publication(h("a"), slot.generation, Checksum(8))
    assert arena.publish([other], "w", 0.0) == ["fenced"]


def test_an_expired_reservation_fences_its_publish_and_rests_its_slot() -> None:
    arena = Arena(config(1))
    slot = reserve(arena, spec("a"))
    assert arena.next_deadline_s() == 10.0
    assert publish(arena, spec("a"), slot, now_s=10.0) == "fenced"
    assert arena.slots_quarantined == 1
    assert isinstance(reserve(arena, spec("a"), now_s=29.9), Full)
    again = reserve(arena, spec("a"), now_s=30.0)
    assert isinstance(again, Slot)
    assert isinstance(slot, Slot)
    assert again.offset == slot.offset
    assert again.generation > slot.generation
    assert publish(arena, spec("a"), slot, now_s=30.0) == "fenced"
    assert publish(arena, spec("a"), again, now_s=30.0) == "published"


def test_a_vanished_writer_frees_its_name_at_once_and_its_slot_later() -> None:
    arena = Arena(config(2))
    first = reserve(arena, spec("a"))
    arena.disconnected("w", 1.0)
    arena.check()
    second = reserve(arena, spec("a"), "other", 1.0)
    assert isinstance(first, Slot)
    assert isinstance(second, Slot)
    assert first.offset != second.offset
    arena.expire(21.0 - 1e-6)
    assert arena.slots_free == 0
    arena.expire(21.0)
    arena.check()
    assert arena.slots_quarantined == 1, "the second reservation expired at 11 s"


def test_an_abandoned_slot_is_free_at_once() -> None:
    arena = Arena(config(1))
    slot = reserve(arena, spec("a"))
    assert isinstance(slot, Slot)
    arena.abandon([(h("a"), slot.generation)], "other")
    assert arena.slots_free == 0
    arena.abandon([(h("a"), slot.generation), (h("b"), slot.generation)], "w")
    arena.check()
    assert arena.slots_free == 1


def test_a_withdrawn_slot_rests() -> None:
    arena = Arena(config(1))
    slot = reserve(arena, spec("a"))
    assert isinstance(slot, Slot)
    arena.withdraw(h("a"), slot.generation, "w", 0.0)
    arena.check()
    assert arena.slots_quarantined == 1
    assert isinstance(reserve(arena, spec("b")), Full)


def test_eviction_takes_the_least_recently_used() -> None:
    arena = Arena(config(3))
    for name in "abc":
        put(arena, name)
    arena.release(lease(arena, ["a"]).lease, "r")
    put(arena, "d")
    put(arena, "e")
    assert held(arena, *"abcde") == [1, 0, 0, 1, 1]
    assert arena.evicted == 2


def test_asking_for_a_present_block_keeps_it() -> None:
    arena = Arena(config(2))
    put(arena, "a")
    put(arena, "b")
    reserve(arena, spec("a"))
    put(arena, "c")
    assert held(arena, "a", "b", "c") == [1, 0, 1]


def test_a_prefix_never_goes_before_its_continuation() -> None:
    arena = Arena(config(4))
    put(arena, "a")
    put(arena, "b", "a")
    put(arena, "c", "b")
    put(arena, "x")
    arena.take_changes()
    for name in "123":
        put(arena, name)
    gone = [change.hash for change in arena.take_changes() if isinstance(change, Removed)]
    assert gone == [h("c"), h("b"), h("a")], "the oldest sequence, from its end"


def test_a_fork_is_kept_for_its_last_branch() -> None:
    arena = Arena(config(3))
    put(arena, "a")
    put(arena, "b", "a")
    put(arena, "c", "a")
    put(arena, "d")
    assert held(arena, *"abcd") == [1, 0, 1, 1]


def test_a_parent_that_comes_after_its_child_is_kept_for_it() -> None:
    arena = Arena(config(3))
    put(arena, "b", "a")
    put(arena, "a")
    put(arena, "x")
    put(arena, "y")
    assert held(arena, *"abxy") == [1, 0, 1, 1]


def test_a_block_being_written_keeps_its_prefix() -> None:
    arena = Arena(config(2))
    put(arena, "a")
    slot = reserve(arena, spec("b", "a"))
    assert isinstance(reserve(arena, spec("c")), Full)
    assert publish(arena, spec("b", "a"), slot) == "published"
    assert isinstance(reserve(arena, spec("c", "b")), Full), "a prefix does not make room for its own continuation"
    assert held(arena, "a", "b") == [1, 1]
    assert isinstance(reserve(arena, spec("c")), Slot)
    assert held(arena, "a", "b") == [1, 0]


def test_a_lease_blocks_eviction_until_it_ends() -> None:
    arena = Arena(config(1))
    put(arena, "a")
    granted = lease(arena, ["a", "nothing"], ttl_s=5.0)
    assert granted.blocks[1] is None
    assert isinstance(reserve(arena, spec("b")), Full)
    arena.release(granted.lease, "somebody else")
    assert isinstance(reserve(arena, spec("b")), Full)
    arena.release(granted.lease, "r")
    arena.release(granted.lease, "r")
    assert isinstance(reserve(arena, spec("b")), Slot)


def test_a_lease_ends_by_time_and_is_capped() -> None:
    arena = Arena(config(1))
    put(arena, "a")
    assert lease(arena, ["a"], ttl_s=1000.0).ttl_s == 30.0
    assert isinstance(reserve(arena, spec("b"), now_s=29.0), Full)
    assert isinstance(reserve(arena, spec("b"), now_s=30.0), Slot)


def test_a_lease_ends_with_its_holders_connection() -> None:
    arena = Arena(config(1))
    put(arena, "a")
    lease(arena, ["a"])
    arena.disconnected("r", 0.0)
    assert arena.leases == 0
    assert isinstance(reserve(arena, spec("b")), Slot)


def test_a_revoked_block_is_gone_at_once_but_its_slot_waits_for_its_readers() -> None:
    arena = Arena(config(1))
    slot = put(arena, "a")
    first, second = lease(arena, ["a"]), lease(arena, ["a", "a"])
    assert not arena.revoke(h("a"), SlotGeneration(slot.generation + 1))
    assert arena.revoke(h("a"), slot.generation)
    assert not arena.revoke(h("a"), slot.generation)
    arena.check()
    assert held(arena, "a") == [0]
    assert isinstance(reserve(arena, spec("a")), Full)
    arena.release(first.lease, "r")
    assert isinstance(reserve(arena, spec("a")), Full)
    arena.release(second.lease, "r")
    arena.check()
    assert isinstance(reserve(arena, spec("a")), Slot)
    assert arena.take_changes() == [Stored(h("a")), Removed(h("a"))]


def test_a_revoked_prefix_counts_its_continuations_again_when_it_returns() -> None:
    arena = Arena(config(3))
    slot = put(arena, "a")
    put(arena, "b", "a")
    arena.revoke(h("a"), slot.generation)
    arena.check()
    put(arena, "a")
    put(arena, "x")
    put(arena, "y")
    assert held(arena, *"abxy") == [1, 0, 1, 1]


def test_holders_have_limits() -> None:
    arena = Arena(config(4, reservations_max=2, leases_max=1))
    outcomes = arena.reserve([spec(name) for name in "abc"], "w", 0.0)
    assert [type(outcome) for outcome in outcomes] == [Slot, Slot, Full]
    assert isinstance(reserve(arena, spec("c"), "other"), Slot)
    put_name = "d"
    slot = reserve(arena, spec(put_name), "third")
    assert publish(arena, spec(put_name), slot, "third") == "published"
    granted = lease(arena, [put_name])
    assert arena.lease([h(put_name)], "r", 1.0, 0.0) is None
    arena.release(granted.lease, "r")
    lease(arena, [put_name])


def test_leases_of_nothing_hold_nothing() -> None:
    arena = Arena(config(4, leases_max=1))
    assert lease(arena, ["a"]).lease != lease(arena, ["a"]).lease
    assert arena.leases == 0
    arena.release(LeaseId(1), "r")


def test_many_short_leases_leave_no_trace() -> None:
    arena = Arena(config(1))
    put(arena, "a")
    for _ in range(5000):
        arena.release(lease_fast(arena), "r")
    assert arena.leases == 0
    assert arena.next_deadline_s() is None
    arena.check()


def lease_fast(arena: Arena) -> LeaseId:
    granted = arena.lease([h("a")], "r", 30.0, 0.0)
    assert granted is not None
    return granted.lease


def test_idle_has_no_deadline() -> None:
    arena = Arena(config())
    put(arena, "a")
    assert arena.next_deadline_s() is None


def test_a_long_protected_prefix_does_not_slow_eviction() -> None:
    """Every search step is paid by an earlier event: eviction beside a protected prefix stays linear in all."""
    slots = 3000
    arena = Arena(config(slots))
    parent: str | None = None
    for i in range(slots - 2):
        arena_put_fast(arena, f"p{i}", parent)
        parent = f"p{i}"
    keeper = arena.lease([h(parent or "")], "r", 30.0, 0.0)
    assert keeper is not None
    steps = 0
    oldest = arena.table.victims._policy.candidate  # counting the search's steps needs a look inside

    def counted(group: int) -> int | None:
        nonlocal steps
        steps += 1
        return oldest(group)

    arena.table.victims._policy.candidate = counted  # type: ignore[method-assign]
    for i in range(2000):
        arena_put_fast(arena, f"x{i}", None)
    arena.check()
    assert arena.evicted == 1998
    assert steps < slots + 2 * 2000


def arena_put_fast(arena: Arena, name: str, parent: str | None) -> None:
    block = spec(name, parent)
    (slot,) = arena.reserve([block], "w", 0.0)
    assert isinstance(slot, Slot)
    assert arena.publish([Publication(block.hash, slot.generation, Checksum(7))], "w", 0.0) == ["published"]


@pytest.mark.parametrize(
    "changes",
    [
        {"slot_bytes": 1000},
        {"slot_bytes": 0},
        {"slot_bytes": 8 * SLOT},
        {"late_write_s": 0.0},
        {"leases_max": 0},
    ],
)
def test_contradictory_config_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|holds"):
        config(**changes)

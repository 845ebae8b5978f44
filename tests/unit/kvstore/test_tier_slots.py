"""The slot index against a dict: whatever happens, it agrees, and its invariants hold."""

from collections.abc import Iterable
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.index.tenants import tenant_key
from kvstore.tiers.base import TierBlock
from kvstore.tiers.records import Layout, Record, pack_record, unpack_records
from kvstore.tiers.slots import Placement, SlotIndex
from tracehaul.wire.blocks import Removed, Stored
from tracehaul.wire.ids import BlockHash, Checksum

SLOT = 8192
ROOT = BlockHash(b"\xff" * 16)


def h(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16)) if number else ROOT


def block(number: int, parent: int = 0) -> TierBlock:
    return TierBlock(h(number), h(parent), 4000 + number, Checksum(number * 31))


def fill(index: SlotIndex, blocks: list[TierBlock]) -> list[bool]:
    placements = index.place(blocks)
    for placement in placements:
        if placement is not None:
            index.commit(placement.slot)
    index.take_stale()
    return [placement is not None for placement in placements]


def test_the_oldest_leaf_goes_first() -> None:
    index = SlotIndex(3, SLOT)
    fill(index, [block(1), block(2, 1), block(3)])
    index.take_changes()
    assert fill(index, [block(4)]) == [True]
    assert index.take_changes() == [Removed(h(2)), Stored(h(4))]
    index.touch(h(1))
    fill(index, [block(5)])
    assert set(index.held()) == {h(1), h(4), h(5)}
    index.check()


def test_a_prefix_makes_no_room_for_its_own_continuation() -> None:
    index = SlotIndex(2, SLOT)
    assert fill(index, [block(1), block(2, 1), block(3, 2)]) == [True, True, False]
    assert set(index.held()) == {h(1), h(2)}
    index.check()


def test_a_block_twice_in_one_call_gets_one_slot() -> None:
    index = SlotIndex(4, SLOT)
    assert fill(index, [block(1), block(1)]) == [True, False]
    assert fill(index, [block(1)]) == [False]
    index.check()


def test_slots_of_one_call_are_neighbours_in_order() -> None:
    index = SlotIndex(8, SLOT)
    assert [p.slot for p in index.place([block(n) for n in range(1, 5)]) if p] == [0, 1, 2, 3]


def test_a_block_that_the_call_names_makes_room_last() -> None:
    index = SlotIndex(3, SLOT)
    fill(index, [block(1), block(2), block(3)])
    assert fill(index, [block(4), block(1)]) == [True, False]
    assert set(index.held()) == {h(1), h(3), h(4)}
    index.check()


def test_a_slot_under_a_read_is_not_reused() -> None:
    index = SlotIndex(1, SLOT)
    fill(index, [block(1)])
    begun = index.begin_read(h(1))
    assert begun is not None
    assert begun[1] == block(1)
    assert fill(index, [block(2)]) == [False]
    index.drop(h(1))
    assert fill(index, [block(2)]) == [False]
    index.check()
    index.end_read(begun[0])
    assert fill(index, [block(2)]) == [True]
    index.check()


def test_an_evicted_slot_is_stale_until_it_is_taken() -> None:
    index = SlotIndex(1, SLOT)
    fill(index, [block(1)])
    (placement,) = index.place([block(2)])
    assert placement is not None
    assert index.take_stale() == [placement.slot]
    assert index.take_stale() == []
    index.still_stale([placement.slot])
    assert index.take_stale() == [placement.slot]
    index.commit(placement.slot)
    index.check()


def test_a_full_index_evicts_ahead_and_has_room_when_the_records_are_gone() -> None:
    index = SlotIndex(64, SLOT)
    fill(index, [block(n) for n in range(1, 65)])
    index.take_changes()
    ahead = index.evict_ahead(10, tenant_key(""))
    assert len(ahead) == 2, "a 32nd of all"
    assert index.take_changes() == [Removed(h(1)), Removed(h(2))]
    assert index.evict_ahead(10, tenant_key("")) == []
    (placement,) = index.place([block(100)])
    assert placement is not None
    assert placement.slot not in ahead, "its record is still there"
    assert index.take_stale() == [placement.slot]
    index.check()
    index.cleared(ahead)
    assert [p.slot for p in index.place([block(101), block(102)]) if p] == sorted(ahead)
    assert index.take_stale() == []
    index.check()


def test_restore_takes_the_newer_of_two_and_erases_the_rest() -> None:
    index = SlotIndex(4, SLOT)
    records: list[Record | int] = [Record(0, 5, block(1)), Record(1, 9, block(1)), 2, Record(3, 7, block(2, 1))]
    assert index.restore(records) == 2
    assert index.find(h(1)) == block(1)
    assert index.begin_read(h(1)) == (1, block(1))
    index.end_read(1)
    assert index.take_stale() == [0, 2]
    assert index.take_changes() == []
    (placement,) = index.place([block(3)])
    assert placement is not None
    assert placement.sequence == 10
    index.check()


def test_pinned_blocks_go_last_or_never() -> None:
    index = SlotIndex(3, SLOT)
    fill(index, [block(1), block(2), block(3)])
    ranks: dict[BlockHash, float] = {h(1): inf, h(2): 5.0}
    index.protect(ranks.get, {})
    index.check()
    assert fill(index, [block(4)]) == [True]
    assert set(index.held()) == {h(1), h(2), h(4)}
    ranks[h(4)] = 6.0
    index.repinned([h(4)])
    assert fill(index, [block(5)]) == [True]
    assert set(index.held()) == {h(1), h(4), h(5)}, "the lowest rank first"
    ranks[h(5)] = ranks[h(4)] = inf
    index.repinned([h(4), h(5), h(99)])
    assert fill(index, [block(6)]) == [False], "what is pinned hard makes no room"
    del ranks[h(1)]
    index.repinned([h(1)])
    assert fill(index, [block(6)]) == [True]
    assert set(index.held()) == {h(4), h(5), h(6)}
    index.check()


def test_a_tenant_keeps_its_share() -> None:
    acme = tenant_key("acme")
    index = SlotIndex(4, SLOT)
    fill(index, [block(n)._replace(tenant=acme) for n in (1, 2, 3)])
    index.protect(lambda _: None, {"acme": 0.5})
    for n in range(10, 20):
        assert fill(index, [block(n)]) == [True]
    assert {h(2), h(3)} <= set(index.held()), "it was above its share by one"
    fill(index, [block(4)._replace(tenant=acme)])
    assert h(2) not in index.held(), "above it, its own oldest goes"
    found = index.find(h(4))
    assert found is not None
    assert found.tenant == acme
    index.check()


class Machine(RuleBasedStateMachine):
    """A dict of what is held, beside the index; a dict of records, as a device would keep them."""

    @initialize(slots=st.integers(1, 6), shares=st.sampled_from([{}, {"a": 0.5}, {"a": 0.3, "b": 0.3}]))
    def start(self, slots: int, shares: dict[str, float]) -> None:
        self.slots = slots
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("kvstore.tiers.slots.AHEAD_SHARE", 0.5)
        self.index = SlotIndex(slots, SLOT)
        self.ranks: dict[BlockHash, float] = {}
        self.shares = shares
        self.index.protect(self.ranks.get, shares)
        self.held: dict[BlockHash, TierBlock] = {}
        self.told: set[BlockHash] = set()
        self.writing: dict[int, tuple[int, TierBlock]] = {}
        self.reading: list[tuple[int, TierBlock]] = []
        self.records: dict[int, bytes] = {}
        self.bytes: dict[int, TierBlock] = {}
        self.clearing: list[list[int]] = []

    def teardown(self) -> None:
        self.patch.undo()

    def settle(self) -> None:
        for change in self.index.take_changes():
            if isinstance(change, Stored):
                assert change.hash not in self.told
                self.told.add(change.hash)
            else:
                self.told.remove(change.hash)
                del self.held[change.hash]

    @rule(number=st.integers(1, 12), rank=st.sampled_from([None, 1.0, 2.0, inf]))
    def pin(self, number: int, rank: float | None) -> None:
        self.ranks.pop(h(number), None)
        if rank is not None:
            self.ranks[h(number)] = rank
        self.index.repinned([h(number)])

    def used(self, group: str, blocks: Iterable[TierBlock]) -> int:
        own = {tenant_key(tenant): tenant for tenant in self.shares}
        return sum(own.get(block.tenant, "") == group for block in blocks)

    def check_victims(self, gone: list[TierBlock], asker: str) -> None:
        """Those that one call for one block made go: at most one, pinned hard never, unpinned before pinned, and of a
        tenant within its share only for itself."""
        assert len(gone) <= 1
        for victim in gone:
            left = [block for block in self.held.values() if block.tenant == victim.tenant]
            assert self.ranks.get(victim.hash) != inf
            free = [b for b in left if b.hash not in self.ranks and not self.kept(b)]
            assert victim.hash not in self.ranks or not free
            quota = {tenant: int(share * self.slots) for tenant, share in self.shares.items()}
            quota[""] = self.slots - sum(quota.values())
            group = next((t for t in self.shares if tenant_key(t) == victim.tenant), "")
            before = self.used(group, [*self.held.values(), *(b for _, b in self.writing.values()), victim])
            assert group == asker or before > quota[group], "a tenant within its share lost a block to another"

    def kept(self, block: TierBlock) -> bool:
        """Whether its slot is read, or it has a continuation here."""
        reading = any(read.hash == block.hash for _, read in self.reading)
        return reading or any(
            b.parent == block.hash for b in [*self.held.values(), *(b for _, b in self.writing.values())]
        )

    @rule(number=st.integers(1, 12), tenant=st.sampled_from(["", "a", "b", "c"]))
    def place_for(self, number: int, tenant: str) -> None:
        wanted = block(number)._replace(tenant=tenant_key(tenant))
        before = dict(self.held)
        (placement,) = self.index.place([wanted])
        self.settle()
        gone = [b for block_hash, b in before.items() if block_hash not in self.held]
        self.check_victims(gone, tenant if tenant in self.shares else "")
        assert placement is not None or not gone
        self.note([placement], [wanted])

    @rule(numbers=st.lists(st.integers(1, 12), min_size=1, max_size=4), back=st.integers(0, 3))
    def place(self, numbers: list[int], back: int) -> None:
        blocks = [block(number, max(0, number - back) if back else 0) for number in numbers]
        placements = self.index.place(blocks)
        self.settle()
        self.note(placements, blocks)

    def note(self, placements: list[Placement | None], blocks: list[TierBlock]) -> None:
        here = set(self.held) | {b.hash for _, b in self.writing.values()}  # less what the call itself evicted
        for slot in self.index.take_stale():
            self.records.pop(slot, None)
            assert slot not in self.writing
        for placement, wanted in zip(placements, blocks, strict=True):
            if placement is None:
                continue
            assert wanted.hash not in here
            assert placement.slot not in self.records, "a record must be erased before its slot is written"
            assert placement.slot not in {slot for slot, _ in self.reading}
            self.writing[placement.slot] = (placement.sequence, wanted)
            self.bytes[placement.slot] = wanted

    @rule(good=st.booleans())
    def end_write(self, good: bool) -> None:
        if not self.writing:
            return
        slot, (sequence, written) = self.writing.popitem()
        self.records[slot] = pack_record(Record(slot, sequence, written))
        if good:
            self.index.commit(slot)
            self.held[written.hash] = written
        else:
            self.index.cancel(slot)
        self.settle()

    @rule(count=st.integers(1, 4), tenant=st.sampled_from(["", "a"]))
    def evict_ahead(self, count: int, tenant: str) -> None:
        before = dict(self.held)
        slots = self.index.evict_ahead(count, tenant_key(tenant))
        self.settle()
        gone = [b for block_hash, b in before.items() if block_hash not in self.held]
        assert len(gone) == len(slots) <= min(count, self.slots // 2)
        assert not any(b.hash in self.ranks for b in gone), "what is pinned waits until it has to go"
        self.clearing.append(slots)

    @rule(good=st.booleans())
    def end_clearing(self, good: bool) -> None:
        if not self.clearing:
            return
        slots = self.clearing.pop()
        for slot in slots if good else slots[:1]:
            self.records.pop(slot, None)
        self.index.cleared(slots)
        if not good:
            self.index.still_stale(slots)

    @rule(number=st.integers(1, 12))
    def begin_read(self, number: int) -> None:
        begun = self.index.begin_read(h(number))
        assert (begun is None) == (h(number) not in self.held)
        if begun is not None:
            assert begun[1] == self.held[h(number)]
            self.reading.append(begun)

    @rule()
    def end_read(self) -> None:
        if self.reading:
            slot, was = self.reading.pop()
            assert self.bytes[slot] == was, "bytes changed under a read"
            self.index.end_read(slot)

    @rule(number=st.integers(1, 12))
    def drop(self, number: int) -> None:
        assert self.index.drop(h(number)) == (h(number) in self.held)
        self.settle()

    @rule(number=st.integers(1, 12))
    def touch(self, number: int) -> None:
        self.index.touch(h(number))

    @rule()
    def restart(self) -> None:
        """What a process that is killed here would find: all that is held, and nothing that was never complete."""
        layout = Layout(SLOT, self.slots)
        data = b"".join(self.records.get(slot, bytes(64)) for slot in range(self.slots))
        again = SlotIndex(self.slots, SLOT)
        again.restore(unpack_records(data, layout))
        again.check()
        assert set(self.held) <= set(again.held())
        for block_hash in again.held():
            begun = again.begin_read(block_hash)
            assert begun is not None
            assert self.bytes[begun[0]] == begun[1], "a record names bytes that are not in its slot"
            again.end_read(begun[0])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        assert {block_hash: self.index.find(block_hash) for block_hash in self.index.held()} == self.held
        assert self.told == set(self.held)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSlotIndex = Machine.TestCase

"""Which block is in which slot of a tier, and which goes first when it is full. Pure.

A slot's life::

    FREE --place--> WRITING --commit--> HELD --evict, drop--> FREE
                       |                  |--drop under a read--> DOOMED --last read ends--> FREE
                       |                  '--evict ahead--> CLEARING --record erased--> FREE
                       '--cancel--> FREE

A block can be found exactly while it is HELD. The victim has no child here and no read: the end of a sequence goes
before its start, so what is left can still be used. Among those it is as in memory: quotas, pins, least recent use.

A slot that was HELD has a record on the device that must be erased before the slot's bytes change: such slots are
*stale* until :meth:`SlotIndex.take_stale` hands them over. A full tier may evict a little ahead of what it is asked
for: then records are erased together with others that have to be written anyway, and nobody waits for them.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kvstore.index.continuations import Continuations
from kvstore.index.eviction import LeastRecent
from kvstore.index.tenants import TenantKey, Tenants
from kvstore.index.victims import Victims
from kvstore.tiers.base import TierBlock
from kvstore.tiers.records import Record
from tracehaul.wire.blocks import Change, Removed, Stored
from tracehaul.wire.ids import BlockHash, Checksum

FREE, WRITING, HELD, DOOMED, CLEARING = range(5)

AHEAD_SHARE = 1 / 32
"""Of all slots, those that may be evicted ahead."""


def _unpinned(block_hash: BlockHash) -> float | None:
    """Nobody pins anything."""
    return None


class Placement(NamedTuple):
    """A slot that one writer fills."""

    slot: int
    sequence: int


class SlotIndex:
    """Index of one tier. Every change of what can be found is appended to ``changes``, in order.

    Costs are O(1) amortized per block.
    """

    def __init__(self, slots_max: int, slot_bytes: int) -> None:
        assert slots_max > 0
        self.slots_max = slots_max
        self.slot_bytes = slot_bytes
        # By slot.
        self._state = bytearray(slots_max)
        self._size = array("I", bytes(4 * slots_max))
        self._checksum = array("Q", bytes(8 * slots_max))
        self._sequence = array("Q", bytes(8 * slots_max))
        self._reads = array("I", bytes(4 * slots_max))
        self._hash: list[BlockHash | None] = [None] * slots_max
        self._free = array("I", range(slots_max - 1, -1, -1))
        self._stale: dict[int, None] = {}
        self._clearing = 0
        self._tenant = array("Q", bytes(8 * slots_max))
        self._group = array("H", bytes(2 * slots_max))
        self._rank_of: Callable[[BlockHash], float | None] = _unpinned
        self._give_way({})
        # By hash.
        self._held: dict[BlockHash, int] = {}
        self._writing: dict[BlockHash, int] = {}
        self._writing_parent: dict[BlockHash, BlockHash] = {}
        self._continuations = Continuations(slots_max, self._held)
        self._sequence_last = 0
        self._changes: list[Change] = []
        self.bytes_used = 0
        self.evicted = 0

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._held)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._held

    def find(self, block_hash: BlockHash) -> TierBlock | None:
        """A held block."""
        slot = self._held.get(block_hash)
        return None if slot is None else self._block(slot)

    def size_of(self, block_hash: BlockHash) -> int:
        """Bytes of a held block, 0 if it is not."""
        slot = self._held.get(block_hash)
        return 0 if slot is None else self._size[slot]

    def next_held(self, slot: int) -> int | None:
        """The first slot from ``slot`` on that holds a block."""
        found = self._state.find(HELD, slot)
        return None if found < 0 else found

    def hash_at(self, slot: int) -> BlockHash | None:
        """The block in a slot, if it is held or being written."""
        return self._hash[slot]

    def held(self) -> tuple[BlockHash, ...]:
        """All held blocks."""
        return tuple(self._held)

    def take_changes(self) -> list[Change]:
        """The changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def take_stale(self, among: Iterable[int] | None = None) -> list[int]:
        """Slots, of those or of all, whose records have to be erased before they are written; each once."""
        stale = sorted(self._stale if among is None else [slot for slot in among if slot in self._stale])
        for slot in stale:
            del self._stale[slot]
        return stale

    def still_stale(self, slots: Iterable[int]) -> None:
        """Their records could not be erased."""
        self._stale.update(dict.fromkeys(slots))

    # --- start --------------------------------------------------------------------------------------------

    def protect(self, rank: Callable[[BlockHash], float | None], shares: Mapping[str, float]) -> None:
        """As :meth:`kvstore.tiers.base.Tier.protect`."""
        order = self._recency.order(0)
        self._rank_of = rank
        self._give_way(shares)
        for slot in self._held.values():
            self._group[slot] = self._tenants.group(TenantKey(self._tenant[slot]))
            self._tenants.take(self._group[slot])
        assert not self._writing
        for slot in order:
            self._victims.add(slot, self._group[slot], self._hash_at(slot))

    def reshare(self, shares: Mapping[str, float]) -> None:
        """As :meth:`kvstore.tiers.base.Tier.reshare`. Linear in slots."""
        self._tenants = self._tenants_of(shares)
        for slot, state in enumerate(self._state):
            self._group[slot] = self._tenants.group(TenantKey(self._tenant[slot]))
            if state in (HELD, WRITING):
                self._tenants.take(self._group[slot])
        self._recency = LeastRecent(self.slots_max, len(self._tenants))
        self._victims.regroup(self._tenants, self._recency, self._group)

    def repinned(self, hashes: Iterable[BlockHash]) -> None:
        """As :meth:`kvstore.tiers.base.Tier.repinned`."""
        for block_hash in hashes:
            slot = self._held.get(block_hash)
            if slot is not None:
                self._victims.reconsider(slot, self._group[slot])

    def _give_way(self, shares: Mapping[str, float]) -> None:
        self._tenants = self._tenants_of(shares)
        self._recency = LeastRecent(self.slots_max, len(self._tenants))
        self._victims = Victims(self._tenants, self._recency, self._rank, self._is_idle)

    def _tenants_of(self, shares: Mapping[str, float]) -> Tenants:
        quota_bytes = {tenant: int(share * self.slots_max) * self.slot_bytes for tenant, share in shares.items()}
        return Tenants(quota_bytes, self.slot_bytes, self.slots_max)

    def restore(self, records: Iterable[Record | int]) -> int:
        """Take over what a device remembers; returns how many records were no use. Only on an empty index.

        Of two records of one block the newer is true. Nothing is told as a change.
        """
        assert not self._held
        assert not self._writing
        newest: dict[BlockHash, Record] = {}
        useless = 0
        for record in records:
            if isinstance(record, int):
                self._stale[record] = None
                useless += 1
                continue
            other = newest.get(record.block.hash)
            if other is not None:
                useless += 1
                record, loser = (record, other) if record.sequence > other.sequence else (other, record)
                self._stale[loser.slot] = None
            newest[record.block.hash] = record
        parents: list[BlockHash] = []
        for record in sorted(newest.values(), key=lambda record: record.sequence):
            slot, block = record.slot, record.block
            self._state[slot] = HELD
            parents.append(self._fill(slot, block, record.sequence))
            self._held[block.hash] = slot
            self._sequence_last = record.sequence
        self._continuations.restore(list(self._held.values()), parents)
        for block_hash, slot in self._held.items():
            self._victims.add(slot, self._group[slot], block_hash)
            self._tenants.take(self._group[slot])
            self.bytes_used += self._size[slot]
        self._free = array("I", [slot for slot in range(self.slots_max - 1, -1, -1) if self._state[slot] == FREE])
        return useless

    # --- writing ------------------------------------------------------------------------------------------

    def place(self, blocks: Sequence[TierBlock]) -> list[Placement | None]:
        """A slot for each block that is not here, evicting as needed; None if it is, or if nothing can go.

        Slots of one call are as close to each other as they come, in the order of the blocks. Those that are here
        count as touched: a block that the same call names is the last to make room for the others.
        """
        for block in blocks:
            self.touch(block.hash)
        slots: list[int] = []
        wanted: list[bool] = []
        for block in blocks:
            assert 0 < block.size_bytes <= self.slot_bytes
            slot = None
            if block.hash not in self._held and block.hash not in self._writing:
                # First: the prefix must not make room for its own continuation.
                self._continuations.expect(block.parent)
                slot = self._take_slot(self._tenants.group(block.tenant))
                if slot is None:
                    self._drop_child(block.parent)
                else:
                    slots.append(slot)
                    self._tenants.take(self._tenants.group(block.tenant))
                    self._writing[block.hash] = slot  # so that a second one in the same call is not placed
            wanted.append(slot is not None)
        slots.sort()
        placements: list[Placement | None] = []
        rest = iter(slots)
        for block, placed in zip(blocks, wanted, strict=True):
            placements.append(self._place(block, next(rest)) if placed else None)
        return placements

    def evict_ahead(self, count: int, tenant: TenantKey) -> list[int]:
        """Evict unpinned blocks for more of a tenant's that will come, so that there is room for ``count``.

        The slots are free only when their records are erased: when :meth:`cleared` says so.
        """
        wanted = min(count, int(self.slots_max * AHEAD_SHARE)) - len(self._free) - self._clearing
        group = self._tenants.group(tenant)
        slots: list[int] = []
        while len(slots) < wanted:
            victim = self._victims.choose(group)
            if victim is None or self._rank(victim) is not None:
                break
            self.evicted += 1
            self._remove(victim)
            slot = self._free.pop()
            assert slot == victim, "a victim has no reads"
            del self._stale[slot]
            self._state[slot] = CLEARING
            slots.append(slot)
        self._clearing += len(slots)
        return slots

    def cleared(self, slots: Sequence[int]) -> None:
        """The records of slots that were evicted ahead are erased; or it was tried, and :meth:`still_stale` follows."""
        for slot in slots:
            assert self._state[slot] == CLEARING
            self._state[slot] = FREE
            self._free.append(slot)
        self._clearing -= len(slots)

    def _place(self, block: TierBlock, slot: int) -> Placement:
        self._sequence_last += 1
        self._state[slot] = WRITING
        self._writing_parent[block.hash] = self._fill(slot, block, self._sequence_last)
        self._writing[block.hash] = slot
        return Placement(slot, self._sequence_last)

    def commit(self, slot: int) -> None:
        """The slot's bytes and its record are written: the block can be found."""
        block_hash = self._hash_at(slot)
        assert self._state[slot] == WRITING
        del self._writing[block_hash]
        self._state[slot] = HELD
        self._held[block_hash] = slot
        self._continuations.publish(slot, block_hash, self._writing_parent.pop(block_hash))
        self._victims.add(slot, self._group[slot], block_hash)
        self.bytes_used += self._size[slot]
        self._changes.append(Stored(block_hash))

    def cancel(self, slot: int) -> None:
        """The slot could not be written; there may be a record of it."""
        assert self._state[slot] == WRITING
        block_hash = self._hash_at(slot)
        del self._writing[block_hash]
        self._drop_child(self._writing_parent.pop(block_hash))
        self._tenants.give(self._group[slot])
        self._release(slot)

    # --- reading, dropping --------------------------------------------------------------------------------

    def begin_read(self, block_hash: BlockHash) -> tuple[int, TierBlock] | None:
        """Keep a held block's slot until :meth:`end_read`."""
        slot = self._held.get(block_hash)
        if slot is None:
            return None
        self._reads[slot] += 1
        return slot, self._block(slot)

    def end_read(self, slot: int) -> None:
        """One read of the slot is over."""
        assert self._reads[slot] > 0
        self._reads[slot] -= 1
        if self._reads[slot]:
            return
        if self._state[slot] == DOOMED:
            self._release(slot)
        else:
            self._unpark(slot)

    def drop(self, block_hash: BlockHash) -> bool:
        """Forget a held block; returns whether it was. Its slot stays until its reads end."""
        slot = self._held.get(block_hash)
        if slot is None:
            return False
        self._remove(slot)
        return True

    def touch(self, block_hash: BlockHash) -> None:
        """Make a held block the last to be evicted."""
        slot = self._held.get(block_hash)
        if slot is not None:
            self._victims.touch(slot, self._group[slot])

    # --- slots --------------------------------------------------------------------------------------------

    def _take_slot(self, group: int) -> int | None:
        if not self._free:
            victim = self._victims.choose(group)
            if victim is None:
                return None
            self.evicted += 1
            self._remove(victim)
        return self._free.pop()

    def _is_idle(self, slot: int) -> bool:
        return self._state[slot] == HELD and not self._reads[slot] and not self._continuations.is_parent(slot)

    def _rank(self, slot: int) -> float | None:
        return self._rank_of(self._hash_at(slot))

    def _unpark(self, slot: int) -> None:
        self._victims.let_go(slot, self._group[slot])

    def _remove(self, slot: int) -> None:
        block_hash = self._hash_at(slot)
        assert self._state[slot] == HELD
        del self._held[block_hash]
        self._victims.remove(slot)
        self._tenants.give(self._group[slot])
        self.bytes_used -= self._size[slot]
        parent_slot = self._continuations.remove(slot, block_hash)
        if parent_slot is not None:
            self._unpark(parent_slot)
        self._changes.append(Removed(block_hash))
        self._stale[slot] = None
        if self._reads[slot]:
            self._state[slot] = DOOMED
        else:
            self._release(slot)

    def _release(self, slot: int) -> None:
        self._state[slot] = FREE
        self._hash[slot] = None
        self._stale[slot] = None
        self._free.append(slot)

    def _fill(self, slot: int, block: TierBlock, sequence: int) -> BlockHash:
        """Returns its parent: the equal hash that is already here, if any, which saves 50 bytes per block."""
        self._hash[slot] = block.hash
        self._size[slot] = block.size_bytes
        self._checksum[slot] = block.checksum
        self._sequence[slot] = sequence
        self._tenant[slot] = block.tenant
        self._group[slot] = self._tenants.group(block.tenant)
        parent = self._held.get(block.parent)
        return block.parent if parent is None else self._hash[parent] or block.parent

    def _block(self, slot: int) -> TierBlock:
        return TierBlock(
            self._hash_at(slot),
            self._continuations.parent(slot),
            self._size[slot],
            Checksum(self._checksum[slot]),
            TenantKey(self._tenant[slot]),
        )

    def _hash_at(self, slot: int) -> BlockHash:
        block_hash = self._hash[slot]
        assert block_hash is not None
        return block_hash

    def _drop_child(self, parent: BlockHash) -> None:
        slot = self._continuations.forget(parent)
        if slot is not None:
            self._unpark(slot)

    # --- invariants ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant. Linear in slots: for tests."""
        by_state: dict[int, list[int]] = {state: [] for state in (FREE, WRITING, HELD, DOOMED, CLEARING)}
        for slot in range(self.slots_max):
            by_state[self._state[slot]].append(slot)
        assert sorted(self._free) == by_state[FREE]
        assert len(by_state[CLEARING]) == self._clearing
        assert not any(slot in self._stale for slot in by_state[CLEARING])
        assert sorted(self._writing.values()) == by_state[WRITING]
        assert sorted(self._held.values()) == by_state[HELD]
        assert not self._held.keys() & self._writing.keys()
        assert all(self._reads[slot] for slot in by_state[DOOMED])
        assert self.bytes_used == sum(self._size[slot] for slot in by_state[HELD])
        assert all(self._hash[slot] == block_hash for block_hash, slot in [*self._held.items(), *self._writing.items()])
        assert self._writing_parent.keys() == self._writing.keys()
        self._continuations.check(list(self._writing_parent.items()))
        groups = range(len(self._tenants))
        self._victims.check([[slot for slot in by_state[HELD] if self._group[slot] == group] for group in groups])
        for group in groups:
            used = sum(self._group[slot] == group for slot in (*by_state[HELD], *by_state[WRITING]))
            assert used == self._tenants.used(group)
        assert not any(slot in self._stale for slot in by_state[HELD])

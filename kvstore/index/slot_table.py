"""The slots of a node's memory, and the blocks that are published in them. Pure.

What is known of a slot is in columns, one item per slot. What concerns many blocks at once, a *run*, is done by
column: a request for hundreds of blocks costs little more than one for a few.
"""

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.index.columns import column
from kvstore.index.continuations import Continuations
from kvstore.index.eviction import LeastRecent, Policy
from kvstore.index.pins import Pins
from kvstore.index.tenants import TenantKey, Tenants
from kvstore.index.victims import Victims
from tracehaul.wire.blocks import LeasedBlock, Removed, Slot, Stored
from tracehaul.wire.ids import BlockHash, Checksum, SlotGeneration

FREE, RESERVED, PUBLISHED, CONDEMNED, QUARANTINED = range(5)

RUN_BLOCKS_MIN = 12
"""Fewer are faster one by one."""


class SlotTable:
    """States, owners and contents of slots, the index of published blocks, and who gives way. A slot is always in one
    state; see :mod:`kvstore.index.arena` for what moves it to another.

    ``changes`` are what became visible or invisible, in order.
    """

    def __init__(
        self,
        slots_max: int,
        slot_bytes: int,
        tenants: Tenants,
        policy: Policy | None,
        pins: Pins,
    ) -> None:
        slots = slots_max
        self._slot_bytes = slot_bytes
        self.state = bytearray(slots)
        self.generation = array("Q", bytes(8 * slots))
        self._generation_last = 0  # of all slots: a late message about one grant must not fit another
        self.checksum = array("Q", bytes(8 * slots))
        self.size = array("I", bytes(4 * slots))
        self.lease_count = array("I", bytes(4 * slots))
        self.group = array("H", bytes(2 * slots))
        self.tenant = array("Q", bytes(8 * slots))
        self.hash: list[BlockHash | None] = [None] * slots
        self._free = array("I", range(slots - 1, -1, -1))
        # The same bytes, for runs.
        self._states = np.frombuffer(self.state, dtype=np.uint8)
        self._generations = np.frombuffer(self.generation, dtype=np.uint64)
        self._checksums = np.frombuffer(self.checksum, dtype=np.uint64)
        self._sizes = np.frombuffer(self.size, dtype=np.uint32)
        self._lease_counts = np.frombuffer(self.lease_count, dtype=np.uint32)
        self._groups = np.frombuffer(self.group, dtype=np.uint16)
        self._tenants_of = np.frombuffer(self.tenant, dtype=np.uint64)
        self.published: dict[BlockHash, int] = {}
        self.continuations = Continuations(slots, self.published)
        self.tenants = tenants
        self._pins = pins
        self.victims = Victims(tenants, policy or LeastRecent(slots, len(tenants)), self._rank, self._is_idle)
        self.changes: list[Stored | Removed] = []
        self.evicted = 0
        self.bytes_published = 0

    @property
    def free(self) -> int:
        """Slots that can be taken without evicting anything."""
        return len(self._free)

    # --- taking -------------------------------------------------------------------------------------------

    def take(self, count: int, group: int) -> "array[int]":
        """Up to ``count`` slots on a group's account, evicting as needed; fewer if nothing more can go."""
        taken = array("I")
        while True:
            more = min(count - len(taken), len(self._free))
            if more:
                taken += self._free[: -more - 1 : -1]
                del self._free[-more:]
                self.tenants.take(group, more)
            missing = count - len(taken)
            if not missing or not (self._evict_run(missing) or self._evict(group)):
                return taken

    def grant(self, slots: "array[int]", sizes: Sequence[int], group: int, tenant: TenantKey) -> list[Slot]:
        """Taken slots become reserved, each under a generation of its own."""
        first = self._generation_last + 1
        self._generation_last += len(slots)
        if len(slots) < RUN_BLOCKS_MIN:
            granted: list[Slot] = []
            for generation, (slot, size) in enumerate(zip(slots, sizes, strict=True), start=first):
                self.state[slot] = RESERVED
                self.generation[slot] = generation
                self.size[slot] = size
                self.group[slot] = group
                self.tenant[slot] = tenant
                granted.append(Slot(slot * self._slot_bytes, SlotGeneration(generation)))
            return granted
        at = np.frombuffer(slots, dtype=np.uint32)
        self._states[at] = RESERVED
        self._generations[at] = np.arange(first, first + len(slots), dtype=np.uint64)
        self._sizes[at] = column(sizes)
        self._groups[at] = group
        self._tenants_of[at] = tenant
        return list(map(Slot, self._offsets(at), self._generations[at].tolist()))

    def give_back(self, slot: int) -> None:
        """A reserved slot counts for nobody any more."""
        self.tenants.give(self.group[slot])

    def release(self, slot: int) -> None:
        """A slot is free."""
        self.state[slot] = FREE
        self._free.append(slot)

    # --- what is visible ----------------------------------------------------------------------------------

    def publish(self, slot: int, block_hash: BlockHash, parent: BlockHash, checksum: Checksum) -> None:
        """Show the block in a reserved slot."""
        self.state[slot] = PUBLISHED
        self.checksum[slot] = checksum
        self.hash[slot] = block_hash
        self.continuations.publish(slot, block_hash, parent)
        self.published[block_hash] = slot
        self.victims.add(slot, self.group[slot], block_hash)
        self.bytes_published += self.size[slot]
        self.changes.append(Stored(block_hash))

    def publish_run(
        self, slots: Sequence[int], hashes: Sequence[BlockHash], parents: Sequence[BlockHash], sums: Sequence[Checksum]
    ) -> None:
        """As :meth:`publish` for each, in one group."""
        at = column(slots)
        self._states[at] = PUBLISHED
        self._checksums[at] = np.frombuffer(array("Q", sums), dtype=np.uint64)
        self.bytes_published += int(self._sizes[at].sum())
        own = self.hash
        for slot, block_hash in zip(slots, hashes, strict=True):
            own[slot] = block_hash
        self.continuations.publish_run(slots, hashes, parents)
        self.published.update(zip(hashes, slots, strict=True))
        self.victims.add_run(slots, self.group[slots[0]], hashes)
        self.changes += map(Stored, hashes)

    def are_granted(self, slots: Sequence[int], generations: Sequence[int]) -> bool:
        """Whether the slots have these generations, and one group."""
        at = column(slots)
        groups = self._groups[at]
        return self._generations[at].tolist() == list(generations) and bool((groups == groups[0]).all())

    def remove(self, slot: int) -> None:
        """Make a published block invisible; free its slot unless a lease still protects the bytes."""
        block_hash = self.hash[slot]
        assert self.state[slot] == PUBLISHED
        assert block_hash is not None
        del self.published[block_hash]
        self.victims.remove(slot)
        self.tenants.give(self.group[slot])
        self.bytes_published -= self.size[slot]
        parent_slot = self.continuations.remove(slot, block_hash)
        self.hash[slot] = None
        if parent_slot is not None:
            self._unpark(parent_slot)
        self.changes.append(Removed(block_hash))
        if self.lease_count[slot]:
            self.state[slot] = CONDEMNED
        else:
            self.release(slot)

    def forget_child(self, parent: BlockHash) -> None:
        """A reserved continuation of ``parent`` is gone."""
        slot = self.continuations.forget(parent)
        if slot is not None:
            self._unpark(slot)

    def touch(self, slot: int) -> None:
        """A published block was used."""
        self.victims.touch(slot, self.group[slot])

    def regroup(self, tenants: Tenants) -> None:
        """Other tenants' quotas from now on."""
        for slot, state in enumerate(self.state):
            self.group[slot] = tenants.group(TenantKey(self.tenant[slot]))
            if state in (RESERVED, PUBLISHED):
                tenants.take(self.group[slot])
        self.tenants = tenants
        self.victims.regroup(tenants, LeastRecent(len(self.state), len(tenants)), self.group)

    # --- protection ---------------------------------------------------------------------------------------

    def protect(self, hashes: Sequence[BlockHash]) -> tuple["array[int]", list[LeasedBlock | None]]:
        """Lease the slots of what is published of these: the slots, and each block."""
        found = list(map(self.published.get, hashes))
        slots = array("I", [slot for slot in found if slot is not None])
        if len(slots) < max(len(found), RUN_BLOCKS_MIN) or len(set(slots)) < len(slots):
            return slots, [None if slot is None else self._protect(slot) for slot in found]
        at = np.frombuffer(slots, dtype=np.uint32)
        self._lease_counts[at] += 1
        columns = (self._sizes[at].tolist(), self._generations[at].tolist(), self._checksums[at].tolist())
        return slots, list(map(LeasedBlock, self._offsets(at), *columns))

    def _offsets(self, at: NDArray[np.uint32]) -> list[int]:
        return (at.astype(np.uint64) * self._slot_bytes).tolist()

    def _protect(self, slot: int) -> LeasedBlock:
        self.lease_count[slot] += 1
        generation, checksum = SlotGeneration(self.generation[slot]), Checksum(self.checksum[slot])
        return LeasedBlock(slot * self._slot_bytes, self.size[slot], generation, checksum)

    def used(self, slots: "array[int]") -> None:
        """Leased slots were touched, the last of them first: among equals a sequence's end goes before its start."""
        order = slots[::-1]
        if len(order) >= RUN_BLOCKS_MIN and len(self.tenants) == 1 and len(set(order)) == len(order):
            self.victims.touch_run(order, 0)
            return
        for slot in order:
            self.touch(slot)

    def unprotect(self, slots: "array[int]") -> None:
        """A lease of these is over."""
        if len(slots) >= RUN_BLOCKS_MIN and len(set(slots)) == len(slots):
            at = np.frombuffer(slots, dtype=np.uint32)
            counts = self._lease_counts[at] - 1
            self._lease_counts[at] = counts
            ended = at[counts == 0].tolist()
        else:
            ended: list[int] = []
            for slot in slots:
                self.lease_count[slot] -= 1
                if not self.lease_count[slot]:
                    ended.append(slot)
        state, let_go, group = self.state, self.victims.let_go, self.group
        for slot in ended:
            if state[slot] == CONDEMNED:
                self.release(slot)
            else:
                let_go(slot, group[slot])

    # --- giving way ---------------------------------------------------------------------------------------

    def _evict(self, group: int) -> bool:
        """Evict one block for one of ``group``; returns whether one could go."""
        victim = self.victims.choose(group)
        if victim is None:
            return False
        self.evicted += 1
        self.remove(victim)
        return True

    def _evict_run(self, count: int) -> int:
        """Evict up to ``count`` blocks that can go one right after the other; 0 where that takes a closer look."""
        if count < RUN_BLOCKS_MIN or len(self.tenants) > 1:
            return 0
        slots = self._loose(self.victims.oldest(count))
        if len(slots) < RUN_BLOCKS_MIN:
            return 0
        at = column(slots)
        hashes = self._hashes(slots)
        unparked = self.continuations.remove_run(slots)
        for slot, block_hash in zip(slots, hashes, strict=True):
            del self.published[block_hash]
            self.hash[slot] = None
        self.victims.remove_run(slots)
        self.tenants.give(0, len(slots))
        self.bytes_published -= int(self._sizes[at].sum())
        self.changes += map(Removed, hashes)
        self._states[at] = FREE
        self._free.extend(slots)
        self.evicted += len(slots)
        for slot in unparked:
            self._unpark(slot)
        return len(slots)

    def _loose(self, slots: list[int]) -> list[int]:
        """Those from the first on that nothing keeps once the ones before are gone."""
        count = self.continuations.loose(slots)
        leased = np.flatnonzero(self._lease_counts[column(slots[:count])])
        count = int(leased[0]) if leased.size else count
        if len(self._pins):
            ranks = map(self._pins.rank, self._hashes(slots[:count]))
            count = next((place for place, rank in enumerate(ranks) if rank is not None), count)
        if self.victims.is_spared is not None:
            spared = map(self.victims.is_spared, slots[:count])
            count = next((place for place, is_spared in enumerate(spared) if is_spared), count)
        return slots[:count]

    def _hashes(self, slots: Sequence[int]) -> list[BlockHash]:
        own = self.hash
        return [block_hash for slot in slots if (block_hash := own[slot]) is not None]

    def _is_idle(self, slot: int) -> bool:
        return self.state[slot] == PUBLISHED and not self.lease_count[slot] and not self.continuations.is_parent(slot)

    def _rank(self, slot: int) -> float | None:
        block_hash = self.hash[slot]
        return None if block_hash is None else self._pins.rank(block_hash)

    def _unpark(self, slot: int) -> None:
        self.victims.let_go(slot, self.group[slot])

    # --- invariants ---------------------------------------------------------------------------------------

    def check(self) -> dict[int, list[int]]:
        """Assert what holds of the table by itself; the slots in each state. Linear in slots."""
        slots = len(self.state)
        by_state: dict[int, list[int]] = {state: [] for state in (FREE, RESERVED, PUBLISHED, CONDEMNED, QUARANTINED)}
        for slot in range(slots):
            by_state[self.state[slot]].append(slot)
        assert sorted(self._free) == by_state[FREE]
        assert sorted(self.published.values()) == by_state[PUBLISHED]
        for slot in by_state[PUBLISHED]:
            block_hash = self.hash[slot]
            assert block_hash is not None
            assert self.published[block_hash] == slot
        for slot in range(slots):
            assert (self.lease_count[slot] > 0) <= (self.state[slot] in (PUBLISHED, CONDEMNED))
        assert all(self.lease_count[slot] > 0 for slot in by_state[CONDEMNED])
        assert self.bytes_published == sum(self.size[slot] for slot in by_state[PUBLISHED])
        groups = range(len(self.tenants))
        self.victims.check([[slot for slot in by_state[PUBLISHED] if self.group[slot] == group] for group in groups])
        counted = (*by_state[PUBLISHED], *by_state[RESERVED])
        for group in groups:
            assert self.tenants.used(group) == sum(self.group[slot] == group for slot in counted)
        for slot in counted:
            assert self.group[slot] == self.tenants.group(TenantKey(self.tenant[slot]))
        return by_state

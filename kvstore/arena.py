"""Who may write, see, read and evict each slot of a node's memory. Pure: the shell moves bytes and tells the time.

A slot's life::

    FREE --reserve--> RESERVED --publish--> PUBLISHED --evict, revoke--> FREE
                         |                      '--revoke under a lease--> CONDEMNED --last lease ends--> FREE
                         '--expired, owner gone, corrupt--> QUARANTINED --late_write_s--> FREE

A block is visible exactly while it is PUBLISHED. ``now_s`` must never go back.
"""

from array import array
from collections import deque
from collections.abc import Sequence

from kvstore.config import StoreConfig
from kvstore.eviction import Recency
from kvstore.holds import HeldLease, Leases, Reservation, Reservations
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId, SlotGeneration
from tracehaul.wire.messages import (
    BlockSpec,
    Full,
    InFlight,
    Leased,
    LeasedBlock,
    Present,
    Publication,
    PublishOutcome,
    Removed,
    Slot,
    Stored,
    TooLarge,
)

FREE, RESERVED, PUBLISHED, CONDEMNED, QUARANTINED = range(5)

ReserveOutcome = Slot | Present | InFlight | Full | TooLarge

_PRESENT, _FULL, _TOO_LARGE = Present(), Full(), TooLarge()


class Arena:
    """Fixed slots over one region: reservations, visibility, leases, eviction.

    Every change of visibility is appended to ``changes``, in order; the shell takes them with
    :meth:`take_changes`. Costs are O(1) amortized per block, about 200 bytes of index per published block.
    """

    def __init__(self, config: StoreConfig) -> None:
        slots = config.slots_max
        self._config = config
        self._now_s = 0.0
        # By slot.
        self._state = bytearray(slots)
        self._generation = array("Q", bytes(8 * slots))
        self._checksum = array("Q", bytes(8 * slots))
        self._size = array("I", bytes(4 * slots))
        self._lease_count = array("I", bytes(4 * slots))
        self._child_count = array("I", bytes(4 * slots))
        self._hash: list[BlockHash | None] = [None] * slots
        self._parent: list[BlockHash | None] = [None] * slots
        self._free = array("I", range(slots - 1, -1, -1))
        self._recency = Recency(slots)
        # By hash.
        self._published: dict[BlockHash, int] = {}
        self._child_count_absent: dict[BlockHash, int] = {}  # of parents that are not published here
        # By time and by holder.
        self._reservations = Reservations(config.reservation_ttl_s)
        self._leases = Leases()
        self._quarantine: deque[tuple[float, int]] = deque()  # (until_s, slot), in order
        self._changes: list[Stored | Removed] = []
        self.evicted = 0
        self.bytes_published = 0

    # --- what is there ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Published blocks."""
        return len(self._published)

    @property
    def slots_free(self) -> int:
        """Slots that can be reserved without evicting anything."""
        return len(self._free)

    @property
    def slots_quarantined(self) -> int:
        """Slots resting until no late write can land in them."""
        return len(self._quarantine)

    @property
    def leases(self) -> int:
        """Open leases."""
        return len(self._leases)

    @property
    def reservations(self) -> int:
        """Open reservations."""
        return len(self._reservations)

    def exists(self, hashes: Sequence[BlockHash]) -> bytes:
        """One byte per hash: 1 where it is published. A hint: no lease, no effect on eviction."""
        published = self._published
        return bytes([h in published for h in hashes])

    def published(self) -> tuple[BlockHash, ...]:
        """All visible hashes, oldest publish first: a snapshot as of the last change."""
        return tuple(self._published)

    def take_changes(self) -> list[Stored | Removed]:
        """The changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    # --- writing ------------------------------------------------------------------------------------------

    def reserve(self, blocks: Sequence[BlockSpec], owner: str, now_s: float) -> list[ReserveOutcome]:
        """Give ``owner`` a slot for each block that needs one; evicts as needed. One outcome per block, same order."""
        self.expire(now_s)
        return [self._reserve(block, owner, now_s) for block in blocks]

    def _reserve(self, block: BlockSpec, owner: str, now_s: float) -> ReserveOutcome:
        if not 0 < block.size_bytes <= self._config.slot_bytes:
            return _TOO_LARGE
        slot = self._published.get(block.hash)
        if slot is not None:
            self._recency.touch(slot)
            return _PRESENT
        if (reservation := self._reservations.get(block.hash)) is not None:
            return InFlight(since_s=now_s - reservation.since_s)
        if self._reservations.count(owner) >= self._config.reservations_max:
            return _FULL
        parent = self._same_object(block.parent)
        self._add_child(parent)  # before taking a slot: the prefix must not make room for its own continuation
        slot = self._take_slot()
        if slot is None:
            self._drop_child(parent)
            return _FULL
        self._state[slot] = RESERVED
        self._generation[slot] += 1
        self._size[slot] = block.size_bytes
        self._reservations.add(Reservation(slot, block.hash, parent, owner, now_s))
        return Slot(slot * self._config.slot_bytes, SlotGeneration(self._generation[slot]))

    def landing(self, block: Publication, owner: str) -> tuple[int, int] | None:
        """Offset and size of the bytes that a publish of ``block`` would show; None if there is no such reservation."""
        reservation = self._find(block.hash, block.generation, owner)
        if reservation is None:
            return None
        return reservation.slot * self._config.slot_bytes, self._size[reservation.slot]

    def publish(self, blocks: Sequence[Publication], owner: str, now_s: float) -> list[PublishOutcome]:
        """Make blocks visible whose bytes the caller has verified. Repeating a publish is harmless."""
        self.expire(now_s)
        return [self._publish(block, owner) for block in blocks]

    def _publish(self, block: Publication, owner: str) -> PublishOutcome:
        reservation = self._find(block.hash, block.generation, owner)
        if reservation is None:
            slot = self._published.get(block.hash)
            same = slot is not None and (self._generation[slot], self._checksum[slot]) == (
                block.generation,
                block.checksum,
            )
            return "published" if same else "fenced"
        slot = reservation.slot
        self._reservations.end(reservation)
        self._state[slot] = PUBLISHED
        self._checksum[slot] = block.checksum
        self._hash[slot] = reservation.hash
        self._parent[slot] = reservation.parent
        self._child_count[slot] = self._child_count_absent.pop(reservation.hash, 0)
        self._published[reservation.hash] = slot
        self._recency.touch(slot)
        self.bytes_published += self._size[slot]
        self._changes.append(Stored(reservation.hash))
        return "published"

    def abandon(self, blocks: Sequence[tuple[BlockHash, SlotGeneration]], owner: str) -> None:
        """Free reservations whose owner says that no write of its is under way. Unknown ones are ignored."""
        for block_hash, generation in blocks:
            reservation = self._find(block_hash, generation, owner)
            if reservation is not None:
                self._reservations.end(reservation)
                self._drop_child(reservation.parent)
                self._free_slot(reservation.slot)

    def withdraw(self, block_hash: BlockHash, generation: SlotGeneration, owner: str, now_s: float) -> None:
        """End a reservation in quarantine: what is in its slot is wrong, or may yet change. Harmless if gone."""
        reservation = self._find(block_hash, generation, owner)
        if reservation is not None:
            self._quarantine_reservation(reservation, now_s)

    # --- reading ------------------------------------------------------------------------------------------

    def lease(self, hashes: Sequence[BlockHash], holder: str, ttl_s: float, now_s: float) -> Leased | None:
        """Protect what is published of ``hashes`` for ``ttl_s``, capped. None: the holder has too many leases."""
        self.expire(now_s)
        if self._leases.count(holder) >= self._config.leases_max:
            return None
        lease = self._leases.next_id()
        ttl_s = min(ttl_s, self._config.lease_ttl_max_s)
        slots = array("I")
        blocks = tuple([self._lease_block(block_hash, slots) for block_hash in hashes])
        for slot in reversed(slots):  # so that among equals the end of a sequence goes before its start
            self._recency.touch(slot)
        if slots and ttl_s > 0:
            self._leases.add(lease, HeldLease(holder, now_s + ttl_s, slots))
        else:
            self._end_protection(slots)
        return Leased(lease, blocks, ttl_s)

    def _lease_block(self, block_hash: BlockHash, slots: "array[int]") -> LeasedBlock | None:
        slot = self._published.get(block_hash)
        if slot is None:
            return None
        self._lease_count[slot] += 1
        slots.append(slot)
        return LeasedBlock(
            slot * self._config.slot_bytes,
            self._size[slot],
            SlotGeneration(self._generation[slot]),
            Checksum(self._checksum[slot]),
        )

    def hold(
        self, hashes: Sequence[BlockHash], holder: str, ttl_s: float, now_s: float
    ) -> tuple[LeaseId, list[tuple[LeasedBlock, BlockHash] | None]]:
        """As :meth:`lease`, but no use that eviction remembers, and without caps: for the node's own copying.

        Per hash the block and its parent.
        """
        self.expire(now_s)
        lease = self._leases.next_id()
        slots = array("I")
        found: list[tuple[LeasedBlock, BlockHash] | None] = []
        for block_hash in hashes:
            block = self._lease_block(block_hash, slots)
            parent = None if block is None else self._parent[slots[-1]]
            found.append(None if block is None or parent is None else (block, parent))
        if slots:
            self._leases.add(lease, HeldLease(holder, now_s + ttl_s, slots))
        return lease, found

    def release(self, lease: LeaseId, holder: str) -> None:
        """End a lease early. Unknown, ended and other holders' leases are ignored."""
        if self._leases.is_held(lease, holder):
            self._end_protection(self._leases.end(lease))

    def revoke(self, block_hash: BlockHash, generation: SlotGeneration) -> bool:
        """Drop a published block whose bytes are bad: invisible at once, its slot kept until its leases end.

        Returns whether this generation of it was published.
        """
        slot = self._published.get(block_hash)
        if slot is None or self._generation[slot] != generation:
            return False
        self._remove(slot)
        return True

    # --- time and loss ------------------------------------------------------------------------------------

    def next_deadline_s(self) -> float | None:
        """When :meth:`expire` next has something to do; None if nothing is pending."""
        quarantine_s = self._quarantine[0][0] if self._quarantine else None
        pending = (self._reservations.deadline_s(), self._leases.deadline_s(), quarantine_s)
        return min((deadline_s for deadline_s in pending if deadline_s is not None), default=None)

    def expire(self, now_s: float) -> None:
        """End every reservation, lease and quarantine whose time has come."""
        assert now_s >= self._now_s, "time went back"
        self._now_s = now_s
        for reservation in self._reservations.expired(now_s):
            self._quarantine_reservation(reservation, now_s)
        while (lease := self._leases.next_expired(now_s)) is not None:
            self._end_protection(self._leases.end(lease))
        while self._quarantine and self._quarantine[0][0] <= now_s:
            _, slot = self._quarantine.popleft()
            self._free_slot(slot)

    def disconnected(self, owner: str, now_s: float) -> None:
        """A connection is gone: its leases end now; its slots rest in quarantine, as its writes may still land."""
        self.expire(now_s)
        for lease in self._leases.of(owner):
            self._end_protection(self._leases.end(lease))
        for reservation in self._reservations.of(owner):
            self._quarantine_reservation(reservation, now_s)

    # --- slots --------------------------------------------------------------------------------------------

    def _take_slot(self) -> int | None:
        """A free slot, if need be by evicting; None if nothing can go."""
        if not self._free:
            victim = self._victim()
            if victim is None:
                return None
            self.evicted += 1
            self._remove(victim)
        return self._free.pop()

    def _victim(self) -> int | None:
        while (slot := self._recency.oldest()) is not None:
            if self._evictable(slot):
                return slot
            self._recency.remove(slot)  # parked until its last lease or continuation goes
        return None

    def _evictable(self, slot: int) -> bool:
        return self._state[slot] == PUBLISHED and not self._lease_count[slot] and not self._child_count[slot]

    def _unpark(self, slot: int) -> None:
        if slot not in self._recency and self._evictable(slot):
            self._recency.restore(slot)

    def _remove(self, slot: int) -> None:
        """Make a published block invisible; free its slot unless a lease still protects the bytes."""
        block_hash, parent = self._hash[slot], self._parent[slot]
        assert self._state[slot] == PUBLISHED
        assert block_hash is not None
        assert parent is not None
        del self._published[block_hash]
        self._recency.remove(slot)
        self.bytes_published -= self._size[slot]
        if self._child_count[slot]:
            self._child_count_absent[block_hash] = self._child_count[slot]
            self._child_count[slot] = 0
        self._hash[slot] = self._parent[slot] = None
        self._drop_child(parent)
        self._changes.append(Removed(block_hash))
        if self._lease_count[slot]:
            self._state[slot] = CONDEMNED
        else:
            self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        self._state[slot] = FREE
        self._free.append(slot)

    # --- reservations, leases, parents --------------------------------------------------------------------

    def _find(self, block_hash: BlockHash, generation: SlotGeneration, owner: str) -> Reservation | None:
        reservation = self._reservations.get(block_hash)
        if reservation is None or reservation.owner != owner or self._generation[reservation.slot] != generation:
            return None
        return reservation

    def _quarantine_reservation(self, reservation: Reservation, now_s: float) -> None:
        self._reservations.end(reservation)
        self._drop_child(reservation.parent)
        self._state[reservation.slot] = QUARANTINED
        self._quarantine.append((now_s + self._config.late_write_s, reservation.slot))

    def _end_protection(self, slots: "array[int]") -> None:
        for slot in slots:
            self._lease_count[slot] -= 1
            if self._lease_count[slot]:
                continue
            if self._state[slot] == CONDEMNED:
                self._free_slot(slot)
            else:
                self._unpark(slot)

    def _same_object(self, parent: BlockHash) -> BlockHash:
        """The equal hash that is already held, if any: 64 bytes saved per block."""
        slot = self._published.get(parent)
        if slot is not None:
            return self._hash[slot] or parent
        reservation = self._reservations.get(parent)
        return reservation.hash if reservation is not None else parent

    def _add_child(self, parent: BlockHash) -> None:
        slot = self._published.get(parent)
        if slot is not None:
            self._child_count[slot] += 1
        else:
            self._child_count_absent[parent] = self._child_count_absent.get(parent, 0) + 1

    def _drop_child(self, parent: BlockHash) -> None:
        slot = self._published.get(parent)
        if slot is not None:
            self._child_count[slot] -= 1
            self._unpark(slot)
            return
        count = self._child_count_absent.pop(parent) - 1
        if count:
            self._child_count_absent[parent] = count

    # --- invariants ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant of the index against each other. Linear in slots: for tests and debugging."""
        slots = self._config.slots_max
        by_state: dict[int, list[int]] = {state: [] for state in (FREE, RESERVED, PUBLISHED, CONDEMNED, QUARANTINED)}
        for slot in range(slots):
            by_state[self._state[slot]].append(slot)
        assert sorted(self._free) == by_state[FREE]
        assert sorted(slot for _, slot in self._quarantine) == by_state[QUARANTINED]
        assert sorted(r.slot for r in self._reservations.all()) == by_state[RESERVED]
        assert sorted(self._published.values()) == by_state[PUBLISHED]
        assert not any(r.hash in self._published for r in self._reservations.all())
        leases = [0] * slots
        for held in self._leases.all():
            for slot in held.slots:
                leases[slot] += 1
        assert leases == self._lease_count.tolist()
        assert all((leases[slot] > 0) <= (self._state[slot] in (PUBLISHED, CONDEMNED)) for slot in range(slots))
        assert all(leases[slot] > 0 for slot in by_state[CONDEMNED])
        self._check_families()
        order = self._recency.order()
        assert set(order) <= set(by_state[PUBLISHED])
        for slot in by_state[PUBLISHED]:
            assert slot in self._recency or not self._evictable(slot), "an evictable block would never be found"
        assert self.bytes_published == sum(self._size[slot] for slot in by_state[PUBLISHED])
        deadline_s = self.next_deadline_s()
        assert deadline_s is None or deadline_s > self._now_s

    def _check_families(self) -> None:
        children: dict[BlockHash, int] = {}
        for block_hash, slot in self._published.items():
            parent = self._parent[slot]
            assert self._hash[slot] == block_hash
            assert parent is not None
            children[parent] = children.get(parent, 0) + 1
        for reservation in self._reservations.all():
            children[reservation.parent] = children.get(reservation.parent, 0) + 1
        for slot, count in enumerate(self._child_count):
            block_hash = self._hash[slot]
            assert count == (0 if block_hash is None else children.pop(block_hash, 0))
        assert self._child_count_absent == children

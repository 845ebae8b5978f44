"""Who may write, see, read and evict each slot of a node's memory. Pure: the shell moves bytes and tells the time.

A slot's life::

    FREE --reserve--> RESERVED --publish--> PUBLISHED --evict, revoke--> FREE
                         |                      '--revoke under a lease--> CONDEMNED --last lease ends--> FREE
                         '--expired, owner gone, corrupt--> QUARANTINED --late_write_s--> FREE

A block is visible exactly while it is PUBLISHED. ``now_s`` must never go back.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvstore.config import StoreConfig
from kvstore.eviction import LeastRecent, Policy
from kvstore.families import Families
from kvstore.holds import HeldLease, Leases, Reservation, Reservations
from kvstore.keeping import Keeping
from kvstore.pin_records import KeptPin
from kvstore.pins import HeldPin, PinKey
from kvstore.tenants import TenantKey, Tenants, tenant_key
from kvstore.victims import Victims
from tracehaul.wire.blocks import (
    BlockSpec,
    Full,
    InFlight,
    Leased,
    LeasedBlock,
    Pin,
    PinInfo,
    Pinned,
    Present,
    Publication,
    PublishOutcome,
    Removed,
    Slot,
    Stored,
    TooLarge,
)
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId, SlotGeneration, TraceId
from tracehaul.wire.operations import TenantUsage

FREE, RESERVED, PUBLISHED, CONDEMNED, QUARANTINED = range(5)

ReserveOutcome = Slot | Present | InFlight | Full | TooLarge
_PRESENT, _FULL, _TOO_LARGE = Present(), Full(), TooLarge()


class Below(Protocol):
    """What keeps blocks below an arena."""

    def is_behind(self, block_hash: BlockHash) -> bool:
        """Whether a block of the arena has yet to be taken: evicted now, it would be gone."""
        ...

    def size_of(self, block_hash: BlockHash) -> int:
        """Bytes of a block that is kept; 0 if it is not."""
        ...

    def repinned(self, hashes: Iterable[BlockHash]) -> None:
        """What pins say of these has changed."""
        ...


class Arena:
    """Fixed slots over one region: reservations, visibility, leases, pins, quotas, eviction.

    Every change of visibility and every end of a reservation is kept, in order, until the shell takes it with
    :meth:`take_changes` and :meth:`take_ended`. Costs are O(1) amortized per block, about 200 bytes of index per
    published block. ``policy`` is for comparing others with the default.
    """

    def __init__(self, config: StoreConfig, policy: Policy | None = None) -> None:
        slots = config.slots_max
        self._config = config
        self._now_s = 0.0
        # By slot.
        self._state = bytearray(slots)
        self._generation = array("Q", bytes(8 * slots))
        self._generation_last = 0  # of all slots: a late message about one grant must not fit another
        self._checksum = array("Q", bytes(8 * slots))
        self._size = array("I", bytes(4 * slots))
        self._lease_count = array("I", bytes(4 * slots))
        self._group = array("H", bytes(2 * slots))
        self._tenant = array("Q", bytes(8 * slots))
        self._hash: list[BlockHash | None] = [None] * slots
        self._free = array("I", range(slots - 1, -1, -1))
        # By hash.
        self._published: dict[BlockHash, int] = {}
        self._families = Families(slots, self._published)
        # By time and by holder.
        self._reservations = Reservations(config.reservation_ttl_s)
        self._leases = Leases()
        self._quarantine: deque[tuple[float, int]] = deque()  # (until_s, slot), in order
        self._scratch: dict[BlockHash, str] = {}  # reserved or published for a measurement: by whom
        # Who gives way.
        self._tenants = Tenants(config.quota_bytes, config.slot_bytes, slots)
        self._keeping = Keeping(config, self._published, self._families, self._repinned, self._size_of)
        self._pins = self._keeping.pins
        policy = policy or LeastRecent(slots, len(self._tenants))
        self._victims = Victims(self._tenants, policy, self._rank, self._is_idle)
        self._below: Below | None = None
        self._changes: list[Stored | Removed] = []
        self._ended: list[BlockHash] = []
        self.evicted = 0
        self.passed_on = 0
        """Reservations that a second writer took over from a silent first one."""
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

    @property
    def pins(self) -> int:
        """Open pins."""
        return len(self._pins)

    @property
    def softened(self) -> int:
        """Hard pins that outgrew their limits since the node's start."""
        return self._keeping.softened

    @property
    def hard_pinned(self) -> int:
        """Blocks that hard pins cover, there or not; one that two of them cover counts twice."""
        return self._pins.hard

    def usage(self) -> list[TenantUsage]:
        """What each group of tenants takes of its quota, the shared one first."""
        slot_bytes, tenants = self._config.slot_bytes, self._tenants  # metrics read this from another thread
        return [
            TenantUsage(name, tenants.quota(group) * slot_bytes, tenants.used(group) * slot_bytes)
            for group, name in enumerate(tenants.names)
        ]

    def quota_shares(self) -> dict[str, float]:
        """The part of the arena that each tenant with a quota is sure of."""
        return {tenant: quota / self._config.arena_bytes for tenant, quota in self._config.quota_bytes.items()}

    def rank(self, block_hash: BlockHash) -> float | None:
        """What pins say of a block, here or not: None where none covers it, else its rank in eviction."""
        return self._pins.rank(block_hash)

    def stand_over(self, below: "Below") -> None:
        """What is evicted here may be kept there from now on. At most once."""
        assert self._below is None

        def spared(slot: int) -> bool:
            block_hash = self._hash[slot]
            return block_hash is not None and below.is_behind(block_hash)

        self._below = below
        self._victims.is_spared = spared

    def bytes_used(self, tenant: str) -> int:
        """What counts against a tenant's quota; tenants without one count together."""
        return self._tenants.used(self._tenants.group(tenant_key(tenant))) * self._config.slot_bytes

    def is_reserved(self, block_hash: BlockHash) -> bool:
        """Whether it has an open reservation."""
        return self._reservations.get(block_hash) is not None

    def quiet_at_s(self, block_hash: BlockHash) -> float | None:
        """When its reservation passes on to whoever asks, if its owner is not heard of until then; None without one.

        In the past: nobody is known to be writing it.
        """
        reservation = self._reservations.get(block_hash)
        if reservation is None:
            return None
        return self._reservations.heard_s(reservation) + self._config.reservation_quiet_s

    def exists(self, hashes: Sequence[BlockHash]) -> bytes:
        """One byte per hash: 1 where it is published. A hint: no lease, no effect on eviction."""
        published = self._published
        return bytes([h in published for h in hashes])

    def spec(self, block_hash: BlockHash) -> BlockSpec | None:
        """A published block's size and parent."""
        slot = self._published.get(block_hash)
        return None if slot is None else BlockSpec(block_hash, self._families.parent(slot), self._size[slot])

    def published(self) -> tuple[BlockHash, ...]:
        """All visible hashes but scratch ones, oldest publish first: a snapshot as of the last change."""
        if self._scratch:
            return tuple([block_hash for block_hash in self._published if block_hash not in self._scratch])
        return tuple(self._published)

    def take_changes(self) -> list[Stored | Removed]:
        """The changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def take_ended(self) -> list[BlockHash]:
        """Blocks whose reservation ended since the last call, published or not, in order."""
        ended, self._ended = self._ended, []
        return ended

    # --- writing ------------------------------------------------------------------------------------------

    def reserve(
        self,
        blocks: Sequence[BlockSpec],
        owner: str,
        now_s: float,
        tenant: str | int = "",
        *,
        scratch: bool = False,
    ) -> list[ReserveOutcome]:
        """Give ``owner`` a slot for each block that needs one, on ``tenant``'s account; evicts as needed.

        One outcome per block, same order. ``scratch`` blocks get free slots only, are the first to give way, are no
        change that anybody is told of, and go with their owner's connection.
        """
        self.expire(now_s)
        key = tenant_key(tenant)
        return [self._reserve(block, owner, key, now_s, scratch) for block in blocks]

    def readmit(
        self, blocks: Sequence[BlockSpec], tenants: Sequence[TenantKey], owner: str, now_s: float
    ) -> list[ReserveOutcome]:
        """As :meth:`reserve`, for blocks that come from a tier or another node: each on the account that it was on."""
        self.expire(now_s)
        return [self._reserve(block, owner, key, now_s, False) for block, key in zip(blocks, tenants, strict=True)]

    def _reserve(self, block: BlockSpec, owner: str, tenant: TenantKey, now_s: float, scratch: bool) -> ReserveOutcome:
        if not 0 < block.size_bytes <= self._config.slot_bytes:
            return _TOO_LARGE
        slot = self._published.get(block.hash)
        if slot is not None:
            self._victims.touch(slot, self._group[slot])
            return _PRESENT
        quiet = self._reservations.get(block.hash)
        if quiet is not None and self._reservations.heard_s(quiet) + self._config.reservation_quiet_s > now_s:
            return InFlight(now_s - quiet.since_s, quiet.owner)
        if self._reservations.count(owner) >= self._config.reservations_max:
            return _FULL
        parent = self._same_object(block.parent)
        if self._families.closes_cycle(block.hash, parent, self._reservations.parent_of):
            return _FULL
        self._families.expect(parent)  # before taking a slot: the prefix must not make room for its own continuation
        group = self._tenants.group(tenant)
        slot = self._take_slot(group) if self._free or not scratch else None
        if slot is None:
            self._forget_child(parent)
            return _FULL
        if quiet is not None:  # its owner may yet write, and is fenced
            self._quarantine_reservation(quiet, now_s)
            self.passed_on += 1
        if scratch:
            self._scratch[block.hash] = owner
        self._state[slot] = RESERVED
        self._generation_last += 1
        self._generation[slot] = self._generation_last
        self._size[slot] = block.size_bytes
        self._group[slot] = group
        self._tenant[slot] = tenant
        self._tenants.take(group)
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
        self._end_reservation(reservation)
        self._state[slot] = PUBLISHED
        self._checksum[slot] = block.checksum
        self._hash[slot] = reservation.hash
        self._families.publish(slot, reservation.hash, reservation.parent)
        self._published[reservation.hash] = slot
        self._victims.add(slot, self._group[slot], reservation.hash)
        self.bytes_published += self._size[slot]
        if reservation.hash not in self._scratch:
            self._changes.append(Stored(reservation.hash))
        if len(self._pins):
            self._keeping.arrived(reservation.hash, self._now_s)
        return "published"

    def abandon(self, blocks: Sequence[tuple[BlockHash, SlotGeneration]], owner: str) -> None:
        """Free reservations whose owner says that no write of its is under way. Unknown ones are ignored."""
        for block_hash, generation in blocks:
            reservation = self._find(block_hash, generation, owner)
            if reservation is not None:
                self._end_reservation(reservation)
                self._scratch.pop(block_hash, None)
                self._forget_child(reservation.parent)
                self._tenants.give(self._group[reservation.slot])
                self._free_slot(reservation.slot)

    def renew(self, blocks: Sequence[tuple[BlockHash, SlotGeneration]], owner: str, now_s: float) -> None:
        """The owner still writes these reservations. It moves no end. Unknown ones are ignored."""
        self.expire(now_s)
        for block_hash, generation in blocks:
            reservation = self._find(block_hash, generation, owner)
            if reservation is not None:
                self._reservations.renew(reservation, now_s)

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
            self._victims.touch(slot, self._group[slot])
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
    ) -> tuple[LeaseId, list[tuple[LeasedBlock, BlockHash, TenantKey] | None]]:
        """As :meth:`lease`, but no use that eviction remembers, and without caps: for the node's own copying.

        Per hash the block, its parent and whose it is.
        """
        self.expire(now_s)
        lease = self._leases.next_id()
        slots = array("I")
        found: list[tuple[LeasedBlock, BlockHash, TenantKey] | None] = []
        for block_hash in hashes:
            block = self._lease_block(block_hash, slots)
            if block is None:
                found.append(None)
            else:
                found.append((block, self._families.parent(slots[-1]), TenantKey(self._tenant[slots[-1]])))
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

    # --- keeping ------------------------------------------------------------------------------------------

    def pin(self, request: Pin, now_s: float) -> Pinned | str:
        """Keep blocks, and what is published of their prefixes. Returns why not, with nothing changed, if refused."""
        self.expire(now_s)
        pinned = self._keeping.pin(request, now_s)
        self.expire(now_s)  # of no priority, it has ended already
        return pinned

    def unpin(self, tenant: str, trace: TraceId) -> None:
        """End a trace's pin. Harmless if there is none."""
        self._keeping.unpin((tenant, trace))

    def repin(self, kept: KeptPin, now_s: float) -> str | None:
        """Take over what is left of a pin of the node's former life; returns why not, or None."""
        self.expire(now_s)
        return self._keeping.repin(kept, now_s)

    def pin_of(self, key: PinKey) -> HeldPin | None:
        """A trace's open pin."""
        return self._pins.get(key)

    def pins_of(self, block_hash: BlockHash) -> list[PinKey]:
        """The pins that cover a block."""
        return self._pins.keys(block_hash)

    def open_pins(self, now_s: float) -> list[tuple[PinKey, HeldPin]]:
        """All, the first to end first."""
        self.expire(now_s)
        return self._pins.all()

    def list_pins(self, tenant: str | None, now_s: float) -> list[PinInfo]:
        """Open pins, of one tenant or all, the first to end first. Linear in what they cover."""
        self.expire(now_s)
        return [self._keeping.info(key, now_s) for key, _ in self._pins.all() if tenant in (None, key[0])]

    def _size_of(self, block_hash: BlockHash) -> int:
        slot = self._published.get(block_hash)
        if slot is not None:
            return self._size[slot]
        return 0 if self._below is None else self._below.size_of(block_hash)

    def _repinned(self, hashes: Iterable[BlockHash]) -> None:
        """What pins say of these blocks has changed."""
        for block_hash in hashes:
            slot = self._published.get(block_hash)
            if slot is not None:
                self._victims.reconsider(slot, self._group[slot])
        if self._below is not None:
            self._below.repinned(hashes)

    # --- limits -------------------------------------------------------------------------------------------

    def reconfigure(self, config: StoreConfig, now_s: float) -> str | None:
        """Other limits from now on. Returns why not, with nothing changed, where what is held now exceeds them.

        What is only asked for later (leases, reservations) may exceed them until it ends. Sizes cannot change.
        Linear in slots if quotas change: what a tenant wrote before counts on its new account from now on, and blocks
        of a tenant that loses its quota as more recently used than the others of the shared one.
        """
        before = self._config
        assert (config.arena_bytes, config.slot_bytes) == (before.arena_bytes, before.slot_bytes)
        assert config.late_write_s >= before.late_write_s, "slots at rest were promised their time"
        self.expire(now_s)
        refusal = self._pins.reconfigure(config)
        if refusal is not None:
            return refusal
        self._config = config
        if config.quota_bytes != before.quota_bytes:
            self._regroup(Tenants(config.quota_bytes, config.slot_bytes, config.slots_max))
        self._reservations.set_ttl(config.reservation_ttl_s)
        self.expire(now_s)
        return None

    def _regroup(self, tenants: Tenants) -> None:
        for slot, state in enumerate(self._state):
            self._group[slot] = tenants.group(TenantKey(self._tenant[slot]))
            if state in (RESERVED, PUBLISHED):
                tenants.take(self._group[slot])
        self._tenants = tenants
        self._victims.regroup(tenants, LeastRecent(len(self._state), len(tenants)), self._group)

    # --- time and loss ------------------------------------------------------------------------------------

    def next_deadline_s(self) -> float | None:
        """When :meth:`expire` next has something to do; None if nothing is pending."""
        quarantine_s = self._quarantine[0][0] if self._quarantine else None
        pending = (self._reservations.deadline_s(), self._leases.deadline_s(), self._pins.deadline_s(), quarantine_s)
        return min((deadline_s for deadline_s in pending if deadline_s is not None), default=None)

    def expire(self, now_s: float) -> None:
        """End every reservation, lease, pin and quarantine whose time has come."""
        assert now_s >= self._now_s, "time went back"
        self._now_s = now_s
        for reservation in self._reservations.expired(now_s):
            self._quarantine_reservation(reservation, now_s)
        while (lease := self._leases.next_expired(now_s)) is not None:
            self._end_protection(self._leases.end(lease))
        self._keeping.expire(now_s)
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
        for block_hash in [block_hash for block_hash, by in self._scratch.items() if by == owner]:
            self._remove(self._published[block_hash])  # reserved ones were ended just now

    # --- slots --------------------------------------------------------------------------------------------

    def _take_slot(self, group: int) -> int | None:
        """A free slot, if need be by evicting; None if nothing can go."""
        if not self._free:
            victim = self._scratch_victim()
            if victim is None:
                victim = self._victims.choose(group)
                if victim is None:
                    return None
                self.evicted += 1
            self._remove(victim)
        return self._free.pop()

    def _scratch_victim(self) -> int | None:
        for block_hash in reversed(self._scratch):
            slot = self._published.get(block_hash)
            if slot is not None and self._is_idle(slot):
                return slot
        return None

    def _is_idle(self, slot: int) -> bool:
        return self._state[slot] == PUBLISHED and not self._lease_count[slot] and not self._families.is_parent(slot)

    def _rank(self, slot: int) -> float | None:
        block_hash = self._hash[slot]
        return None if block_hash is None else self._pins.rank(block_hash)

    def _unpark(self, slot: int) -> None:
        self._victims.let_go(slot, self._group[slot])

    def _remove(self, slot: int) -> None:
        """Make a published block invisible; free its slot unless a lease still protects the bytes."""
        block_hash = self._hash[slot]
        assert self._state[slot] == PUBLISHED
        assert block_hash is not None
        del self._published[block_hash]
        self._victims.remove(slot)
        self._tenants.give(self._group[slot])
        self.bytes_published -= self._size[slot]
        parent_slot = self._families.remove(slot, block_hash)
        self._hash[slot] = None
        if parent_slot is not None:
            self._unpark(parent_slot)
        if self._scratch.pop(block_hash, None) is None:
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

    def _end_reservation(self, reservation: Reservation) -> None:
        self._reservations.end(reservation)
        self._ended.append(reservation.hash)

    def _quarantine_reservation(self, reservation: Reservation, now_s: float) -> None:
        """The block may be reserved anew at once; its slot rests."""
        self._end_reservation(reservation)
        self._scratch.pop(reservation.hash, None)
        self._forget_child(reservation.parent)
        self._tenants.give(self._group[reservation.slot])
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

    def _forget_child(self, parent: BlockHash) -> None:
        slot = self._families.forget(parent)
        if slot is not None:
            self._unpark(slot)

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
        self._families.check([(r.hash, r.parent) for r in self._reservations.all()])
        for slot in by_state[PUBLISHED]:
            block_hash = self._hash[slot]
            assert block_hash is not None
            assert self._published[block_hash] == slot
        self._check_eviction(by_state[PUBLISHED], by_state[RESERVED])
        assert all(h in self._published or self.is_reserved(h) for h in self._scratch)
        assert self.bytes_published == sum(self._size[slot] for slot in by_state[PUBLISHED])
        deadline_s = self.next_deadline_s()
        assert deadline_s is None or deadline_s > self._now_s

    def _check_eviction(self, published: Sequence[int], reserved: Sequence[int]) -> None:
        self._pins.check()
        groups = range(len(self._tenants))
        self._victims.check([[slot for slot in published if self._group[slot] == group] for group in groups])
        for group in groups:
            assert self._tenants.used(group) == sum(self._group[slot] == group for slot in (*published, *reserved))
        for slot in (*published, *reserved):
            assert self._group[slot] == self._tenants.group(TenantKey(self._tenant[slot]))

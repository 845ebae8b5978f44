"""Who may write, see, read and evict each slot of a node's memory. Pure: the shell moves bytes and tells the time.

A slot's life::

    FREE --reserve--> RESERVED --publish--> PUBLISHED --evict, revoke--> FREE
                         |                      '--revoke under a lease--> CONDEMNED --last lease ends--> FREE
                         '--expired, owner gone, corrupt--> QUARANTINED --late_write_s--> FREE

A block is visible exactly while it is PUBLISHED. ``now_s`` must never go back.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvstore.config import StoreConfig
from kvstore.index.eviction import Policy
from kvstore.index.holds import Grant
from kvstore.index.keeping import Keeping
from kvstore.index.pin_records import KeptPin
from kvstore.index.pins import HeldPin, PinKey, Pins
from kvstore.index.reading import HeldBlock, Reading
from kvstore.index.slot_table import QUARANTINED, RESERVED, SlotTable
from kvstore.index.tenants import TenantKey, Tenants, tenant_key
from kvstore.index.writing import ReserveOutcome, Writing
from tracehaul.wire.blocks import (
    BlockSpec,
    Leased,
    Pin,
    PinInfo,
    Pinned,
    Publication,
    PublishOutcome,
    Removed,
    Stored,
)
from tracehaul.wire.ids import BlockHash, LeaseId, SlotGeneration, TraceId
from tracehaul.wire.operations import TenantUsage


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
        self.config = config
        """The limits in force; changed by :meth:`reconfigure`."""
        self._now_s = 0.0
        self._pins = Pins(config)
        tenants = Tenants(config.quota_bytes, config.slot_bytes, config.slots_max)
        self.table = SlotTable(config.slots_max, config.slot_bytes, tenants, policy, self._pins)
        """Its slots; nobody else changes them."""
        self._keeping = Keeping(
            self._pins, self.table.published, self.table.continuations, self._repinned, self._size_of
        )
        self._writing = Writing(config, self.table, self._keeping)
        self._reading = Reading(config, self.table)
        self.quiet_at_s = self._writing.quiet_at_s
        self._below: Below | None = None

    # --- what is there ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Published blocks."""
        return len(self.table.published)

    @property
    def slots_free(self) -> int:
        """Slots that can be reserved without evicting anything."""
        return self.table.free

    @property
    def evicted(self) -> int:
        """Blocks that gave way to others."""
        return self.table.evicted

    @property
    def bytes_published(self) -> int:
        """What the published blocks take."""
        return self.table.bytes_published

    @property
    def slots_quarantined(self) -> int:
        """Slots resting until no late write can land in them."""
        return len(self._writing.quarantine)

    @property
    def leases(self) -> int:
        """Open leases."""
        return len(self._reading)

    @property
    def reservations(self) -> int:
        """Open reservations."""
        return len(self._writing.reservations)

    @property
    def passed_on(self) -> int:
        """Reservations that a second writer took over from a silent first one."""
        return self._writing.passed_on

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
        slot_bytes, tenants = self.config.slot_bytes, self.table.tenants  # metrics read this from another thread
        return [
            TenantUsage(name, tenants.quota(group) * slot_bytes, tenants.used(group) * slot_bytes)
            for group, name in enumerate(tenants.names)
        ]

    def quota_shares(self) -> dict[str, float]:
        """The part of the arena that each tenant with a quota is sure of."""
        return {tenant: quota / self.config.arena_bytes for tenant, quota in self.config.quota_bytes.items()}

    def rank(self, block_hash: BlockHash) -> float | None:
        """What pins say of a block, here or not: None where none covers it, else its rank in eviction."""
        return self._pins.rank(block_hash)

    def stand_over(self, below: "Below") -> None:
        """What is evicted here may be kept there from now on. At most once."""
        assert self._below is None

        def spared(slot: int) -> bool:
            block_hash = self.table.hash[slot]
            return block_hash is not None and below.is_behind(block_hash)

        self._below = below
        self.table.victims.is_spared = spared

    def bytes_used(self, tenant: str) -> int:
        """What counts against a tenant's quota; tenants without one count together."""
        tenants = self.table.tenants
        return tenants.used(tenants.group(tenant_key(tenant))) * self.config.slot_bytes

    def exists(self, hashes: Sequence[BlockHash]) -> bytes:
        """One byte per hash: 1 where it is published. A hint: no lease, no effect on eviction."""
        published = self.table.published
        return bytes([h in published for h in hashes])

    def spec(self, block_hash: BlockHash) -> BlockSpec | None:
        """A published block's size and parent."""
        table = self.table
        slot = table.published.get(block_hash)
        return None if slot is None else BlockSpec(block_hash, table.continuations.parent(slot), table.size[slot])

    def published(self) -> tuple[BlockHash, ...]:
        """All visible hashes, oldest publish first: a snapshot as of the last change."""
        return tuple(self.table.published)

    def take_changes(self) -> list[Stored | Removed]:
        """The changes since the last call, in order."""
        changes, self.table.changes = self.table.changes, []
        return changes

    def take_ended(self) -> list[BlockHash]:
        """Blocks whose reservation ended since the last call, published or not, in order."""
        return self._writing.take_ended()

    # --- writing ------------------------------------------------------------------------------------------

    def reserve(
        self,
        blocks: Sequence[BlockSpec],
        owner: str,
        now_s: float,
        tenant: str | int = "",
    ) -> list[ReserveOutcome]:
        """Give ``owner`` a slot for each block that needs one, on ``tenant``'s account; evicts as needed.

        One outcome per block, same order.
        """
        self.expire(now_s)
        return self._writing.reserve(blocks, Grant(owner, now_s), tenant_key(tenant))

    def readmit(
        self, blocks: Sequence[BlockSpec], tenants: Sequence[TenantKey], owner: str, now_s: float
    ) -> list[ReserveOutcome]:
        """As :meth:`reserve`, for blocks that come from a tier or another node: each on the account that it was on."""
        self.expire(now_s)
        grant, reserve_one = Grant(owner, now_s), self._writing.reserve_one
        return [reserve_one(block, grant, key) for block, key in zip(blocks, tenants, strict=True)]

    def publish(self, blocks: Sequence[Publication], owner: str, now_s: float) -> list[PublishOutcome]:
        """Make blocks visible whose bytes the caller has verified. Repeating a publish is harmless."""
        self.expire(now_s)
        return self._writing.publish(blocks, owner, now_s)

    def landing(self, block: Publication, owner: str) -> tuple[int, int] | None:
        """Offset and size of the bytes that a publish of ``block`` would show; None if there is no such reservation."""
        return self._writing.landing(block, owner)

    def abandon(self, blocks: Sequence[tuple[BlockHash, SlotGeneration]], owner: str) -> None:
        """Free reservations whose owner says that no write of its is under way. Unknown ones are ignored."""
        self._writing.abandon(blocks, owner)

    def renew(self, blocks: Sequence[tuple[BlockHash, SlotGeneration]], owner: str, now_s: float) -> None:
        """The owner still writes these reservations. It moves no end. Unknown ones are ignored."""
        self.expire(now_s)
        self._writing.renew(blocks, owner, now_s)

    def withdraw(self, block_hash: BlockHash, generation: SlotGeneration, owner: str, now_s: float) -> None:
        """End a reservation in quarantine: what is in its slot is wrong, or may yet change. Harmless if gone."""
        self._writing.withdraw(block_hash, generation, owner, now_s)

    # --- reading ------------------------------------------------------------------------------------------

    def lease(self, hashes: Sequence[BlockHash], holder: str, ttl_s: float, now_s: float) -> Leased | None:
        """Protect what is published of ``hashes`` for ``ttl_s``, capped. None: the holder has too many leases."""
        self.expire(now_s)
        return self._reading.lease(hashes, holder, ttl_s, now_s)

    def hold(
        self, hashes: Sequence[BlockHash], holder: str, ttl_s: float, now_s: float
    ) -> tuple[LeaseId, list[HeldBlock | None]]:
        """As :meth:`lease`, but no use that eviction remembers, and without caps: for the node's own copying."""
        self.expire(now_s)
        return self._reading.hold(hashes, holder, ttl_s, now_s)

    def release(self, lease: LeaseId, holder: str) -> None:
        """End a lease early. Unknown, ended and other holders' leases are ignored."""
        self._reading.release(lease, holder)

    def revoke(self, block_hash: BlockHash, generation: SlotGeneration) -> bool:
        """Drop a published block whose bytes are bad: invisible at once, its slot kept until its leases end.

        Returns whether this generation of it was published.
        """
        slot = self.table.published.get(block_hash)
        if slot is None or self.table.generation[slot] != generation:
            return False
        self.table.remove(slot)
        return True

    def discardable(self, hashes: Sequence[BlockHash], tenant: TenantKey) -> list[BlockHash]:
        """Those of them that are published on this tenant's account, and that no pin covers."""
        table = self.table
        slots = zip(hashes, map(table.published.get, hashes), strict=True)
        own = [block_hash for block_hash, slot in slots if slot is not None and table.tenant[slot] == tenant]
        return [block_hash for block_hash in own if self._pins.rank(block_hash) is None]

    def discard(self, hashes: Sequence[BlockHash], tenant: TenantKey) -> None:
        """Drop what is :meth:`discardable` of these: invisible at once, its slots kept until its leases end."""
        for block_hash in dict.fromkeys(self.discardable(hashes, tenant)):
            self.table.remove(self.table.published[block_hash])

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
        slot = self.table.published.get(block_hash)
        if slot is not None:
            return self.table.size[slot]
        return 0 if self._below is None else self._below.size_of(block_hash)

    def _repinned(self, hashes: Iterable[BlockHash]) -> None:
        """What pins say of these blocks has changed."""
        for block_hash in hashes:
            slot = self.table.published.get(block_hash)
            if slot is not None:
                self.table.victims.reconsider(slot, self.table.group[slot])
        if self._below is not None:
            self._below.repinned(hashes)

    # --- limits -------------------------------------------------------------------------------------------

    def reconfigure(self, config: StoreConfig, now_s: float) -> str | None:
        """Other limits from now on. Returns why not, with nothing changed, where what is held now exceeds them.

        What is only asked for later (leases, reservations) may exceed them until it ends. Sizes cannot change.
        Linear in slots if quotas change: what a tenant wrote before counts on its new account from now on, and blocks
        of a tenant that loses its quota as more recently used than the others of the shared one.
        """
        before = self.config
        assert (config.arena_bytes, config.slot_bytes) == (before.arena_bytes, before.slot_bytes)
        assert config.late_write_s >= before.late_write_s, "slots at rest were promised their time"
        self.expire(now_s)
        refusal = self._pins.reconfigure(config)
        if refusal is not None:
            return refusal
        self.config = config
        if config.quota_bytes != before.quota_bytes:
            self.table.regroup(Tenants(config.quota_bytes, config.slot_bytes, config.slots_max))
        self._writing.reconfigure(config)
        self._reading.reconfigure(config)
        self.expire(now_s)
        return None

    # --- time and loss ------------------------------------------------------------------------------------

    def next_deadline_s(self) -> float | None:
        """When :meth:`expire` next has something to do; None if nothing is pending."""
        pending = (self._writing.deadline_s(), self._reading.deadline_s(), self._pins.deadline_s())
        return min((deadline_s for deadline_s in pending if deadline_s is not None), default=None)

    def expire(self, now_s: float) -> None:
        """End every reservation, lease, pin and quarantine whose time has come."""
        assert now_s >= self._now_s, "time went back"
        self._now_s = now_s
        self._writing.expire(now_s)
        self._reading.expire(now_s)
        self._keeping.expire(now_s)

    def disconnected(self, owner: str, now_s: float) -> None:
        """A connection is gone: its leases end now; its slots rest in quarantine, as its writes may still land."""
        self.expire(now_s)
        self._reading.disconnected(owner)
        self._writing.disconnected(owner, now_s)

    # --- invariants ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant of the index against each other. Linear in slots: for tests and debugging."""
        table, writing = self.table, self._writing
        reserved = writing.reservations.all()
        by_state = table.check()
        assert sorted(slot for _, slot in writing.quarantine) == by_state[QUARANTINED]
        assert sorted(r.slot for r in reserved) == by_state[RESERVED]
        assert len(reserved) == len(writing.reservations)
        assert not any(r.hash in table.published for r in reserved)
        leases = [0] * self.config.slots_max
        for held in self._reading.open():
            for slot in held.slots:
                leases[slot] += 1
        assert leases == table.lease_count.tolist()
        table.continuations.check([(r.hash, r.parent) for r in reserved])
        self._pins.check()
        deadline_s = self.next_deadline_s()
        assert deadline_s is None or deadline_s > self._now_s

"""The arena against a dict that is too simple to be wrong."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from tracehaul.wire.blocks import (
    BlockSpec,
    Full,
    InFlight,
    Pin,
    PinKind,
    Pinned,
    Present,
    Publication,
    Removed,
    Slot,
    Stored,
)
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId, SlotGeneration, TraceId

pytestmark = pytest.mark.slow

SLOT = 4096
RESERVATION_TTL_S, LEASE_TTL_MAX_S, LATE_WRITE_S = 8.0, 12.0, 16.0
QUIET_S = 3.0
LIMIT = 3
HALF_LIFE_S, PIN_TTL_MAX_S = 4.0, 30.0
PINS_MAX, PINS_TENANT_MAX = 3, 2
HARD_SHARE, HARD_TENANT_SHARE = 0.6, 0.4
ROOT = BlockHash(b"\xff" * 16)
NAMES = st.integers(0, 11)
OWNERS = st.sampled_from(["w0", "w1", "r0"])
TENANTS = st.sampled_from(["", "a", "b", "c"])


def hash_of(name: int) -> BlockHash:
    return BlockHash(bytes([name]) * 16)


def parent_of(name: int) -> BlockHash:
    """A forest: two sequences that fork, and loners."""
    return {0: ROOT, 5: hash_of(2), 9: ROOT, 10: ROOT, 11: ROOT}.get(name, hash_of(name - 1)) if name else ROOT


@dataclass
class Entry:
    name: int
    offset: int
    generation: int
    checksum: int
    parent: BlockHash
    group: str


@dataclass
class Pending:
    name: int
    offset: int
    generation: int
    owner: str
    since_s: float
    parent: BlockHash
    group: str
    heard_s: float


@dataclass
class ModelPin:
    kind: PinKind
    rank: float
    until_s: float
    hashes: set[BlockHash]
    gaps: set[BlockHash] = field(default_factory=set[BlockHash])


@dataclass
class Model:
    """What the arena must agree with; victims and free offsets are the arena's own choice, checked for fairness."""

    slots: int
    quota: dict[str, int]
    published: dict[int, Entry] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    leases: dict[LeaseId, tuple[str, float, list[int]]] = field(default_factory=dict)  # offsets
    resting: dict[int, float] = field(default_factory=dict)  # offset -> until
    condemned: dict[int, None] = field(default_factory=dict)
    pins: dict[tuple[str, str], ModelPin] = field(default_factory=dict)

    def protected(self) -> set[int]:
        return {offset for _, _, offsets in self.leases.values() for offset in offsets}

    def has_child(self, name: int) -> bool:
        wanted = hash_of(name)
        return any(other.parent == wanted for other in (*self.published.values(), *self.pending.values()))

    def rank(self, name: int) -> float | None:
        return max((pin.rank for pin in self.pins.values() if hash_of(name) in pin.hashes), default=None)

    def evictable(self, name: int) -> bool:
        kept = self.published[name].offset in self.protected() or self.rank(name) == float("inf")
        return not kept and not self.has_child(name)

    def group(self, tenant: str) -> str:
        return tenant if tenant in self.quota else ""

    def group_used(self, group: str) -> int:
        return sum(block.group == group for block in (*self.published.values(), *self.pending.values()))

    def victims(self, tenant: str, parent: BlockHash) -> set[int]:
        """Which blocks may go for one of ``tenant``; the policy decides among them."""
        group = self.group(tenant)
        quota = {**self.quota, "": self.slots - sum(self.quota.values())}
        excess = {g: self.group_used(g) + (g == group) - quota[g] for g in quota}
        yielding = sorted((g for g in quota if excess[g] > 0), key=lambda g: (-excess[g], g != group, g))
        for g in yielding if group in yielding else [*yielding, group]:
            found = {
                name: self.rank(name)
                for name, entry in self.published.items()
                if entry.group == g and self.evictable(name) and hash_of(name) != parent
            }
            lowest = min((rank or 0.0 for rank in found.values()), default=None)
            if lowest is not None:
                return {name for name, rank in found.items() if (rank or 0.0) == lowest}
        return set()

    def closes_cycle(self, name: int, parent: BlockHash) -> bool:
        parents = {hash_of(b.name): b.parent for b in (*self.published.values(), *self.pending.values())}
        at: BlockHash | None = parent
        while at is not None and at != hash_of(name):
            at = parents.get(at)
        return at is not None

    def used(self) -> set[int]:
        taken = {e.offset for e in self.published.values()} | {p.offset for p in self.pending.values()}
        return taken | set(self.resting) | set(self.condemned)

    def settle(self, now_s: float) -> None:
        for pending in list(self.pending.values()):
            if pending.since_s + RESERVATION_TTL_S <= now_s:
                self.rest(pending, now_s)
        self.leases = {k: v for k, v in self.leases.items() if v[1] > now_s}
        self.pins = {k: pin for k, pin in self.pins.items() if pin.until_s > now_s}
        self.sweep()
        self.resting = {offset: until for offset, until in self.resting.items() if until > now_s}

    def rest(self, pending: Pending, now_s: float) -> None:
        del self.pending[pending.name]
        self.resting[pending.offset] = now_s + LATE_WRITE_S

    def sweep(self) -> None:
        protected = self.protected()
        self.condemned = {offset: None for offset in self.condemned if offset in protected}


class ArenaMachine(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 7), data=st.data())
    def start(self, slots: int, data: st.DataObject) -> None:
        quota: dict[str, int] = {}
        for tenant in data.draw(st.sampled_from(["", "a", "ab"])):
            quota[tenant] = data.draw(st.integers(0, slots - sum(quota.values())))
        self.arena = Arena(
            StoreConfig(
                arena_bytes=slots * SLOT,
                slot_bytes=SLOT,
                reservation_ttl_s=RESERVATION_TTL_S,
                reservation_quiet_s=QUIET_S,
                lease_ttl_max_s=LEASE_TTL_MAX_S,
                late_write_s=LATE_WRITE_S,
                reservations_max=LIMIT,
                leases_max=LIMIT,
                quota_bytes={tenant: count * SLOT for tenant, count in quota.items()},
                pin_ttl_max_s=PIN_TTL_MAX_S,
                pin_half_life_s=HALF_LIFE_S,
                pins_max=PINS_MAX,
                pins_tenant_max=PINS_TENANT_MAX,
                hard_share_max=HARD_SHARE,
                hard_tenant_share_max=HARD_TENANT_SHARE,
            )
        )
        self.model = Model(slots, quota)
        self.now_s = 0.0
        self.seen: dict[BlockHash, None] = {}  # rebuilt from changes alone
        self.handles: list[tuple[int, int, str]] = []  # every slot ever granted, stale ones too
        self.lease_ids: list[LeaseId] = []

    @rule(name=NAMES, owner=OWNERS, tenant=TENANTS)
    def reserve(self, name: int, owner: str, tenant: str) -> None:
        self._reserve([(name, parent_of(name))], owner, tenant)

    @rule(name=NAMES, parent=NAMES, owner=OWNERS)
    def reserve_forged(self, name: int, parent: int, owner: str) -> None:
        if name != parent:
            self._reserve([(name, hash_of(parent))], owner, "")

    def _reserve(self, blocks: list[tuple[int, BlockHash]], owner: str, tenant: str) -> None:
        self.model.settle(self.now_s)
        specs = [BlockSpec(hash_of(name), parent, 1 + name) for name, parent in blocks]
        outcomes = self.arena.reserve(specs, owner, self.now_s, tenant)
        changes = deque(self._observe())
        for (name, parent), outcome in zip(blocks, outcomes, strict=True):
            self._reserved(name, parent, owner, tenant, outcome, changes)
        assert not changes

    def _reserved(
        self, name: int, parent: BlockHash, owner: str, tenant: str, outcome: object, changes: deque[Stored | Removed]
    ) -> None:
        """What is known of one block's outcome; ``changes`` begin with what was evicted for it."""
        model = self.model
        match outcome:
            case Present():
                assert name in model.published
            case InFlight(since_s=since_s, owner=holder):
                assert self.now_s < model.pending[name].heard_s + QUIET_S, "a silent owner keeps its block"
                assert (since_s, holder) == (self.now_s - model.pending[name].since_s, model.pending[name].owner)
            case Full():
                assert name not in model.published
                assert name not in model.pending or model.pending[name].heard_s + QUIET_S <= self.now_s
                at_limit = sum(p.owner == owner for p in model.pending.values()) >= LIMIT
                no_room = len(model.used()) == model.slots and not model.victims(tenant, parent)
                assert at_limit or no_room or model.closes_cycle(name, parent)
            case Slot(offset=offset, generation=generation):
                assert name not in model.published
                if name in model.pending:
                    assert model.pending[name].heard_s + QUIET_S <= self.now_s, "its owner lives"
                quiet = model.pending.get(name)
                assert not model.closes_cycle(name, parent)
                if len(model.used()) == model.slots:
                    change = changes.popleft()
                    assert isinstance(change, Removed)
                    assert change.hash[0] in model.victims(tenant, parent)
                    del model.published[change.hash[0]]
                assert offset not in model.used()
                if quiet is not None:
                    model.rest(quiet, self.now_s)
                model.pending[name] = Pending(
                    name, offset, generation, owner, self.now_s, parent, model.group(tenant), self.now_s
                )
                self.handles.append((name, generation, owner))
            case _:
                raise AssertionError(outcome)

    @rule(data=st.data(), owner=OWNERS, own=st.booleans(), checksum=st.integers(0, 2))
    def publish(self, data: st.DataObject, owner: str, own: bool, checksum: int) -> None:
        name, generation, granted_to = self._handle(data)
        self._publish([(name, generation)], granted_to if own else owner, checksum)

    def _publish(self, blocks: list[tuple[int, int]], owner: str, checksum: int) -> None:
        self.model.settle(self.now_s)
        publications = [
            Publication(hash_of(name), SlotGeneration(generation), Checksum(checksum)) for name, generation in blocks
        ]
        landings = [self.arena.landing(publication, owner) for publication in publications]
        outcomes = self.arena.publish(publications, owner, self.now_s)
        changes = deque(self._observe())
        for (name, generation), landing, outcome in zip(blocks, landings, outcomes, strict=True):
            self._published(name, generation, owner, checksum, landing, outcome, changes)
        assert not changes

    def _published(
        self,
        name: int,
        generation: int,
        owner: str,
        checksum: int,
        landing: tuple[int, int] | None,
        outcome: str,
        changes: deque[Stored | Removed],
    ) -> None:
        model = self.model
        pending, entry = model.pending.get(name), model.published.get(name)
        if pending is not None and (pending.generation, pending.owner) == (generation, owner):
            assert outcome == "published"
            assert landing == (pending.offset, 1 + name)
            assert changes.popleft() == Stored(hash_of(name))
            del model.pending[name]
            model.published[name] = Entry(name, pending.offset, generation, checksum, pending.parent, pending.group)
            self._grow_pins(hash_of(name))
            return
        same = entry is not None and (entry.generation, entry.checksum) == (generation, checksum)
        assert outcome == ("published" if same else "fenced")

    @rule(data=st.data(), owner=OWNERS, own=st.booleans(), landed_wrong=st.booleans())
    def give_up(self, data: st.DataObject, owner: str, own: bool, landed_wrong: bool) -> None:
        name, generation, granted_to = self._handle(data)
        owner = granted_to if own else owner
        if landed_wrong:
            self.arena.withdraw(hash_of(name), SlotGeneration(generation), owner, self.now_s)
        else:
            self.arena.abandon([(hash_of(name), SlotGeneration(generation))], owner)
        assert self._observe() == []
        pending = self.model.pending.get(name)
        if pending is not None and (pending.generation, pending.owner) == (generation, owner):
            self.model.rest(pending, self.now_s)
            if not landed_wrong:
                del self.model.resting[pending.offset]

    @rule(data=st.data(), owner=OWNERS, own=st.booleans())
    def renew(self, data: st.DataObject, owner: str, own: bool) -> None:
        name, generation, granted_to = self._handle(data)
        owner = granted_to if own else owner
        self.model.settle(self.now_s)
        self.arena.renew([(hash_of(name), SlotGeneration(generation))], owner, self.now_s)
        pending = self.model.pending.get(name)
        if pending is not None and (pending.generation, pending.owner) == (generation, owner):
            pending.heard_s = self.now_s

    @rule(names=st.lists(NAMES, max_size=5), holder=OWNERS, ttl_s=st.sampled_from([0.0, 3.0, 100.0]))
    def lease(self, names: list[int], holder: str, ttl_s: float) -> None:
        self._lease(names, holder, ttl_s)

    def _lease(self, names: list[int], holder: str, ttl_s: float) -> None:
        model = self.model
        model.settle(self.now_s)
        leased = self.arena.lease([hash_of(name) for name in names], holder, ttl_s, self.now_s)
        if sum(owner == holder for owner, _, _ in model.leases.values()) >= LIMIT:
            assert leased is None
            return
        assert leased is not None
        assert leased.ttl_s == min(ttl_s, LEASE_TTL_MAX_S)
        assert leased.lease not in self.lease_ids
        offsets: list[int] = []
        for name, block in zip(names, leased.blocks, strict=True):
            entry = model.published.get(name)
            assert (block is None) == (entry is None)
            if block is not None and entry is not None:
                assert (block.offset, block.generation) == (entry.offset, entry.generation)
                assert (block.checksum, block.size_bytes) == (entry.checksum, 1 + name)
                offsets.append(block.offset)
        self.lease_ids.append(leased.lease)
        if offsets and ttl_s:
            model.leases[leased.lease] = (holder, self.now_s + leased.ttl_s, offsets)

    @rule(data=st.data(), holder=OWNERS)
    def release(self, data: st.DataObject, holder: str) -> None:
        if not self.lease_ids:
            return
        lease = data.draw(st.sampled_from(self.lease_ids))
        self.arena.release(lease, holder)
        if lease in self.model.leases and self.model.leases[lease][0] == holder:
            del self.model.leases[lease]
        self.model.sweep()

    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        name, generation, _ = self._handle(data)
        entry = self.model.published.get(name)
        bad = entry is not None and entry.generation == generation
        assert self.arena.revoke(hash_of(name), SlotGeneration(generation)) == bad
        changes = self._observe()
        assert changes == ([Removed(hash_of(name))] if bad else [])
        if bad and entry is not None:
            del self.model.published[name]
            self.model.condemned[entry.offset] = None
            self.model.sweep()

    @rule(
        tenant=st.sampled_from(["", "a"]),
        trace=st.sampled_from(["t0", "t1"]),
        names=st.lists(NAMES, max_size=3),
        kind=st.sampled_from(["soft", "hard"]),
        priority=st.sampled_from([1.0, 2.0, 8.0]),
        ttl_s=st.sampled_from([2.0, 10.0, 100.0]),
    )
    def pin(self, tenant: str, trace: str, names: list[int], kind: PinKind, priority: float, ttl_s: float) -> None:
        model = self.model
        model.settle(self.now_s)
        hashes = tuple(hash_of(name) for name in names)
        pinned = self.arena.pin(Pin(TraceId(trace), hashes, ttl_s, kind, priority, tenant), self.now_s)
        covered = set(hashes)
        gaps: dict[BlockHash, set[BlockHash]] = {}
        for at in hashes:
            found, missed = self._prefix(at, covered)
            covered |= found
            gaps[at] = gaps.get(at, set()) | missed
        before = model.pins.get((tenant, trace))
        covered |= before.hashes if before is not None else set()
        if not self._may_pin((tenant, trace), len(covered), kind):
            assert isinstance(pinned, str)
            return
        octaves = {1.0: 0, 2.0: 1, 8.0: 3}[priority]
        rank = float("inf") if kind == "hard" else octaves + self.now_s / HALF_LIFE_S
        lasts_s = min(ttl_s, PIN_TTL_MAX_S, octaves * HALF_LIFE_S if kind == "soft" else PIN_TTL_MAX_S)
        held = sum(hash_of(name) in covered for name in model.published)
        assert pinned == Pinned(len(covered), held, self.now_s + lasts_s - self.now_s)
        pin = ModelPin(kind, rank, self.now_s + lasts_s, covered, before.gaps if before is not None else set())
        model.pins[tenant, trace] = pin
        for at in hashes:
            self._expect(pin, gaps[at])
        model.settle(self.now_s)

    def _prefix(self, at: BlockHash, covered: set[BlockHash]) -> tuple[set[BlockHash], set[BlockHash]]:
        """What a pin that covers some blocks must cover for one more; and the parent that it misses."""
        found: set[BlockHash] = set()
        first = at
        while at[0] in self.model.published and at != ROOT:
            if at in covered and at != first:
                return found, set()
            found.add(at)
            at = self.model.published[at[0]].parent
        return found, {at} if found else set()

    def _grow_pins(self, arrived: BlockHash) -> None:
        for key, pin in list(self.model.pins.items()):
            if arrived not in pin.hashes | pin.gaps:
                continue
            more, gaps = self._prefix(arrived, pin.hashes)
            grown = pin.hashes | more
            if grown != pin.hashes and not self._may_pin(key, len(grown), pin.kind) and pin.kind == "hard":
                pin.kind, pin.rank = "soft", 32 + self.now_s / HALF_LIFE_S
                pin.until_s = min(pin.until_s, self.now_s + 32 * HALF_LIFE_S)
            if self._may_pin(key, len(grown), pin.kind):
                pin.hashes = grown
            pin.gaps.discard(arrived)
            self._expect(pin, gaps)

    def _expect(self, pin: ModelPin, gaps: set[BlockHash]) -> None:
        for gap in gaps:
            if len(pin.gaps) < len(pin.hashes):
                pin.gaps.add(gap)

    def _may_pin(self, key: tuple[str, str], blocks: int, kind: PinKind) -> bool:
        slots = self.model.slots
        others = {k: pin for k, pin in self.model.pins.items() if k != key}
        own = [pin for k, pin in others.items() if k[0] == key[0]]
        if key not in self.model.pins and (len(others) >= PINS_MAX or len(own) >= PINS_TENANT_MAX):
            return False
        if blocks + sum(len(pin.hashes) for pin in own) > slots:
            return False
        if blocks + sum(len(pin.hashes) for pin in others.values()) > 4 * slots:
            return False
        hard = [sum(len(pin.hashes) for pin in pins if pin.kind == "hard") for pins in (others.values(), own)]
        limits = int(slots * HARD_SHARE), int(slots * HARD_TENANT_SHARE)
        quota = self.model.quota.get(key[0], slots - sum(self.model.quota.values()))
        group = own
        if key[0] not in self.model.quota:
            group = [pin for k, pin in others.items() if k[0] not in self.model.quota]
        if kind == "hard" and blocks + sum(len(pin.hashes) for pin in group if pin.kind == "hard") > quota:
            return False
        return kind == "soft" or all(blocks + n <= limit for n, limit in zip(hard, limits, strict=True))

    @rule(tenant=st.sampled_from(["", "a"]), trace=st.sampled_from(["t0", "t1"]))
    def unpin(self, tenant: str, trace: str) -> None:
        self.arena.unpin(tenant, TraceId(trace))
        self.model.pins.pop((tenant, trace), None)

    @rule(owner=OWNERS)
    def disconnect(self, owner: str) -> None:
        model = self.model
        model.settle(self.now_s)
        self.arena.disconnected(owner, self.now_s)
        assert self._observe() == []
        for pending in list(model.pending.values()):
            if pending.owner == owner:
                model.rest(pending, self.now_s)
        model.leases = {k: v for k, v in model.leases.items() if v[0] != owner}
        model.sweep()

    @rule(step_s=st.sampled_from([0.0, 1.0, 3.0, 8.0, 20.0]))
    def pass_time(self, step_s: float) -> None:
        self.now_s += step_s
        self.arena.expire(self.now_s)
        self.model.settle(self.now_s)
        assert self._observe() == []

    @invariant()
    def agrees(self) -> None:
        arena, model = self.arena, self.model
        arena.check()
        names = range(12)
        assert list(arena.exists([hash_of(n) for n in names])) == [int(n in model.published) for n in names]
        assert sorted(self.seen) == sorted(arena.published()), "changes tell the whole truth"
        assert len(arena) == len(model.published)
        assert arena.reservations == len(model.pending)
        assert arena.leases == len(model.leases)
        assert arena.slots_quarantined == len(model.resting)
        assert arena.pins == len(model.pins)
        for key, held in arena.open_pins(self.now_s):
            pin = model.pins[key[0], key[1]]
            assert (held.kind, held.rank, held.until_s) == (pin.kind, pin.rank, pin.until_s)
            assert (set(held.hashes), set(held.gaps)) == (pin.hashes, pin.gaps)
            if held.kind == "hard":
                kept = {at for block_hash in held.hashes for at in self._prefix(block_hash, set())[0]}
                assert kept <= set(held.hashes), "all that a hard pin keeps is counted"
        for tenant in ("", "a", "b", "c"):
            assert arena.bytes_used(tenant) == SLOT * model.group_used(model.group(tenant))
        assert all((arena.quiet_at_s(hash_of(n)) is not None) == (n in model.pending) for n in names)
        assert arena.slots_free == model.slots - len(model.used())

    def _handle(self, data: st.DataObject) -> tuple[int, int, str]:
        """A slot granted at some time, or one that never was."""
        return data.draw(st.sampled_from(self.handles)) if self.handles else (0, 1, "w0")

    def _observe(self) -> list[Stored | Removed]:
        changes = self.arena.take_changes()
        for change in changes:
            if isinstance(change, Stored):
                assert change.hash not in self.seen
                self.seen[change.hash] = None
            else:
                del self.seen[change.hash]
        return changes


class RunsMachine(ArenaMachine):
    """Many blocks at once, where two are many."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr("kvstore.index.writing.RUN_BLOCKS_MIN", 2)
        self._patch.setattr("kvstore.index.slot_table.RUN_BLOCKS_MIN", 2)

    def teardown(self) -> None:
        self._patch.undo()

    @rule(first=NAMES, count=st.integers(2, 4), owner=OWNERS, tenant=TENANTS)
    def reserve_run(self, first: int, count: int, owner: str, tenant: str) -> None:
        names = range(first, min(first + count, 12))
        self._reserve([(name, parent_of(name)) for name in names], owner, tenant)

    @rule(owner=OWNERS, checksum=st.integers(0, 2), again=st.integers(0, 1))
    def publish_all(self, owner: str, checksum: int, again: int) -> None:
        """All that an owner has reserved, perhaps one of them twice."""
        own = [(held.name, held.generation) for held in self.model.pending.values() if held.owner == owner]
        self._publish([*own, *own[:again]], owner, checksum)

    @rule(first=NAMES, count=st.integers(2, 4), holder=OWNERS)
    def lease_run(self, first: int, count: int, holder: str) -> None:
        names = range(first, min(first + count, 12))
        self._lease(list(names), holder, 100.0)


for machine in (ArenaMachine, RunsMachine):
    machine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestArena = ArenaMachine.TestCase
TestArenaRuns = RunsMachine.TestCase

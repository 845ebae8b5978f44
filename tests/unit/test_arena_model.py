"""The arena against a dict that is too simple to be wrong."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.arena import Arena
from kvstore.config import StoreConfig
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId, SlotGeneration
from tracehaul.wire.messages import BlockSpec, Full, InFlight, Present, Publication, Removed, Slot, Stored

SLOT = 4096
RESERVATION_TTL_S, LEASE_TTL_MAX_S, LATE_WRITE_S = 8.0, 12.0, 16.0
LIMIT = 3
ROOT = BlockHash(b"\xff" * 16)
NAMES = st.integers(0, 11)
OWNERS = st.sampled_from(["w0", "w1", "r0"])


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


@dataclass
class Pending:
    name: int
    offset: int
    generation: int
    owner: str
    since_s: float


@dataclass
class Model:
    """What the arena must agree with; victims and free offsets are the arena's own choice, checked for fairness."""

    slots: int
    published: dict[int, Entry] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    leases: dict[LeaseId, tuple[str, float, list[int]]] = field(default_factory=dict)  # offsets
    resting: dict[int, float] = field(default_factory=dict)  # offset -> until
    condemned: dict[int, None] = field(default_factory=dict)

    def protected(self) -> set[int]:
        return {offset for _, _, offsets in self.leases.values() for offset in offsets}

    def has_child(self, name: int) -> bool:
        wanted = hash_of(name)
        return any(parent_of(other) == wanted for other in (*self.published, *self.pending))

    def evictable(self, name: int) -> bool:
        return self.published[name].offset not in self.protected() and not self.has_child(name)

    def used(self) -> set[int]:
        taken = {e.offset for e in self.published.values()} | {p.offset for p in self.pending.values()}
        return taken | set(self.resting) | set(self.condemned)

    def settle(self, now_s: float) -> None:
        for pending in list(self.pending.values()):
            if pending.since_s + RESERVATION_TTL_S <= now_s:
                self.rest(pending, now_s)
        self.leases = {k: v for k, v in self.leases.items() if v[1] > now_s}
        self.sweep()
        self.resting = {offset: until for offset, until in self.resting.items() if until > now_s}

    def rest(self, pending: Pending, now_s: float) -> None:
        del self.pending[pending.name]
        self.resting[pending.offset] = now_s + LATE_WRITE_S

    def sweep(self) -> None:
        protected = self.protected()
        self.condemned = {offset: None for offset in self.condemned if offset in protected}


class ArenaMachine(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 7))
    def start(self, slots: int) -> None:
        self.arena = Arena(
            StoreConfig(
                arena_bytes=slots * SLOT,
                slot_bytes=SLOT,
                reservation_ttl_s=RESERVATION_TTL_S,
                lease_ttl_max_s=LEASE_TTL_MAX_S,
                late_write_s=LATE_WRITE_S,
                reservations_max=LIMIT,
                leases_max=LIMIT,
            )
        )
        self.model = Model(slots)
        self.now_s = 0.0
        self.seen: dict[BlockHash, None] = {}  # rebuilt from changes alone
        self.handles: list[tuple[int, int, str]] = []  # every slot ever granted, stale ones too
        self.lease_ids: list[LeaseId] = []

    @rule(name=NAMES, owner=OWNERS)
    def reserve(self, name: int, owner: str) -> None:
        model = self.model
        model.settle(self.now_s)
        (outcome,) = self.arena.reserve([BlockSpec(hash_of(name), parent_of(name), 1 + name)], owner, self.now_s)
        changes = self._observe()
        match outcome:
            case Present():
                assert name in model.published
            case InFlight(since_s=since_s):
                assert since_s == self.now_s - model.pending[name].since_s
            case Full():
                assert name not in model.published
                assert name not in model.pending
                at_limit = sum(p.owner == owner for p in model.pending.values()) >= LIMIT
                candidates = [n for n in model.published if model.evictable(n) and hash_of(n) != parent_of(name)]
                assert at_limit or (len(model.used()) == model.slots and not candidates)
            case Slot(offset=offset, generation=generation):
                assert name not in model.published
                assert name not in model.pending
                for change in changes:
                    assert isinstance(change, Removed)
                    victim = change.hash[0]
                    assert len(model.used()) == model.slots, "evicted with slots free"
                    assert model.evictable(victim)
                    assert change.hash != parent_of(name)
                    del model.published[victim]
                assert len(changes) <= 1
                assert offset not in model.used()
                model.pending[name] = Pending(name, offset, generation, owner, self.now_s)
                self.handles.append((name, generation, owner))
            case _:
                raise AssertionError(outcome)
        if not isinstance(outcome, Slot):
            assert changes == []

    @rule(data=st.data(), owner=OWNERS, own=st.booleans(), checksum=st.integers(0, 2))
    def publish(self, data: st.DataObject, owner: str, own: bool, checksum: int) -> None:
        name, generation, granted_to = self._handle(data)
        owner = granted_to if own else owner
        model = self.model
        model.settle(self.now_s)
        publication = Publication(hash_of(name), SlotGeneration(generation), Checksum(checksum))
        landing = self.arena.landing(publication, owner)
        (outcome,) = self.arena.publish([publication], owner, self.now_s)
        changes = self._observe()
        pending, entry = model.pending.get(name), model.published.get(name)
        if pending is not None and (pending.generation, pending.owner) == (generation, owner):
            assert outcome == "published"
            assert landing == (pending.offset, 1 + name)
            assert changes == [Stored(hash_of(name))]
            del model.pending[name]
            model.published[name] = Entry(name, pending.offset, generation, checksum)
            return
        assert changes == []
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

    @rule(names=st.lists(NAMES, max_size=5), holder=OWNERS, ttl_s=st.sampled_from([0.0, 3.0, 100.0]))
    def lease(self, names: list[int], holder: str, ttl_s: float) -> None:
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


ArenaMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestArena = ArenaMachine.TestCase

"""Many blocks at once: the same promises as one by one, where two already count as many."""

import random

import pytest

from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from kvstore.index.slot_table import SlotTable
from tracehaul.wire.blocks import BlockSpec, LeasedBlock, Present, Publication, Removed, Slot, Stored
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId

SLOT = 4096
ROOT = BlockHash(b"\xff" * 16)
CHAINS, LENGTH = 6, 12
OWNERS = ("a", "b")


def hash_of(chain: int, place: int) -> BlockHash:
    return BlockHash(bytes([chain, place]) * 8) if place >= 0 else ROOT


class Play:
    """Random requests over a few sequences, each compared with what went before."""

    def __init__(self, seed: int, slots: int) -> None:
        self.dice = random.Random(seed)
        self.arena = Arena(StoreConfig(arena_bytes=slots * SLOT, slot_bytes=SLOT, late_write_s=5.0))
        self.now_s = 0.0
        self.seen: dict[BlockHash, None] = {}
        self.granted: list[tuple[str, list[Publication]]] = []
        self.leased: dict[LeaseId, tuple[str, list[BlockHash]]] = {}

    def step(self) -> None:
        dice = self.dice
        work = dice.choices([self.reserve, self.publish, self.lease, self.release, self.lose], weights=[6, 6, 4, 4, 1])
        work[0]()
        for change in self.arena.take_changes():
            if isinstance(change, Stored):
                assert change.hash not in self.seen
                self.seen[change.hash] = None
            else:
                del self.seen[change.hash]
        self.arena.check()
        assert set(self.seen) == set(self.arena.published())

    def reserve(self) -> None:
        dice, owner = self.dice, self.dice.choice(OWNERS)
        chain, first = dice.randrange(CHAINS), dice.choice((0, 0, dice.randrange(LENGTH)))
        places = range(first, min(LENGTH, first + dice.randint(1, LENGTH)))
        specs = [BlockSpec(hash_of(chain, place), hash_of(chain, place - 1), 1 + place) for place in places]
        before = self.arena.published()
        outcomes = self.arena.reserve(specs, owner, self.now_s)
        publications: list[Publication] = []
        for spec, outcome in zip(specs, outcomes, strict=True):
            if isinstance(outcome, Slot):
                assert self.arena.quiet_at_s(spec.hash) is not None
                sum_ = Checksum(int.from_bytes(spec.hash[:8]))
                publications.append(Publication(spec.hash, outcome.generation, sum_))
                assert self.arena.landing(publications[-1], owner) == (outcome.offset, spec.size_bytes)
            elif isinstance(outcome, Present):
                assert spec.hash in before
        if publications:
            self.granted.append((owner, publications))

    def publish(self) -> None:
        if not self.granted:
            return
        owner, publications = self.granted.pop(self.dice.randrange(len(self.granted)))
        part = self.dice.choice((publications, publications, publications[: len(publications) // 2]))
        twice = self.dice.choice(([], [], part[:1]))
        open_ = [self.arena.landing(publication, owner) is not None for publication in part]
        outcomes = self.arena.publish([*part, *twice], owner, self.now_s)
        assert all(outcome == "published" for outcome, was in zip(outcomes, open_, strict=False) if was)
        for publication, was in zip(part, open_, strict=True):
            if was:
                spec = self.arena.spec(publication.hash)
                assert spec is not None
                place = publication.hash[1]
                assert spec == BlockSpec(publication.hash, hash_of(publication.hash[0], place - 1), 1 + place)

    def lease(self) -> None:
        dice, chain = self.dice, self.dice.randrange(CHAINS)
        hashes = [hash_of(chain, place) for place in range(dice.randint(1, LENGTH))]
        owner, held = dice.choice(OWNERS), self.arena.exists(hashes)
        leased = self.arena.lease(hashes, owner, dice.choice((1.0, 30.0)), self.now_s)
        assert leased is not None
        assert [block is not None for block in leased.blocks] == [bool(flag) for flag in held]
        for block_hash, block in zip(hashes, leased.blocks, strict=True):
            if isinstance(block, LeasedBlock):
                assert block.checksum == int.from_bytes(block_hash[:8])
                assert block.size_bytes == 1 + block_hash[1]
        self.leased[leased.lease] = owner, [h for h, flag in zip(hashes, held, strict=True) if flag]

    def release(self) -> None:
        if self.leased:
            lease = self.dice.choice(list(self.leased))
            self.arena.release(lease, self.leased.pop(lease)[0])

    def lose(self) -> None:
        dice = self.dice
        match dice.randrange(4):
            case 0:
                self.arena.disconnected(dice.choice(OWNERS), self.now_s)
            case 1 if self.granted:
                owner, publications = self.granted.pop()
                self.arena.abandon([(p.hash, p.generation) for p in publications], owner)
            case 2 if self.seen:
                block_hash = dice.choice(list(self.seen))
                leased = self.arena.lease([block_hash], "x", 1.0, self.now_s)
                assert leased is not None
                assert leased.blocks[0] is not None
                assert self.arena.revoke(block_hash, leased.blocks[0].generation)
                self.arena.release(leased.lease, "x")
            case _:
                self.now_s += dice.choice((0.5, 2.0, 40.0))
                self.arena.expire(self.now_s)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Blocks that went each way."""
    monkeypatch.setattr("kvstore.index.writing.RUN_BLOCKS_MIN", 2)
    monkeypatch.setattr("kvstore.index.slot_table.RUN_BLOCKS_MIN", 2)
    counts = {"evicted": 0, "published": 0}
    evict, publish = SlotTable._evict_run, SlotTable.publish_run  # pyright: ignore[reportPrivateUsage] - which way it went

    def evict_run(table: SlotTable, count: int) -> int:
        evicted = evict(table, count)
        counts["evicted"] += evicted
        return evicted

    def publish_run(table: SlotTable, slots: list[int], *rest: list[object]) -> None:
        counts["published"] += len(slots)
        publish(table, slots, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SlotTable, "_evict_run", evict_run)
    monkeypatch.setattr(SlotTable, "publish_run", publish_run)
    return counts


@pytest.mark.parametrize("slots", [10, 30, 60])
def test_random_runs_keep_every_promise(slots: int, runs: dict[str, int]) -> None:
    for seed in range(25):
        play = Play(seed, slots)
        for _ in range(150):
            play.step()
    assert min(runs.values()) >= 50


def put(arena: Arena, chain: int, count: int) -> list[BlockHash]:
    hashes = [hash_of(chain, place) for place in range(count)]
    specs = [BlockSpec(hash_of(chain, place), hash_of(chain, place - 1), SLOT) for place in range(count)]
    slots = [outcome for outcome in arena.reserve(specs, "w", 0.0) if isinstance(outcome, Slot)]
    assert len(slots) == count
    publications = [Publication(h, slot.generation, Checksum(7)) for h, slot in zip(hashes, slots, strict=True)]
    assert arena.publish(publications, "w", 0.0) == ["published"] * count
    arena.check()
    return hashes


def test_the_least_recently_used_sequence_gives_way_from_its_end(runs: dict[str, int]) -> None:
    arena = Arena(StoreConfig(arena_bytes=12 * SLOT, slot_bytes=SLOT))
    old, used = put(arena, 0, 6), put(arena, 1, 6)
    leased = arena.lease(old[:3], "r", 10.0, 0.0)
    assert leased is not None
    arena.release(leased.lease, "r")
    arena.take_changes()
    put(arena, 2, 5)
    gone = [change.hash for change in arena.take_changes() if isinstance(change, Removed)]
    assert gone == [*reversed(old[3:]), *reversed(used[4:])]
    assert runs["evicted"] == 5


def test_a_leased_block_ends_a_run_of_victims(runs: dict[str, int]) -> None:
    arena = Arena(StoreConfig(arena_bytes=12 * SLOT, slot_bytes=SLOT))
    first, second = put(arena, 0, 6), put(arena, 1, 6)
    leased = arena.hold([first[3]], "r", 10.0, 0.0)
    arena.take_changes()
    put(arena, 2, 5)
    gone = [change.hash for change in arena.take_changes() if isinstance(change, Removed)]
    assert gone == [first[5], first[4], *reversed(second[3:])]
    assert leased[1][0] is not None

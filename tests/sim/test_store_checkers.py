"""The checkers of tiers, pins and generations can fail: each is shown a cluster with one bug put into it."""

import asyncio
import logging

import msgspec
import pytest

from kvstore.index.pins import Pins
from kvstore.index.slot_table import SlotTable
from kvstore.node.node import StoreNode
from kvstore.node.pin_journal import PinJournal
from kvstore.tiers.promotions import TIER_HOLDER, Promotions
from kvstore.tiers.records import Record, pack_record
from kvstore.tiers.slot_tier import SlotTier
from kvstore.tiers.slots import SlotIndex
from kvstore.tiers.tiering import Tiering, TieringConfig
from router.fleet.epochs import Epochs
from router.fleet.members import MemberRegistry, _Member
from sim.faults import Crash, DiskRot, FaultPlan, Zombie
from sim.run import simulate
from sim.shape import FAULTS_END_S, FLEET, MIX
from sim.storage import Below
from tracehaul.runtime import clock
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import Epoch, Generation, NodeId

SMALL = msgspec.structs.replace(MIX, traces=10)
CALM = FaultPlan(faults=(), end_s=FAULTS_END_S, frame_delay_s=0.0005, copy_delay_s=0.0005)
BELOW = Below(400, 0.005, TieringConfig(scrub_bytes_s=0), pin_share=1.0, prefetch_share=0.5, quotas=False)
DEATH = tuple(Crash(float(at), FLEET.stores[at % 3], 0.5) for at in range(4, 20))


@pytest.fixture(autouse=True)
def quiet():
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    yield
    root.setLevel(level)


def rules(*faults, seed=3, slots=24, tier_slots=400, copy_delay_s=0.0005, **below):
    """Which rules a run violates."""

    def prepare(world):
        store = msgspec.structs.replace(
            world.shape.store,
            arena_bytes=slots * 4096,
            quota_bytes={},
            hard_share_max=0.8,
            hard_tenant_share_max=0.8,
        )
        world.shape = msgspec.structs.replace(
            world.shape, store=store, below=msgspec.structs.replace(BELOW, slots=tier_slots, **below)
        )

    plan = msgspec.structs.replace(CALM, faults=faults, copy_delay_s=copy_delay_s)
    result = simulate(seed, mix=SMALL, plan=plan, prepare=prepare)
    return {line.split("] ")[1].split(":")[0] for line in result.findings}


ROT = tuple(DiskRot(float(at), FLEET.stores[at % 3]) for at in range(4, 20))


@pytest.mark.parametrize("faults", [(), DEATH, ROT, (Zombie(5.0, FLEET.stores[0], 4.0),)])
def test_without_a_bug_nothing_is_found(faults):
    assert rules(*faults) == set()


def test_a_published_block_that_a_restart_forgets(monkeypatch):
    real = SlotIndex.restore

    def forgetful(self, records):
        return real(self, [record for i, record in enumerate(records) if i % 10])

    monkeypatch.setattr(SlotIndex, "restore", forgetful)
    assert "lost" in rules(*DEATH)


def test_a_record_before_its_bytes(monkeypatch):
    """The wrong order of writes: a kill in between leaves a record of what is not there."""

    def hasty(self, blocks, writes, stale, ahead):
        for i, placement, view in writes:
            record = pack_record(Record(placement.slot, placement.sequence, blocks[i]))
            self._device.write_records({placement.slot: record})
            self._device.write([placement.slot], [view])

    monkeypatch.setattr(SlotTier, "_write", hasty)
    monkeypatch.setattr(SlotTier, "_read", trusting)
    found = [rules(*DEATH, seed=seed, slots=100, latency_s=1.0) for seed in (5, 7, 9)]
    assert set.union(*found) & {"bytes", "torn"}


def trusting(self, reads):
    self._device.read([read.slot for read in reads], [read.view for read in reads])
    return [read.block.checksum for read in reads]


def test_a_tier_that_trusts_its_device(monkeypatch):
    monkeypatch.setattr(SlotTier, "_read", trusting)
    assert rules(*ROT) & {"bytes", "torn"}


def test_a_block_in_memory_that_is_not_leased(monkeypatch):
    real = SlotTable.protect

    def moody(self, hashes):
        return real(self, [b"" if block_hash[0] % 16 == 0 else block_hash for block_hash in hashes])

    monkeypatch.setattr(SlotTable, "protect", moody)
    assert "visible" in rules()


def test_a_block_of_the_tier_that_is_not_leased(monkeypatch):
    monkeypatch.setattr(Promotions, "_join", lambda self, hashes: [])
    assert "visible" in rules()


def test_a_miss_that_is_not_counted(monkeypatch):
    real = StoreNode._lease

    def quiet_miss(self, request, peer):
        leased = real(self, request, peer)
        self.stats.missed_blocks = 0
        return leased

    monkeypatch.setattr(StoreNode, "_lease", quiet_miss)
    narrow = TieringConfig(promotions_max=1, scrub_bytes_s=0)
    assert "visible" in rules(*DEATH, seed=7, tiering=narrow)


def test_a_hard_pin_that_holds_nothing(monkeypatch):
    monkeypatch.setattr(Pins, "rank", lambda self, block_hash: None)
    assert "pins" in rules(seed=5, tier_slots=12)


def test_a_pin_that_a_restart_forgets(monkeypatch):
    monkeypatch.setattr(PinJournal, "recover", lambda self, half_life_s: [])
    assert "pins" in rules(*DEATH, seed=5)


def test_the_tier_writes_into_what_is_leased(monkeypatch):
    real = Promotions._slot_view

    def astray(self, offset, size_bytes):
        held = [slot for lease in self._arena._reading.open() if lease.holder != TIER_HOLDER for slot in lease.slots]
        others = [slot * 4096 for slot in held if slot * 4096 != offset]
        return real(self, others[0] if others and self.coming else offset, size_bytes)

    monkeypatch.setattr(Promotions, "_slot_view", astray)
    assert "lease" in rules(seed=8, copy_delay_s=0.2)


def test_a_promotion_whose_protection_never_ends(monkeypatch):
    monkeypatch.setattr(Promotions, "_let_go", lambda self, promotion: None)
    assert "references" in rules(slots=100)


def test_a_block_that_is_never_written_down(monkeypatch):
    real = Tiering._write_batch

    async def tired(self):
        if clock.now_s() > 5:
            await asyncio.sleep(1e6)
        return await real(self)

    monkeypatch.setattr(Tiering, "_write_batch", tired)
    assert "references" in rules(slots=100)


def test_the_router_must_hear_of_the_tier(monkeypatch):
    monkeypatch.setattr(Tiering, "_on_tier", lambda self, changes: None)
    assert "index" in rules(*ROT, *DEATH, slots=24)


def test_a_life_that_was_replaced_must_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(self: Epochs, node: NodeId, epoch: Epoch, generation: Generation) -> Epoch:
        return epoch

    def end(self: MemberRegistry, before: _Member, info: NodeInfo) -> None:
        before.wake.set()

    monkeypatch.setattr(Epochs, "shown", shown)
    monkeypatch.setattr(MemberRegistry, "_end", end)
    assert rules(Zombie(5.0, FLEET.stores[0], 6.0)) & {"references", "fenced"}

"""A tier of objects: its service fails in every way, its budget holds, and each life cleans up after the last one."""

import asyncio
import mmap
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from kvstore.tiers import object_tier
from kvstore.tiers.base import Change, TierBlock
from kvstore.tiers.fake_objects import MemoryObjects
from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.objects import ObjectsRefused, pack_name
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.blocks import Removed, Stored
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

SLOT = 4096
SLOTS = 8
ROOT = BlockHash(b"\xff" * 16)


class Flaky(MemoryObjects):
    """Fails some calls, keeps some bodies short, loses some objects."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_share = 0.0
        self.refuse_deletes = False
        self.dice = random.Random(5)

    async def delete(self, names: list[str]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.refuse_deletes:
            raise ObjectsRefused("no right to delete")
        await super().delete(names)

    async def _try(self) -> None:
        await asyncio.sleep(0)
        self.failing = self.dice.random() < self.fail_share
        await super()._try()


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b".")) if name else ROOT


def content(name: str) -> bytes:
    return random.Random(name).randbytes(1000 + len(name))


def block(name: str, parent: str = "") -> TierBlock:
    return TierBlock(h(name), h(parent), len(content(name)), checksum(content(name)))


def page(data: bytes = b"") -> memoryview:
    view = memoryview(mmap.mmap(-1, SLOT))
    view[: len(data)] = data
    return view


async def begin(objects: MemoryObjects, slots: int = SLOTS) -> ObjectTier:
    tier = ObjectTier("s3", objects, InlineOffload(), slots, SLOT)
    await tier.recover()
    return tier


async def store(tier: ObjectTier, *names: str) -> list[str]:
    return list(await tier.store([block(name) for name in names], [page(content(name)) for name in names]))


async def load(tier: ObjectTier, *names: str) -> list[str]:
    views = [page() for _ in names]
    outcomes = await tier.load([h(name) for name in names], views)
    for name, view, outcome in zip(names, views, outcomes, strict=True):
        assert outcome != "loaded" or bytes(view[: len(content(name))]) == content(name)
    return list(outcomes)


def play(case: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await case

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(object_tier, "PAUSE_S", 0.01)
    monkeypatch.setattr(object_tier, "PAUSE_MAX_S", 0.05)


async def until_available(tier: ObjectTier) -> None:
    while not tier.available:  # noqa: ASYNC110 - polls a flag
        await asyncio.sleep(0.005)


def test_an_outage_costs_misses_and_nothing_else() -> None:
    async def case() -> None:
        objects = MemoryObjects()
        tier = await begin(objects)
        told: list[Change] = []
        tier.listen(told.extend)
        running = asyncio.create_task(tier.run())
        names = [f"b{i}" for i in range(4)]
        await store(tier, *names)
        objects.failing = True
        assert await load(tier, *names) == ["unavailable"] * 4
        assert not tier.available
        gets = tier.stats.gets
        assert await load(tier, *names, "x") == ["unavailable"] * 4 + ["absent"]
        assert tier.stats.gets == gets, "nobody asks while it is known not to answer"
        assert await store(tier, "b0", "new") == ["present", "failed"]
        assert len(tier) == 4
        objects.failing = False
        await until_available(tier)
        assert await load(tier, *names) == ["loaded"] * 4
        assert await store(tier, "new") == ["stored"]
        assert told == [Stored(h(name)) for name in [*names, "new"]]
        assert tier.stats.outages == 1
        tier.check()
        running.cancel()

    play(case())


def test_one_failure_is_no_outage() -> None:
    async def case() -> None:
        objects = MemoryObjects()
        tier = await begin(objects)
        await store(tier, "a")
        for _ in range(10):
            objects.failing = True
            assert await load(tier, "a") == ["unavailable"]
            objects.failing = False
            assert await load(tier, "a") == ["loaded"]
        assert tier.stats.outages == 0

    play(case())


def test_a_service_that_is_dead_at_the_start_is_found_when_it_comes() -> None:
    async def case() -> None:
        objects = MemoryObjects()
        await store(await begin(objects), "a", "b")
        objects.failing = True
        tier = ObjectTier("s3", objects, InlineOffload(), SLOTS, SLOT)
        told: list[Change] = []
        tier.listen(told.extend)
        running = asyncio.create_task(tier.run())
        await asyncio.sleep(0.03)
        assert not tier.available
        assert await store(tier, "c") == ["failed"]
        assert await load(tier, "a") == ["absent"]
        assert told == []
        objects.failing = False
        await until_available(tier)
        assert {change.hash for change in told} == {h("a"), h("b")}
        assert await load(tier, "a", "b") == ["loaded"] * 2
        assert tier.stats.recovered == 2
        running.cancel()

    play(case())


def test_lost_objects_and_short_ones_are_dropped_and_told() -> None:
    async def case() -> None:
        objects = MemoryObjects()
        tier = await begin(objects)
        told: list[Change] = []
        tier.listen(told.extend)
        await store(tier, "lost", "short", "flipped", "good")
        by_hash = {name[:32]: name for name in objects.data}
        del objects.data[by_hash[h("lost").hex()]]
        del objects.data[by_hash[h("short").hex()]][-1]
        objects.data[by_hash[h("flipped").hex()]][500] ^= 1
        assert await load(tier, "lost", "short", "flipped", "good") == ["failed", "corrupt", "corrupt", "loaded"]
        assert (tier.stats.lost, tier.stats.corrupt) == (1, 2)
        assert {change.hash for change in told if isinstance(change, Removed)} == {h("lost"), h("short"), h("flipped")}
        assert len(objects.data) == 1, "what is bad is deleted"
        assert await store(tier, "lost", "short", "flipped") == ["stored"] * 3
        assert await load(tier, "lost", "short", "flipped") == ["loaded"] * 3
        tier.check()

    play(case())


def test_there_are_never_more_objects_than_the_budget_has_slots() -> None:
    async def case() -> None:
        objects = Flaky()
        objects.fail_share = 0.1
        for life in range(5):
            tier = ObjectTier("s3", objects, InlineOffload(), SLOTS, SLOT)
            running = asyncio.create_task(tier.run())
            await until_available(tier)
            dice = random.Random(life)

            async def work(lane: int, tier: ObjectTier, dice: random.Random) -> None:
                for i in range(40):
                    await until_available(tier)
                    names = [f"{lane}.{i}.{j}" for j in range(dice.randrange(1, 4))]
                    await store(tier, *names)
                    await load(tier, *names)
                    if dice.random() < 0.3:
                        await tier.drop(h(names[0]))

            await asyncio.gather(*(work(lane, tier, dice) for lane in range(4)))
            tier.check()
            running.cancel()
        assert objects.most <= SLOTS
        assert objects.most == SLOTS, "the test must fill it to mean anything"

    play(case())


def test_what_cannot_be_deleted_stops_what_would_be_stored() -> None:
    async def case() -> None:
        objects = Flaky()
        tier = await begin(objects)
        await store(tier, *[f"b{i}" for i in range(SLOTS)])
        objects.refuse_deletes = True
        assert await store(tier, "next") == ["failed"]
        assert len(objects.data) == SLOTS
        assert not tier.available
        tier.check()

    play(case())


def test_a_life_deletes_what_is_of_no_use_and_leaves_alone_what_is_not_its_own() -> None:
    async def case() -> None:
        objects = MemoryObjects()
        await store(await begin(objects), *[f"b{i}" for i in range(6)])
        objects.data[pack_name(block("b0"), 10_000)] = bytearray(content("b0"))  # a newer copy
        objects.data[pack_name(block("torn"), 10_001)] = bytearray(b"short")
        objects.data["somebody/elses"] = bytearray(b"notes")
        tier = await begin(objects, slots=4)
        assert set(tier.held()) == {h("b0"), h("b3"), h("b4"), h("b5")}
        assert len(objects.data) == 5
        assert "somebody/elses" in objects.data
        assert tier.stats.useless == 4
        assert await load(tier, "b0", "b3") == ["loaded"] * 2
        assert await store(tier, "x") == ["stored"]
        again = await begin(objects, slots=4)
        assert again.find(h("x")) is not None
        assert again.find(h("b3")) is None, "the oldest of the last life made room first"

    play(case())


def test_two_writers_of_one_prefix_serve_no_wrong_byte() -> None:
    """It is not allowed, and what it costs is misses."""

    async def case() -> None:
        objects = MemoryObjects()
        one, other = await begin(objects), await begin(objects)
        for i in range(30):
            await asyncio.gather(store(one, f"b{i}"), store(other, f"b{i + 3}"))
            for tier in (one, other):
                held = [bytes(block_hash).rstrip(b".").decode() for block_hash in tier.held()]
                assert set(await load(tier, *held)) <= {"loaded", "failed"}
        one.check()
        other.check()

    play(case())


def test_a_cancelled_store_ends_with_its_views_let_go() -> None:
    async def case() -> None:
        objects = MemoryObjects()
        tier = await begin(objects)
        storing = asyncio.create_task(store(tier, "a", "b"))
        await asyncio.sleep(0)
        storing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await storing
        assert await load(tier, "a", "b") == ["loaded"] * 2
        tier.check()

    play(case())


@pytest.mark.slow
def test_a_hundred_thousand_objects_come_back_in_seconds() -> None:
    async def case() -> None:
        objects = MemoryObjects()
        parent = ROOT
        for i in range(100_000):
            own = BlockHash(i.to_bytes(16))
            objects.data[pack_name(TierBlock(own, parent, 3, checksum(own)), i)] = bytearray(b"abc")
            parent = own if i % 100 else ROOT
        tier = await begin(objects, slots=100_000)
        assert len(tier) == 100_000
        assert tier.stats.listings == 100

    play(case())

"""Two tiers as one: copies go down in the background, come up in passing, and one half may fail."""

import asyncio
import mmap
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from kvstore.tiers import object_tier, stack
from kvstore.tiers.base import TierBlock, part_of
from kvstore.tiers.fake import MemoryDevice
from kvstore.tiers.fake_objects import MemoryObjects
from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.slot_tier import SlotTier
from kvstore.tiers.stack import Stack
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.blocks import Change, Moved, Removed, Stored
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

SLOT = 4096
ROOT = BlockHash(b"\xff" * 16)


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b"."))


def content(name: str) -> bytes:
    return random.Random(name).randbytes(1000 + len(name))


def page(data: bytes = b"") -> memoryview:
    view = memoryview(mmap.mmap(-1, SLOT))
    view[: len(data)] = data
    return view


class Bed:
    """Both halves, and one life of them at a time."""

    def __init__(self, upper_slots: int = 4, lower_slots: int = 16) -> None:
        self.device = MemoryDevice(upper_slots, SLOT)
        self.objects = MemoryObjects()
        self.lower_slots = lower_slots

    async def begin(self) -> None:
        self.upper = SlotTier("disk", self.device, InlineOffload(), InlineOffload())
        self.lower = ObjectTier("s3", self.objects, InlineOffload(), self.lower_slots, SLOT)
        self.tier = Stack(self.upper, self.lower, SLOT)
        self.told: list[Change] = []
        self.tier.listen(self.told.extend)
        self.running = asyncio.create_task(self.tier.run())
        await until(lambda: self.lower.available)

    async def end(self) -> None:
        """Of this life, at any moment."""
        self.running.cancel()
        with suppress(asyncio.CancelledError):
            await self.running
        self.tier.check()

    async def store(self, *names: str) -> list[str]:
        blocks = [TierBlock(h(name), ROOT, len(content(name)), checksum(content(name))) for name in names]
        return list(await self.tier.store(blocks, [page(content(name)) for name in names]))

    async def load(self, *names: str) -> list[str]:
        views = [page() for _ in names]
        outcomes = await self.tier.load([h(name) for name in names], views)
        for name, view, outcome in zip(names, views, outcomes, strict=True):
            assert outcome != "loaded" or bytes(view[: len(content(name))]) == content(name)
        return list(outcomes)

    def part(self, block_hash: BlockHash) -> int:
        """The fastest of its parts that has the block."""
        place = part_of(self.tier, block_hash)
        assert place is not None
        return place

    def visible(self) -> set[BlockHash]:
        """What a listener of its changes knows."""
        known: dict[BlockHash, int] = {}
        for change in self.told:
            if isinstance(change, Removed):
                del known[change.hash]
                continue
            assert (change.hash in known) == isinstance(change, Moved), "told twice"
            known[change.hash] = change.tier
        assert all(part_of(self.tier, block_hash) == tier for block_hash, tier in known.items())
        return set(known)

    async def copied(self) -> None:
        await until(lambda: not self.tier.behind)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - polls
            await asyncio.sleep(0.002)


def play(case: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await case

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(object_tier, "PAUSE_S", 0.01)
    monkeypatch.setattr(object_tier, "PAUSE_MAX_S", 0.05)
    monkeypatch.setattr(stack, "RETRY_S", 0.01)


NAMES = [f"b{i}" for i in range(10)]


def test_what_the_upper_tier_gave_up_comes_from_the_lower_and_goes_up_again() -> None:
    async def case() -> None:
        bed = Bed()
        await bed.begin()
        for name in NAMES:
            assert await bed.store(name) == ["stored"]
            await bed.copied()
        assert (len(bed.upper), len(bed.lower), len(bed.tier)) == (4, 10, 10)
        assert bed.visible() == {h(name) for name in NAMES} == set(bed.tier.held())
        assert not any(isinstance(change, Removed) for change in bed.told)
        assert await bed.load("b0", "b9", "nobody") == ["loaded", "loaded", "absent"]
        assert bed.upper.find(h("b0")) is not None
        assert bed.tier.moves.copied_up == 1
        gets = bed.lower.stats.gets
        assert await bed.load("b0") == ["loaded"]
        assert bed.lower.stats.gets == gets
        assert bed.tier.moves.copied_down == 10, "what came up needs no second copy"
        await bed.end()

    play(case())


def test_an_outage_below_delays_copies_and_loses_only_what_has_no_room_above() -> None:
    async def case() -> None:
        bed = Bed(upper_slots=6)
        await bed.begin()
        bed.objects.failing = True
        for name in NAMES[:4]:
            assert await bed.store(name) == ["stored"]
        await until(lambda: not bed.lower.available)
        assert bed.tier.behind == 4
        assert await bed.load(*NAMES[:4]) == ["loaded"] * 4
        for name in NAMES[4:]:
            await bed.store(name)
        assert bed.tier.moves.evicted_uncopied == 4
        assert bed.visible() == {h(name) for name in NAMES[4:]}
        bed.objects.failing = False
        await bed.copied()
        assert set(bed.lower.held()) == {h(name) for name in NAMES[4:]}
        assert bed.visible() == set(bed.tier.held())
        await bed.end()

    play(case())


def test_what_waited_is_copied_by_the_next_life() -> None:
    async def case() -> None:
        bed = Bed()
        await bed.begin()
        bed.objects.failing = True
        await bed.store("a", "b")
        await bed.end()
        bed.objects.failing = False
        await bed.begin()
        await bed.copied()
        assert set(bed.lower.held()) == {h("a"), h("b")}
        await bed.end()
        await bed.begin()
        assert bed.tier.behind == 0
        assert bed.lower.stats.puts == 0, "what is there is not sent again"
        await bed.end()

    play(case())


def test_a_bad_block_above_is_read_from_below() -> None:
    async def case() -> None:
        bed = Bed()
        await bed.begin()
        await bed.store("a", "b")
        await bed.copied()
        bed.device.data[10] ^= 1
        assert await bed.load("a", "b") == ["loaded"] * 2
        assert bed.upper.stats.corrupt == 1
        assert bed.upper.find(h("a")) is not None, "and it is mended"
        assert bed.visible() == {h("a"), h("b")}
        await bed.end()

    play(case())


def test_a_dead_device_above_leaves_the_lower_tier() -> None:
    async def case() -> None:
        bed = Bed()
        await bed.begin()
        await bed.store("a")
        await bed.copied()
        bed.device.failing = True
        assert await bed.store("b") == ["stored"]
        assert await bed.load("a", "b") == ["loaded"] * 2
        assert set(bed.lower.held()) == {h("a"), h("b")}
        assert bed.visible() == set(bed.tier.held())
        await bed.end()

    play(case())


def test_a_lower_tier_that_is_full_ends_the_copying_of_what_it_refuses() -> None:
    async def case() -> None:
        bed = Bed(upper_slots=8, lower_slots=2)
        await bed.begin()
        chain = [f"c{i}" for i in range(3)]
        for i, name in enumerate(chain):
            parent = h(chain[i - 1]) if i else ROOT
            block = TierBlock(h(name), parent, len(content(name)), checksum(content(name)))
            await bed.tier.store([block], [page(content(name))])
            await bed.copied()
        assert set(bed.lower.held()) == {h("c0"), h("c1")}, "a prefix does not make room for its continuation"
        puts = bed.lower.stats.puts
        await asyncio.sleep(0.1)
        assert bed.lower.stats.puts == puts
        assert await bed.load(*chain) == ["loaded"] * 3
        await bed.end()

    play(case())


def test_a_dropped_block_is_gone_from_both() -> None:
    async def case() -> None:
        bed = Bed()
        await bed.begin()
        await bed.store("a", "b")
        await bed.copied()
        await bed.tier.drop(h("a"))
        assert await bed.load("a", "b") == ["absent", "loaded"]
        assert bed.told[-1] == Removed(h("a"))
        assert len(bed.objects.data) == 1
        await bed.end()

    play(case())


@pytest.mark.parametrize("seed", range(8))
def test_under_any_load_and_faults_a_listener_knows_what_is_held(seed: int) -> None:
    async def case() -> None:
        dice = random.Random(seed)
        bed = Bed(upper_slots=6, lower_slots=12)
        for _ in range(3):
            await bed.begin()
            bed.told[:] = [Stored(block_hash, bed.part(block_hash)) for block_hash in bed.tier.held()]

            async def work(lane: int) -> None:
                for i in range(30):
                    names = [f"{lane}.{dice.randrange(i + 1)}" for _ in range(2)]
                    match dice.randrange(5):
                        case 0:
                            await bed.tier.drop(h(names[0]))
                        case 1:
                            bed.objects.failing = dice.random() < 0.5
                        case 2:
                            await bed.load(*dict.fromkeys(names))
                        case _:
                            await bed.store(*dict.fromkeys(names))
                    await asyncio.sleep(dice.random() * 0.002)

            await asyncio.gather(*(work(lane) for lane in range(4)))
            bed.objects.failing = False
            await bed.copied()
            assert bed.visible() == set(bed.tier.held())
            assert len(bed.objects.data) <= 12
            await bed.end()

    play(case())

"""What every tier does: one suite over a real file, a bucket behind a real server, fakes of both in memory, and two
tiers as one."""

import asyncio
import contextlib
import mmap
import os
import random
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.tiers.base import Change, Tier, TierBlock
from kvstore.tiers.disk import DiskFile, NoDisk, open_disk
from kvstore.tiers.fake import MemoryDevice, PowerCut
from kvstore.tiers.fake_objects import MemoryObjects
from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.objects import Objects, parse_url
from kvstore.tiers.records import RECORDS_PER_PAGE, Layout, Record, unpack_records
from kvstore.tiers.s3 import S3Objects
from kvstore.tiers.slot_tier import SlotTier
from kvstore.tiers.stack import Stack
from tracehaul.runtime.offload import InlineOffload, Offload, ThreadOffload
from tracehaul.wire.blocks import Removed, Stored
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

SLOT = 8192
SLOTS = 8
LAYOUT = Layout(SLOT, SLOTS)
ROOT = BlockHash(b"\xff" * 16)


class Place:
    """Where a tier's bytes survive its life."""

    def __init__(self, kind: str, folder: Path, url: str = "") -> None:
        self.kind = kind
        self.path = folder / "tier.blocks"
        self.url = url
        self.reset()

    def reset(self) -> None:
        """Forget all that was stored."""
        self.path.unlink(missing_ok=True)
        self.memory = MemoryDevice(SLOTS, SLOT)
        self.objects: Objects = MemoryObjects()
        if self.kind == "s3":
            self.objects = S3Objects(*parse_url(f"{self.url}/{random.randbytes(4).hex()}"))

    async def tier(self) -> Tier:
        """Another life."""
        match self.kind:
            case "file":
                return SlotTier(self.kind, DiskFile(self.path, LAYOUT), ThreadOffload("r", 2), ThreadOffload("w", 2))
            case "memory":
                return SlotTier(self.kind, self.memory, InlineOffload(), InlineOffload())
            case "stack":
                upper = SlotTier("upper", self.memory, InlineOffload(), InlineOffload())
                return Stack(upper, await self._objects(InlineOffload()), SLOT)
            case _:
                return await self._objects(ThreadOffload("s3", 2) if self.kind == "s3" else InlineOffload())

    async def _objects(self, offload: Offload) -> ObjectTier:
        tier = ObjectTier("objects", self.objects, offload, SLOTS, SLOT)
        await tier.recover()
        return tier

    async def flip(self, slot: int, at: int) -> None:
        """Change one bit of a block: by its place, or of the block that was stored there first."""
        if self.kind in ("memory", "stack"):
            self.memory.data[slot * SLOT + at] ^= 1
        elif self.kind == "file":
            with self.path.open("r+b") as file:
                file.seek(LAYOUT.data_offset + slot * SLOT + at)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
        else:
            (found,) = [each async for page in self.objects.pages() for each in page if _is(each.name, NAMES[slot])]
            body = await self.objects.get(found.name, found.size_bytes)
            assert body is not None
            flipped = bytearray(body)
            flipped[at] ^= 1
            await self.objects.put(found.name, memoryview(flipped))


def _is(object_name: str, name: str) -> bool:
    return object_name.startswith(h(name).hex())


class Life:
    """One life of a tier, and what it told."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.told: list[Change] = []
        self.tier.listen(self.told.extend)

    @classmethod
    async def begin(cls, place: Place) -> "Life":
        return cls(await place.tier())

    async def store(self, *names: str, parents: Sequence[str] = ()) -> list[str]:
        blocks = [block(name, parent) for name, parent in zip(names, parents or [""] * len(names), strict=True)]
        return list(await self.tier.store(blocks, [filled(content(name)) for name in names]))

    async def load(self, *names: str) -> list[bytes | str]:
        views = [filled(b"") for _ in names]
        outcomes = await self.tier.load([h(name) for name in names], views)
        return [
            bytes(view[: len(content(name))]) if outcome == "loaded" else outcome
            for name, view, outcome in zip(names, views, outcomes, strict=True)
        ]


Case = Callable[[Place], Awaitable[None]]


ONE = ["file", "memory", "objects", pytest.param("s3", marks=pytest.mark.slow)]


def _player(request: pytest.FixtureRequest, folder: Path) -> Callable[[Case], None]:
    url = request.getfixturevalue("s3_url")() if request.param == "s3" else ""

    def run(case: Case) -> None:
        async def main() -> None:
            async with asyncio.timeout(60):
                await case(Place(request.param, folder, url))

        asyncio.run(main())

    return run


@pytest.fixture(params=[*ONE, "stack"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Case], None]:
    return _player(request, tmp_path)


@pytest.fixture(params=ONE)
def play_one(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Case], None]:
    """Not for two tiers as one: where one is full, the other may not be."""
    return _player(request, tmp_path)


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b".")) if name else ROOT


def content(name: str) -> bytes:
    return random.Random(name).randbytes(4097 + len(name) * 100)


def block(name: str, parent: str = "") -> TierBlock:
    data = content(name)
    return TierBlock(h(name), h(parent), len(data), checksum(data))


def filled(data: bytes) -> memoryview:
    view = memoryview(mmap.mmap(-1, SLOT))
    view[: len(data)] = data
    return view


NAMES = [f"b{i}" for i in range(SLOTS)]


def test_blocks_come_back_as_they_were_stored(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        assert await life.store("a", "b", "c") == ["stored"] * 3
        assert await life.load("c", "nothing", "a", "b") == [content("c"), "absent", content("a"), content("b")]
        assert life.told == [Stored(h("a")), Stored(h("b")), Stored(h("c"))]
        assert len(life.tier) == 3
        assert life.tier.bytes_used == sum(len(content(name)) for name in "abc")
        assert life.tier.find(h("a")) == block("a")
        assert await life.store("b", "d") == ["present", "stored"]
        life.tier.check()
        life.tier.close()

    play(case)


def test_another_life_finds_what_was_stored(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        await life.store("a", "b", parents=["", "a"])
        await life.store("c")
        await life.tier.drop(h("c"))
        life.tier.close()
        again = await Life.begin(place)
        assert set(again.tier.held()) == {h("a"), h("b")}
        assert again.tier.stats.recovered == 2
        assert again.tier.find(h("b")) == block("b", "a")
        assert again.told == []
        assert await again.load("a", "b", "c") == [content("a"), content("b"), "absent"]
        again.tier.check()
        again.tier.close()

    play(case)


def test_a_full_tier_evicts_the_oldest_leaf_and_never_grows(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        await life.store(*NAMES, parents=["", *NAMES[:3], "", "", "", ""])
        life.tier.touch(h("b4"))
        assert await life.store("x", "y") == ["stored"] * 2
        assert [change.hash for change in life.told if isinstance(change, Removed)] == [h("b3"), h("b2")]
        assert len(life.tier) == SLOTS
        assert life.tier.bytes_used <= life.tier.bytes_max
        assert await life.load("x", "y", "b3", "b4") == [content("x"), content("y"), "absent", content("b4")]
        life.tier.close()
        again = await Life.begin(place)
        assert set(again.tier.held()) == {h(name) for name in [*NAMES[:2], *NAMES[4:], "x", "y"]}
        again.tier.close()

    play(case)


def test_a_tier_full_of_prefixes_refuses(play_one: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        await life.store(*NAMES, parents=["", *NAMES[:-1]])
        assert await life.store("next", parents=[NAMES[-1]]) == ["full"]
        assert life.tier.stats.full == 1
        assert len(life.tier) == SLOTS
        life.tier.check()
        life.tier.close()

    play_one(case)


def test_every_flip_is_found_and_none_is_served(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        dice = random.Random(7)
        for _ in range(20):
            life = await Life.begin(place)
            await life.store(*NAMES)
            flipped = dice.sample(range(SLOTS), 3)
            held = {life.tier.find(h(name)): name for name in NAMES}
            slots = {name: i for i, name in enumerate(NAMES)}  # in order, as the tier started empty
            assert len(held) == SLOTS
            for slot in flipped:
                await place.flip(slot, dice.randrange(len(content(NAMES[slot]))))
            found = await life.load(*NAMES)
            for name, data in zip(NAMES, found, strict=True):
                assert data == ("corrupt" if slots[name] in flipped else content(name))
            assert life.tier.stats.corrupt == 3
            assert [c.hash for c in life.told if isinstance(c, Removed)] == [h(NAMES[slot]) for slot in sorted(flipped)]
            assert len(life.tier) == SLOTS - 3
            life.tier.check()
            life.tier.close()
            again = await Life.begin(place)
            assert len(again.tier) == SLOTS - 3, "a dropped block must not come back"
            again.tier.close()
            place.reset()

    play(case)


@pytest.mark.slow
def test_ten_thousand_flips_in_the_file_are_all_found(tmp_path: Path) -> None:
    async def main() -> None:
        dice = random.Random(11)
        place = Place("file", tmp_path)
        life = await Life.begin(place)
        flips = 0
        while flips < 10_000:
            await life.store(*NAMES)
            # A full tier takes slots in the order in which they became free: find each block's by its bytes.
            file = place.path.read_bytes()
            for name in NAMES:
                at = file.index(content(name)[:64], LAYOUT.data_offset) - LAYOUT.data_offset
                await place.flip(at // SLOT, dice.randrange(len(content(name))))
                flips += 1
            assert set(await life.load(*NAMES)) == {"corrupt"}
            assert len(life.tier) == 0
        assert life.tier.stats.corrupt == flips
        assert life.tier.stats.loaded == 0
        life.tier.close()

    asyncio.run(main())


def test_scrubbing_finds_what_nobody_reads(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        await life.store(*NAMES)
        await place.flip(2, 100)
        await place.flip(7, 4000)
        view = filled(b"")
        at, visited = None, 0
        while (at := await life.tier.scrub(at, view)) is not None:
            visited += 1
        assert visited == SLOTS == life.tier.stats.scrubbed
        assert life.tier.stats.corrupt == 2
        assert life.tier.stats.loaded == 0
        assert set(life.tier.held()) == {h(name) for name in NAMES} - {h("b2"), h("b7")}
        life.tier.close()

    play(case)


def test_a_scrub_of_nothing_ends(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        assert await life.tier.scrub(None, filled(b"")) is None
        await life.tier.flush()
        life.tier.close()

    play(case)


def test_a_block_dropped_under_a_read_is_read_to_its_end(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        await life.store(*NAMES)
        reading = asyncio.create_task(life.load("b0"))
        for _ in range(2):
            await asyncio.sleep(0)  # until it has begun
        await life.tier.drop(h("b0"))
        await life.store("x", "y", "z")
        assert await reading == [content("b0")]
        assert await life.load("b0", "x") == ["absent", content("x")]
        life.tier.check()
        life.tier.close()

    play(case)


def test_many_at_once_agree(play: Callable[[Case], None]) -> None:
    async def case(place: Place) -> None:
        life = await Life.begin(place)
        dice = random.Random(3)

        async def work(seed: int) -> None:
            for i in range(20):
                name = f"{seed}.{i}"
                if await life.store(name) == ["stored"]:
                    assert await life.load(name) in ([content(name)], ["absent"])
                if dice.random() < 0.2:
                    await life.tier.drop(h(name))

        await asyncio.gather(*(work(seed) for seed in range(6)))
        life.tier.check()
        names = [bytes(block_hash).rstrip(b".").decode() for block_hash in life.tier.held()]
        assert await life.load(*names) == [content(name) for name in names]
        held = set(life.tier.held())
        life.tier.close()
        again = await Life.begin(place)
        assert set(again.tier.held()) == held
        assert again.tier.stats.unreadable == 0
        assert await again.load(*names) == [content(name) for name in names]
        again.tier.close()

    play(case)


def test_a_device_that_fails_costs_misses_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        place = Place("memory", tmp_path)
        life = await Life.begin(place)
        await life.store("a", "b")
        place.memory.failing = True
        assert await life.store("c") == ["failed"]
        assert await life.load("a") == ["failed"]
        await life.tier.flush()
        place.memory.failing = False
        assert await life.load("a", "b") == ["absent", content("b")]
        assert await life.store("a", "c") == ["stored"] * 2
        life.tier.check()
        again = await Life.begin(place)
        assert set(again.tier.held()) == {h("a"), h("b"), h("c")}
        assert again.tier.stats.unreadable == 0

    asyncio.run(main())


def test_killed_between_any_two_pages_nothing_stored_is_lost_and_nothing_torn_is_found(tmp_path: Path) -> None:
    async def main() -> None:
        for seed in range(300):
            dice = random.Random(seed)
            place = Place("memory", tmp_path)
            place.memory.writes_left = dice.randrange(60)
            life = await Life.begin(place)
            removed: set[BlockHash] = set()
            stored: set[BlockHash] = set()
            try:
                for i in range(0, 40, 2):
                    await life.store(f"{i}", f"{i + 1}", parents=["", f"{i}"])
                    stored = {c.hash for c in life.told if isinstance(c, Stored)}
                    removed = {c.hash for c in life.told if isinstance(c, Removed)}
            except PowerCut:
                pass
            stored |= {c.hash for c in life.told if isinstance(c, Stored)}
            removed |= {c.hash for c in life.told if isinstance(c, Removed)}
            place.memory.writes_left = None
            again = await Life.begin(place)
            assert stored - removed <= set(again.tier.held())
            assert again.tier.stats.unreadable == 0
            names = [bytes(block_hash).rstrip(b".").decode() for block_hash in again.tier.held()]
            assert await again.load(*names) == [content(name) for name in names], f"torn, seed {seed}"
            again.tier.check()

    asyncio.run(main())


# --- the file ---------------------------------------------------------------------------------------------


def test_a_file_belongs_to_one_process(tmp_path: Path) -> None:
    device = DiskFile(tmp_path / "t", LAYOUT)
    with pytest.raises(NoDisk, match="another process"):
        DiskFile(tmp_path / "t", LAYOUT)
    device.close()
    DiskFile(tmp_path / "t", LAYOUT).close()


def test_a_file_of_another_layout_starts_empty(tmp_path: Path) -> None:
    async def main() -> None:
        tier = await open_disk(tmp_path / "t", 100_000, SLOT)
        await tier.store([block("a")], [filled(content("a"))])
        tier.close()
        other = await open_disk(tmp_path / "t", 200_000, 2 * SLOT)
        assert len(other) == 0
        assert (tmp_path / "t").stat().st_size <= 200_000
        assert (tmp_path / "t").stat().st_blocks * 512 >= 180_000, "the room is taken at the start"
        other.close()
        with pytest.raises(NoDisk, match="holds no block"):
            await open_disk(tmp_path / "u", SLOT, SLOT)

    asyncio.run(main())


def test_a_file_that_grows_or_shrinks_keeps_what_fits(tmp_path: Path) -> None:
    async def main() -> None:
        path, held, views = tmp_path / "t", [block(name) for name in "abcdef"], 6
        tier = await open_disk(path, Layout(SLOT, 6).file_bytes, SLOT)
        assert await tier.store(held, [filled(content(name)) for name in "abcdef"]) == ["stored"] * 6
        tier.close()
        for slots, kept in ((40, 6), (41, 6), (5, 5), (100, 5), (3, 3), (1, 1)):
            tier = await open_disk(path, Layout(SLOT, slots).file_bytes, SLOT)
            tier.check()
            assert tier.stats.unreadable == 0
            assert len(tier) == kept, f"{slots} slots"
            assert path.stat().st_size <= Layout(SLOT, slots).file_bytes
            out = [filled(b"") for _ in range(views)]
            outcomes = await tier.load([b.hash for b in held], out)
            assert outcomes.count("loaded") == kept
            assert all(
                bytes(view[: b.size_bytes]) == content(name)
                for b, name, view, outcome in zip(held, "abcdef", out, outcomes, strict=True)
                if outcome == "loaded"
            )
            tier.close()

    asyncio.run(main())


@pytest.mark.parametrize("slots", [3, 60], ids=["shrinking", "growing"])
def test_killed_while_it_is_resized_a_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Every write of a resize may be the last."""

    class Killed(BaseException):
        pass

    async def main() -> None:
        path, real = tmp_path / "t", os.pwritev
        for last in range(5):
            path.unlink(missing_ok=True)
            tier = await open_disk(path, Layout(SLOT, 8).file_bytes, SLOT)
            await tier.store([block(name) for name in "abcdefgh"], [filled(content(name)) for name in "abcdefgh"])
            tier.close()
            done = 0

            def write(fd: int, run: list[memoryview], offset: int, last: int = last) -> int:
                nonlocal done
                if done == last:
                    os.close(fd)
                    raise Killed
                done += 1
                return real(fd, run, offset)

            monkeypatch.setattr(os, "pwritev", write)
            finished = True
            try:
                DiskFile(path, Layout(SLOT, slots)).close()
            except Killed:
                finished = False
            monkeypatch.setattr(os, "pwritev", real)
            device = DiskFile(path, Layout(SLOT, slots if finished else 8))
            tier = SlotTier("disk", device, InlineOffload(), InlineOffload())
            assert len(tier) >= min(slots - 1, 2)
            names = [name for name in "abcdefgh" if tier.find(block(name).hash) is not None]
            out = [filled(b"") for _ in names]
            assert await tier.load([block(name).hash for name in names], out) == ["loaded"] * len(names)
            tier.close()
            if finished:
                return
        raise AssertionError("a resize takes more writes than that")

    asyncio.run(main())


def test_a_full_tier_writes_its_records_once_per_store() -> None:
    """What makes room for the next store is erased with what this one published."""

    class Device(MemoryDevice):
        calls = 0

        def write(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
            named = {record.slot for record in unpack_records(self.records(), layout) if isinstance(record, Record)}
            assert not named & set(slots), "no record names what is being written"
            super().write(slots, views)

        def write_records(self, records: Mapping[int, bytes]) -> None:
            self.calls += 1
            super().write_records(records)

    layout = Layout(SLOT, 256)
    device = Device(layout.slots_max, SLOT)
    tier = SlotTier("disk", device, InlineOffload(), InlineOffload())
    names = (f"{n}" for n in range(10_000))

    async def store() -> None:
        blocks = [block(next(names)) for _ in range(4)]
        assert await tier.store(blocks, [filled(b"x") for _ in blocks]) == ["stored"] * 4

    async def main() -> None:
        for _ in range(66):
            await store()
        device.calls = 0
        for _ in range(20):
            await asyncio.gather(store(), store())
        assert device.calls == 40
        assert len(tier) >= 256 - 8
        tier.check()
        device.failing = True
        lost = [block(next(names))]
        assert await tier.store(lost, [filled(b"x")]) == ["failed"]
        device.failing = False
        await store()
        tier.check()
        again = SlotTier("disk", device, InlineOffload(), InlineOffload())
        assert set(tier.held()) <= set(again.held())

    asyncio.run(main())


def test_records_of_one_page_are_written_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads at once, some of whose writes fail: what returned is in the file, and no page goes twice at once."""
    slots = 3 * RECORDS_PER_PAGE
    layout = Layout(SLOT, slots)
    device = DiskFile(tmp_path / "t", layout)
    real, dice, busy, returned = os.pwritev, random.Random(1), set[int](), dict[int, bytes]()

    def write(fd: int, run: Sequence[memoryview], offset: int) -> int:
        pages = range(offset, offset + sum(view.nbytes for view in run), 4096)
        assert not busy & set(pages)
        busy.update(pages)
        threading.Event().wait(dice.random() / 1000)
        try:
            if dice.random() < 0.2:
                raise OSError(5, "input/output error")
            return real(fd, run, offset)
        finally:
            busy.difference_update(pages)

    def work(lane: int) -> None:
        own = random.Random(lane)
        for turn in range(30):
            mine = own.sample(range(lane, slots, 4), 5)
            records = {slot: bytes([lane + 1, turn]) * 32 for slot in mine}
            with contextlib.suppress(OSError):
                device.write_records(records)
                returned.update(records)
                for slot, record in records.items():
                    at = layout.records_offset + slot * 64
                    assert (tmp_path / "t").read_bytes()[at : at + 64] == record

    monkeypatch.setattr(os, "pwritev", write)
    with ThreadPoolExecutor(4) as pool:
        for lane in [pool.submit(work, lane) for lane in range(4)]:
            lane.result()
    assert len(returned) > slots / 2
    device.close()


def test_a_file_without_room_or_permission_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoDisk, match="cannot reserve"):
        DiskFile(tmp_path / "t", Layout(1 << 30, 1 << 20))
    with pytest.raises(NoDisk, match="cannot open"):
        DiskFile(Path("/proc/nowhere/t"), LAYOUT)


def test_a_file_system_without_direct_access_still_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "invalid argument")
        return real(path, flags, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(os, "open", refuse)
    device = DiskFile(tmp_path / "t", LAYOUT)
    assert not device.direct
    assert "O_DIRECT" in caplog.text
    device.write([3], [filled(b"abc")])
    view = filled(b"")
    device.read([3], [view])
    assert bytes(view[:3]) == b"abc"
    device.close()


def test_a_hundred_thousand_blocks_come_back(tmp_path: Path) -> None:
    from kvstore.tiers.records import Record, pack_record

    count = 100_000
    layout = Layout(4096, count)
    device = DiskFile(tmp_path / "t", layout)
    parent = ROOT
    records: dict[int, bytes] = {}
    for slot in range(count):
        own = BlockHash(slot.to_bytes(16))
        records[slot] = pack_record(Record(slot, slot + 1, TierBlock(own, parent, 4000, checksum(own))))
        parent = own if slot % 100 else ROOT
    device.write_records(records)
    device.close()

    async def main() -> None:
        tier = await open_disk(tmp_path / "t", layout.file_bytes, 4096)
        assert len(tier) == count
        tier.close()

    asyncio.run(main())

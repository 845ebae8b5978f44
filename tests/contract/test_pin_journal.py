"""The pin journal over memory and over a file: what was answered is found by the next life."""

import asyncio
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from kvstore.index.pin_records import Moment, pack_journal
from kvstore.node.pin_journal import DiskPinFile, PinFile, PinJournal, open_journal
from kvstore.node.pin_keeper import PinKeeper
from kvstore.tiers.fake import MemoryPinFile, PowerCut
from tracehaul.runtime import clock
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.blocks import Pin, PinKind
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.ids import BlockHash, TraceId

SLOT = 4096


def h(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16))


class Bed:
    """What survives lives of a node, and the clocks of the machine."""

    def __init__(self, open_file: Callable[[], PinFile]) -> None:
        self._open_file = open_file
        self.down_s = 0.0

    def moment(self) -> Moment:
        return Moment("b", clock.now_s() + self.down_s, 0.0)

    def live(self, slots: int = 64, **limits: float) -> "Life":
        config = StoreConfig(
            arena_bytes=slots * SLOT,
            slot_bytes=SLOT,
            hard_tenant_share_max=0.5,
            **limits,  # type: ignore[arg-type]
        )
        arena = Arena(config)
        journal = PinJournal(self._open_file(), InlineOffload(), self.moment)
        return Life(arena, journal, PinKeeper(arena, journal, config.pin_half_life_s))


class Life:
    def __init__(self, arena: Arena, journal: PinJournal, keeper: PinKeeper) -> None:
        self.arena, self.journal, self.keeper = arena, journal, keeper

    async def pin(self, trace: str, numbers: list[int], kind: PinKind = "hard", ttl_s: float = 100.0) -> None:
        pinned = self.arena.pin(Pin(TraceId(trace), tuple(map(h, numbers)), ttl_s, kind, tenant="acme"), clock.now_s())
        assert not isinstance(pinned, str)
        await self.keeper.keep(("acme", TraceId(trace)))

    async def unpin(self, trace: str) -> None:
        self.arena.unpin("acme", TraceId(trace))
        await self.keeper.keep(("acme", TraceId(trace)))

    def open(self) -> dict[str, tuple[str, list[int]]]:
        found = self.arena.open_pins(clock.now_s())
        return {key[1]: (pin.kind, sorted(int.from_bytes(b) for b in pin.hashes)) for key, pin in found}


@pytest.fixture(params=["memory", "disk"])
def bed(request: pytest.FixtureRequest, tmp_path: Path) -> Bed:
    memory = MemoryPinFile()
    return Bed(lambda: memory if request.param == "memory" else DiskPinFile(tmp_path / "s0.pins"))


def test_what_was_pinned_is_pinned_in_the_next_life(bed: Bed) -> None:
    async def main() -> None:
        first = bed.live()
        await asyncio.gather(*(first.pin(f"t{n}", [n, n + 1]) for n in range(5)))
        await first.pin("t1", [9], "soft")
        await first.unpin("t2")
        expected = first.open()
        assert len(expected) == 4
        for _ in range(2):  # a life that pins nothing forgets nothing
            again = bed.live()
            assert again.open() == expected
            assert again.journal.stats.recovered == 4
            again.arena.check()
        await again.unpin("t0")
        await again.pin("t9", [1])
        del expected["t0"]
        assert bed.live().open() == expected | {"t9": ("hard", [1])}

    asyncio.run(main())


def test_time_passes_while_the_node_is_down(bed: Bed) -> None:
    async def main() -> None:
        life = bed.live()
        await life.pin("short", [1], ttl_s=10.0)
        await life.pin("long", [2], ttl_s=100.0)
        await life.pin("soft", [3], "soft", ttl_s=1000.0)
        rank = life.arena.rank(h(3))
        assert rank is not None
        bed.down_s = 60.0
        life = bed.live()
        assert list(life.open()) == ["long", "soft"]
        assert life.arena.next_deadline_s() == pytest.approx(clock.now_s() + 40.0, abs=1.0)
        assert life.arena.rank(h(3)) == pytest.approx(rank - 1.0, abs=0.1), "one half-life"
        bed.down_s = -1000.0
        assert bed.live().open() == {}, "of what has no sensible age nothing is kept"

    asyncio.run(main())


def test_a_journal_stays_in_proportion_to_its_pins(bed: Bed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvstore.node.pin_journal.REWRITE_BYTES_MIN", 1000)

    async def main() -> None:
        life = bed.live()
        for round_ in range(200):
            await life.pin(f"t{round_ % 3}", [round_ % 7])
        assert life.journal.stats.rewritten > 10
        assert life.journal.stats.appended == 200
        again = bed.live()
        assert again.open() == life.open()
        assert len(again.journal._file.load()) < 5000

    asyncio.run(main())


def test_a_pin_beyond_the_limits_of_this_life_is_left_out(bed: Bed) -> None:
    async def main() -> None:
        life = bed.live(slots=64)
        await life.pin("small", [1])
        await life.pin("large", list(range(2, 30)))
        assert list(bed.live(slots=10).open()) == ["small"]

    asyncio.run(main())


def test_a_device_that_refuses_is_told_and_mends_itself() -> None:
    async def main() -> None:
        file = MemoryPinFile()
        bed = Bed(lambda: file)
        life = bed.live()
        await life.pin("a", [1])
        file.failing = True
        with pytest.raises(Unavailable, match="restart"):
            await life.pin("b", [2])
        assert "b" in life.open(), "it is in force"
        assert list(bed.live().open()) == ["a"]
        file.failing = False
        await life.pin("c", [3])
        assert list(bed.live().open()) == ["a", "b", "c"]
        assert (life.journal.stats.failed, life.journal.stats.rewritten) == (1, 2)

    asyncio.run(main())


def test_a_caller_that_leaves_takes_nothing_with_it() -> None:
    async def main() -> None:
        file = MemoryPinFile()
        bed = Bed(lambda: file)
        life = bed.live()
        callers = [asyncio.create_task(life.pin(f"t{n}", [n])) for n in range(1, 4)]
        await asyncio.sleep(0)
        for caller in callers[:2]:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await life.journal.aclose()
        assert sorted(bed.live().open()) == ["t1", "t2", "t3"]

    asyncio.run(main())


def test_killed_at_any_byte_nothing_answered_is_forgotten_and_nothing_ended_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.node.pin_journal.REWRITE_BYTES_MIN", 300)
    answered: dict[str, tuple[str, list[int]]] = {}

    async def work(bed: Bed) -> None:
        life = bed.live()
        for step in range(12):
            trace = f"t{step % 4}"
            if step % 5 == 4:
                await life.unpin(trace)
                answered.pop(trace, None)
            else:
                await life.pin(trace, [step])
                answered[trace] = life.open()[trace]

    file = MemoryPinFile()
    asyncio.run(work(Bed(lambda: file)))
    for cut in range(0, 3000, 7):
        file, survivor = MemoryPinFile(), MemoryPinFile()
        file.bytes_left = cut
        answered.clear()
        try:
            asyncio.run(work(Bed(lambda file=file: file)))
        except (PowerCut, asyncio.CancelledError):
            pass
        else:
            return
        survivor.data = file.data

        async def check(survivor: MemoryPinFile = survivor, cut: int = cut) -> None:
            found = Bed(lambda: survivor).live().open()
            # The one change under way when it was killed may be there or not.
            different = {t for t in {*answered, *found} if answered.get(t) != found.get(t)}
            assert len(different) <= 1, cut

        asyncio.run(check())
    raise AssertionError("it was never done")


async def restore_cpu_s(path: Path, pins: int) -> float:
    """Seconds of a processor that it takes to have that many pins again; the quickest of three times."""
    each = 6
    config = StoreConfig(arena_bytes=120_000 * SLOT, slot_bytes=SLOT, pins_tenant_max=pins)
    arena = Arena(config)
    journal = await open_journal(path)
    keeper = PinKeeper(arena, journal, config.pin_half_life_s)
    for n in range(pins):
        hashes = tuple(h(n * each + i) for i in range(each))
        arena.pin(Pin(TraceId(f"trace-{n}"), hashes, 1000.0), clock.now_s())
    await keeper.keep(("", TraceId("trace-0")))  # the first entry writes all
    await journal.aclose()
    took: list[float] = []
    for _ in range(3):
        arena = Arena(config)
        began_s = cpu_s()
        journal = await open_journal(path)
        PinKeeper(arena, journal, config.pin_half_life_s)
        took.append(cpu_s() - began_s)
        assert arena.pins == pins
        await journal.aclose()
    return min(took)


def cpu_s() -> float:
    """Of this process until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def test_sixteen_thousand_pins_come_back_in_proportion_to_their_number(tmp_path: Path) -> None:
    few_s = asyncio.run(restore_cpu_s(tmp_path / "few.pins", 2000))
    many_s = asyncio.run(restore_cpu_s(tmp_path / "many.pins", 16_000))
    assert many_s < 3 * 8 * few_s, "eight times the pins; the square would be sixty-four times the time"


def test_an_interrupted_rewrite_leaves_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "s0.pins"
    file = DiskPinFile(path)
    file.append(pack_journal([]))
    (tmp_path / "s0.pins.new").write_bytes(b"half of a new one")
    assert DiskPinFile(path).load() == pack_journal([])
    file.replace(b"x")
    file.append(b"y")
    assert path.read_bytes() == b"xy"
    assert [p.name for p in tmp_path.iterdir()] == ["s0.pins"]
    file.close()

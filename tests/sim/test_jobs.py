"""Batches over runners that die, freeze and come back, with a faulty ledger: every line ends exactly once, in order."""

import asyncio
import random
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import suppress

import pytest

from jobs.cap import fixed
from jobs.leases import Held, Leases, Taken
from jobs.ledger import MemoryLedger
from jobs.lines import Call, call_of
from jobs.retries import Answer, NoAnswer
from jobs.runner import LEASE_S, Job, Runner
from sim import loop as virtual
from tracehaul.runtime import clock

SEEDS = 40
LINES = 24
DEADLINE_S = 1e6
POISON = 5


class Faulty:
    """A ledger that is slow before and after it does something, and sometimes fails before or after: then whoever asked
    does not know. Its own process never dies, as a database's would not."""

    def __init__(self, ledger: MemoryLedger, dice: random.Random) -> None:
        self._ledger = ledger
        self._dice = dice
        self.well = False

    @property
    def ended(self) -> Container[int]:
        return self._ledger.ended

    async def _go(self) -> None:
        if not self.well:
            await asyncio.sleep(self._dice.expovariate(1 / 0.3))
            if self._dice.random() < 0.05:
                raise OSError("no space left on device")

    async def claim(self, line: int, now_s: float, until_s: float) -> Held | Taken:
        await self._go()
        said = await self._ledger.claim(line, now_s, until_s)
        await self._go()
        return said

    async def renew(self, line: int, fence: int, until_s: float) -> bool:
        await self._go()
        return await self._ledger.renew(line, fence, until_s)

    async def put_back(self, line: int, fence: int) -> bool:
        await self._go()
        return await self._ledger.put_back(line, fence)

    async def end(self, line: int, fence: int, said: bytes, *, ok: bool) -> bool:
        await self._go()
        kept = await self._ledger.end(line, fence, said, ok=ok)
        await self._go()
        return kept


class Lines:
    """Implements Source."""

    async def read(self, line: int) -> Call:
        return call_of(b'{"custom_id": "%d", "url": "/v1/completions", "body": {}}' % line)


class Moody:
    """An asker: slow, busy at times, and poisoned by one line."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self.asked: Counter[str] = Counter()

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
        self.asked[call.custom_id] += 1
        await asyncio.sleep(self._dice.expovariate(1 / 5.0))
        if call.custom_id == str(POISON):
            return NoAnswer("it died")
        mood = self._dice.random()
        if mood < 0.1:
            return Answer(503, b"{}", retry_after_s=2.0)
        return NoAnswer("unreached", reached=False) if mood < 0.2 else Answer(200, b'{"by": 1}')


class World:
    def __init__(self, seed: int, ledger: MemoryLedger) -> None:
        self.dice = random.Random(seed)
        self.ledger = ledger
        self.faulty = Faulty(ledger, self.dice)
        self.asker = Moody(self.dice)
        chains: list[Sequence[int]] = [range(at, at + 3) for at in range(0, LINES // 2, 3)]
        self.chains = chains + [range(at, at + 1) for at in range(LINES // 2, LINES)]
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._names = 0

    def start(self) -> tuple[str, Job]:
        self._names += 1
        name = f"runner-{self._names}"
        token = virtual.PROCESS.set(name)
        try:
            job = Job("b", DEADLINE_S, self.chains, Lines(), self.faulty, self.asker)
            runner = Runner(fixed(3), random.Random(self._names), wall_s=clock.now_s)
            runner.add(job)
            self.tasks[name] = asyncio.create_task(runner.run())
        finally:
            virtual.PROCESS.reset(token)
        return name, job

    async def trouble(self, loop: virtual.VirtualLoop) -> None:
        """Kill, freeze, thaw and start runners for a while; then all is well, and one runs to the end."""
        for _ in range(2):
            self.start()
        for _ in range(12):
            await asyncio.sleep(self.dice.expovariate(1 / 10.0))
            name = self.dice.choice(sorted(self.tasks))
            match self.dice.randrange(3):
                case 0:
                    loop.freeze(name)
                    self.tasks.pop(name)
                    self.start()
                case 1:
                    loop.freeze(name)
                    await asyncio.sleep(self.dice.choice([1.0, LEASE_S / 2, 2 * LEASE_S]))
                    loop.thaw(name)
                case _:
                    self.tasks[name].cancel()
                    with suppress(asyncio.CancelledError):
                        await self.tasks.pop(name)
                    self.start()
        self.faulty.well = True
        _, job = self.start()
        async with asyncio.timeout(4 * 3600):
            await job.drained.wait()
        for name in list(loop.frozen):
            loop.thaw(name)
        await asyncio.sleep(3 * LEASE_S)
        for task in self.tasks.values():
            task.cancel()


def play(seed: int, ledger: MemoryLedger) -> World:
    async def main() -> World:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        world = World(seed, ledger)
        await world.trouble(loop)
        return world

    return virtual.run(main, seed)


def wrong(world: World) -> list[str]:
    """What must not be."""
    ended = [line for line, _, _ in world.ledger.results]
    found = [f"line {line} ended {count} times" for line, count in Counter(ended).items() if count != 1]
    found += [f"line {line} never ended" for line in range(LINES) if line not in ended]
    first = {line: at for at, line in reversed(list(enumerate(ended)))}
    for chain in world.chains:
        order = [first[line] for line in chain if line in first]
        if order != sorted(order):
            found.append(f"the steps {list(chain)} ended out of order")
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_each_line_ends_exactly_once(seed: int) -> None:
    world = play(seed, MemoryLedger())
    assert not wrong(world)
    failed = {line: said for line, said, ok in world.ledger.results if not ok}
    assert POISON in failed, "poison ends, and blocks nobody"
    # Who is so unlucky that four died asking it is taken for poison, too.
    assert all(b"whoever asked this died of it" in said for line, said in failed.items() if line != POISON)


class Unfenced(Leases):
    """What a ledger must not be: it takes the end of whoever tells one."""

    def end(self, line: int, fence: int) -> bool:
        self.ended.add(line)
        return True


class UnfencedLedger(MemoryLedger):
    def __init__(self) -> None:
        super().__init__()
        self._leases = Unfenced()


def test_without_fences_the_checker_finds_lines_that_ended_twice() -> None:
    assert any("2 times" in line for seed in range(SEEDS) for line in wrong(play(seed, UnfencedLedger())))


def test_a_cancelled_job_asks_nothing_more() -> None:
    async def main() -> None:
        world = World(1, MemoryLedger())
        runner = Runner(fixed(3), random.Random(1), wall_s=clock.now_s)
        job = Job("b", DEADLINE_S, world.chains, Lines(), world.ledger, world.asker)
        runner.add(job)
        running = asyncio.create_task(runner.run())
        await asyncio.sleep(10)
        await runner.drop(job)
        asked, ended = world.asker.asked.total(), len(world.ledger.results)
        assert ended
        await asyncio.sleep(1000)
        assert (world.asker.asked.total(), len(world.ledger.results)) == (asked, ended)
        assert not running.done()
        running.cancel()

    virtual.run(main)


def test_jobs_of_the_nearest_deadline_go_first() -> None:
    async def main() -> None:
        class Prompt:
            async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
                await asyncio.sleep(1.0)
                return Answer(200, b"{}")

        runner = Runner(fixed(1), random.Random(1), wall_s=clock.now_s)
        late, soon = MemoryLedger(), MemoryLedger()
        slow = Job("late", 9000.0, [[0], [1]], Lines(), late, Prompt())
        fast = Job("soon", 800.0, [[0], [1]], Lines(), soon, Prompt())
        runner.add(slow)
        runner.add(fast)
        running = asyncio.create_task(runner.run())
        await fast.drained.wait()
        assert not late.results
        await slow.drained.wait()
        running.cancel()

    virtual.run(main)


def test_a_bug_that_one_line_finds_is_that_lines_alone() -> None:
    async def main() -> None:
        class Buggy:
            async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
                if call.custom_id == "0":
                    raise RecursionError
                return Answer(200, b"{}")

        runner, ledger = Runner(fixed(1), random.Random(1), wall_s=clock.now_s), MemoryLedger()
        job = Job("b", 9000.0, [[0], [1]], Lines(), ledger, Buggy())
        runner.add(job)
        running = asyncio.create_task(runner.run())
        await job.drained.wait()
        assert sorted((line, ok) for line, _, ok in ledger.results) == [(0, False), (1, True)]
        running.cancel()

    virtual.run(main)

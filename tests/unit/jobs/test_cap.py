"""The cap on what runs below everything else: leased, and rising towards a deadline."""

import asyncio
import math
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from jobs.cap import LINE_S, Cap, Left, fixed, needed
from jobs.ledger import MemoryLedger
from jobs.lines import Call, call_of
from jobs.retries import Answer
from jobs.runner import Job, NoTurn, Runner
from sim import loop as virtual
from tracehaul.runtime import clock

BODY = b'{"id": "x"}'


def test_what_is_needed_rises_towards_a_deadline() -> None:
    found = [needed([Left(100, left_s)], 1.0) for left_s in (86_400.0, 150.0, 100.0, 10.0, 1.0)]
    assert found == [0, 1, 2, 20, 100]


def test_what_is_due_later_counts_with_what_is_due_before() -> None:
    assert needed([Left(10, 20.0), Left(90, 100.0)], 1.0) == 2
    assert needed([Left(10, -1.0)], 1.0) == 0, "it is too late"


class Grant:
    """What a test grants."""

    def __init__(self, lines: int) -> None:
        self.cap = Cap(lines, math.inf)

    def __call__(self) -> Cap:
        return self.cap


class Slow:
    """An asker whose every answer takes as long as is assumed."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.urgent = 0

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer:
        self.running += 1
        self.most = max(self.most, self.running)
        self.urgent += urgent
        try:
            await asyncio.sleep(LINE_S)
        finally:
            self.running -= 1
        return Answer(200, BODY)


class Lines:
    """Implements Source."""

    async def read(self, line: int) -> Call:
        return call_of(b'{"custom_id": "%d", "url": "/v1/completions", "body": {}}' % line)


def job(asker: Slow, lines: int, window_s: float) -> Job:
    chains = [range(line, line + 1) for line in range(lines)]
    return Job("b", clock.now_s() + window_s, chains, Lines(), MemoryLedger(), asker)


def play(runner: Runner, case: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        running = asyncio.create_task(runner.run())
        try:
            await case
        finally:
            running.cancel()

    virtual.run(main)


def test_a_cap_that_has_ended_is_none_and_one_that_grows_is_noticed() -> None:
    grant, asker = Grant(4), Slow()
    runner = Runner(grant, random.Random(1), wall_s=clock.now_s)

    async def case() -> None:
        grant.cap = Cap(4, clock.now_s())
        batch = job(asker, 8, 1e6)
        runner.add(batch)
        await asyncio.sleep(60)
        assert asker.most == 0
        grant.cap = Cap(2, math.inf)
        await batch.drained.wait()
        assert (asker.most, asker.urgent) == (2, 0)

    play(runner, case())


def test_without_room_a_batch_is_run_all_the_same_when_its_deadline_comes_near() -> None:
    grant, asker = Grant(0), Slow()
    runner = Runner(grant, random.Random(1), wall_s=clock.now_s)

    async def case() -> None:
        batch = job(asker, 10, 1000.0)
        runner.add(batch)
        await asyncio.sleep(500)
        assert asker.urgent <= 1
        async with asyncio.timeout(500):
            await batch.drained.wait()
        assert asker.urgent == 10

    play(runner, case())


def test_calls_take_their_turn_by_their_deadlines_among_lines() -> None:
    asker = Slow()
    runner = Runner(fixed(1), random.Random(1), wall_s=clock.now_s)
    order: list[str] = []

    async def call(name: str, in_s: float) -> None:
        async with runner.turn(clock.now_s() + in_s):
            order.append(name)
            await asyncio.sleep(1.0)

    async def case() -> None:
        batch = job(asker, 2, 100.0)
        runner.add(batch)
        await asyncio.sleep(1.0)  # its first line is being asked
        await asyncio.gather(call("late", 1000.0), call("soon", 50.0), batch.drained.wait())
        assert order == ["soon", "late"]
        assert clock.now_s() == pytest.approx(2 * LINE_S + 2.0)
        assert asker.most == 1
        assert runner.waiting == 0

    play(runner, case())


def test_whom_no_turn_came_is_told_and_who_leaves_leaves_nothing() -> None:
    grant = Grant(0)
    runner = Runner(grant, random.Random(1), wall_s=clock.now_s)

    async def case() -> None:
        with pytest.raises(NoTurn):
            async with runner.turn(clock.now_s() + 10.0):
                raise AssertionError
        leaving = asyncio.ensure_future(runner.turn(clock.now_s() + 10.0).__aenter__())
        await asyncio.sleep(1.0)
        leaving.cancel()
        await asyncio.sleep(0)
        assert runner.waiting == 0
        grant.cap = Cap(1, math.inf)
        async with runner.turn(clock.now_s() + 10.0) as urgent:
            assert not urgent

    play(runner, case())


class Starved(Slow):
    """Answers only what is urgent; what is not waits for room that never comes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer:
        if urgent:
            return await super().ask(call, timeout_s, urgent=urgent)
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1
        raise AssertionError


def test_lines_in_progress_rise_with_their_deadline_too() -> None:
    asker = Starved()
    runner = Runner(fixed(3), random.Random(1), wall_s=clock.now_s)

    async def case() -> None:
        batch = job(asker, 3, 1000.0)
        runner.add(batch)
        await asyncio.sleep(1000.0 - 2 * LINE_S - 1.0)
        assert (asker.left, asker.urgent) == (0, 0), "it is not near yet"
        async with asyncio.timeout(2 * LINE_S):
            await batch.drained.wait()
        assert (asker.left, asker.urgent) == (3, 3)
        assert isinstance(batch.ledger, MemoryLedger)
        assert sorted(line for line, _, _ in batch.ledger.results) == [0, 1, 2]

    play(runner, case())

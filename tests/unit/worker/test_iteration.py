"""The iteration loop: whom it keeps waiting."""

import asyncio
from array import array
from collections.abc import Coroutine
from typing import Any

import pytest

from sim import loop as virtual
from tracehaul.engine.base import SequenceId
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info
from tracehaul.runtime import clock
from tracehaul.wire.cluster import ASSUMED
from tracehaul.wire.errors import BudgetExceeded, DeadlineExceeded
from tracehaul.wire.ids import StepId, TraceId
from tracehaul.wire.steps import Sampling
from worker.iteration import IterationLoop
from worker.job import Computed, Failed, Job, Sampled
from worker.meter import Account
from worker.pressure import Arrival
from worker.rates import RateMeter
from worker.scheduler import Scheduler

ITERATION_S = 1.0


class Bed:
    """A loop over a fake engine, each of whose iterations takes a second."""

    def __init__(self) -> None:
        self.engine = FakeEngine(fake_info(), EngineCost(iteration_s=ITERATION_S))
        self.loop = IterationLoop(self.engine, Scheduler(64, 8), self.engine.grow)

    def job(self, tokens: int, samples: int, *, background: bool = False) -> Job:
        """A prompt of that many tokens."""
        sequence = self.engine.open(256)
        assert sequence is not None
        sampling = Sampling(max_tokens=samples, temperature=0.0)
        return Job(
            Arrival(background, int(sequence)),
            clock.now_s(),
            SequenceId(sequence),
            array("I", [1] * tokens),
            sampling,
            0,
            samples,
            0,
        )


def play(case: Coroutine[Any, Any, None], bed: Bed) -> None:
    async def main() -> None:
        running = asyncio.create_task(bed.loop.run())
        try:
            await case
        finally:
            running.cancel()

    virtual.run(main)


async def sampled(job: Job) -> None:
    while not isinstance(await job.events.get(), Sampled):
        pass


def test_a_job_that_has_ended_does_not_wait_for_the_iteration_of_others() -> None:
    bed = Bed()

    async def case() -> None:
        ends, stays = bed.job(8, 1), bed.job(8, 5)
        key, other = bed.loop.start(ends), bed.loop.start(stays)
        await sampled(ends)
        await asyncio.sleep(0.5 * ITERATION_S)  # the other's next token is being computed
        before_s = clock.now_s()
        await bed.loop.stop(key)
        assert clock.now_s() == before_s
        bed.engine.close(ends.sequence)
        await bed.loop.stop(other)

    play(case(), bed)


@pytest.mark.parametrize("tokens", [8, 100])
def test_a_job_that_is_being_computed_is_waited_for(tokens: int) -> None:
    bed = Bed()

    async def case() -> None:
        job = bed.job(tokens, 3)
        key = bed.loop.start(job)
        assert isinstance(await job.events.get(), Computed)
        await asyncio.sleep(0.25 * ITERATION_S)
        before_s = clock.now_s()
        await bed.loop.stop(key)
        assert clock.now_s() - before_s == pytest.approx(0.75 * ITERATION_S)
        bed.engine.close(job.sequence)  # the fake engine would not allow it under an iteration

    play(case(), bed)


@pytest.mark.parametrize(("waited_s", "first"), [(0.0, "short"), (10.0, "long")])
def test_a_short_prompt_goes_first_unless_a_long_one_has_waited_for_long(waited_s: float, first: str) -> None:
    bed = Bed()
    bed.loop.meter = RateMeter(ASSUMED._replace(token_s=4e-3, pair_s=0.0))  # 1.0 and 0.03 s: due after 5 and 0.16

    async def case() -> None:
        await asyncio.sleep(20.0)
        jobs = {"long": bed.job(250, 1), "short": bed.job(8, 1)}
        jobs["long"].came_s -= waited_s
        keys = [bed.loop.start(job) for job in jobs.values()]
        ended: list[str] = []

        async def end(name: str) -> None:
            await sampled(jobs[name])
            ended.append(name)

        async with asyncio.TaskGroup() as group:
            for name in jobs:
                group.create_task(end(name))
        assert ended[0] == first
        for key in keys:
            await bed.loop.stop(key)

    play(case(), bed)


async def failed(job: Job) -> Failed:
    while not isinstance(event := await job.events.get(), Failed):
        pass
    return event


def test_a_job_leaves_at_its_deadline_and_is_not_computed_on() -> None:
    bed = Bed()

    async def case() -> None:
        job = bed.job(250, 1)
        job.deadline_s = clock.now_s() + 2.5 * ITERATION_S
        key = bed.loop.start(job)
        event = await failed(job)
        assert isinstance(event.error, DeadlineExceeded)
        assert clock.now_s() == pytest.approx(job.deadline_s)
        await bed.loop.stop(key)
        assert clock.now_s() == pytest.approx(3 * ITERATION_S), "the iteration under way ends"
        await asyncio.sleep(10 * ITERATION_S)
        assert (bed.loop.iterations, bed.engine.computed_tokens) == (3, 3 * 64)

    play(case(), bed)


def test_a_job_past_its_deadline_is_never_computed_and_one_that_ends_before_is() -> None:
    bed = Bed()

    async def case() -> None:
        late, early = bed.job(8, 1), bed.job(8, 1)
        late.deadline_s, early.deadline_s = clock.now_s(), clock.now_s() + 5 * ITERATION_S
        keys = [bed.loop.start(late), bed.loop.start(early)]
        assert isinstance((await failed(late)).error, DeadlineExceeded)
        assert clock.now_s() == late.deadline_s
        await sampled(early)
        await asyncio.sleep(10 * ITERATION_S)
        assert early.events.empty(), "its deadline is nothing to it any more"
        assert (bed.loop.iterations, bed.engine.computed_tokens) == (1, 8)
        for key in keys:
            await bed.loop.stop(key)

    play(case(), bed)


def test_a_job_that_has_no_turn_leaves_at_its_deadline() -> None:
    bed = Bed()

    async def case() -> None:
        ahead, behind = bed.job(250, 1), bed.job(200, 1)
        behind.deadline_s = clock.now_s() + 1.5 * ITERATION_S
        ahead.came_s -= 100.0
        keys = [bed.loop.start(ahead), bed.loop.start(behind)]
        await failed(behind)
        assert clock.now_s() == pytest.approx(behind.deadline_s)
        assert behind.computed == 0
        for key in keys:
            await bed.loop.stop(key)

    play(case(), bed)


def test_a_prompt_of_the_background_stands_still_while_another_is_computed() -> None:
    bed = Bed()
    bed.loop.meter = RateMeter(ASSUMED._replace(token_s=1e-3, pair_s=0.0))  # 50 of its tokens take an iteration's time

    async def case() -> None:
        behind, front = bed.job(200, 2, background=True), bed.job(100, 2)
        keys = [bed.loop.start(behind)]
        assert await behind.events.get() == Computed(50)
        await asyncio.sleep(0.5 * ITERATION_S)
        came_s = clock.now_s()
        keys.append(bed.loop.start(front))
        await sampled(front)
        assert clock.now_s() - came_s == pytest.approx(2 * ITERATION_S), "what was under way is not waited for"
        assert not drained(behind)
        assert bed.loop.cuts == 1
        await sampled(behind)
        for key in keys:
            await bed.loop.stop(key)

    play(case(), bed)


def test_what_is_not_of_the_background_alone_is_not_cut_short() -> None:
    bed = Bed()

    async def case() -> None:
        jobs = [bed.job(8, 3), bed.job(8, 3, background=True), bed.job(8, 1)]
        keys = [bed.loop.start(job) for job in jobs[:2]]
        await sampled(jobs[0])
        await asyncio.sleep(0.5 * ITERATION_S)
        keys.append(bed.loop.start(jobs[2]))
        await sampled(jobs[2])
        assert not bed.loop.cuts
        for key in keys:
            await bed.loop.stop(key)

    play(case(), bed)


def test_one_of_the_background_cuts_nothing_short() -> None:
    bed = Bed()

    async def case() -> None:
        jobs = [bed.job(8, 2, background=True) for _ in range(2)]
        keys = [bed.loop.start(jobs[0])]
        await asyncio.sleep(0.5 * ITERATION_S)
        keys.append(bed.loop.start(jobs[1]))
        await sampled(jobs[1])
        assert not bed.loop.cuts
        for key in keys:
            await bed.loop.stop(key)

    play(case(), bed)


def test_what_is_cut_short_is_paid_out_of_its_budget() -> None:
    bed = Bed()

    async def case() -> None:
        behind, front = bed.job(200, 2, background=True), bed.job(8, 1)
        behind.account = Account(1, "", TraceId("t"), StepId("s"))
        behind.account.limit_s = 0.4 * ITERATION_S
        keys = [bed.loop.start(behind)]
        await asyncio.sleep(0.5 * ITERATION_S)
        keys.append(bed.loop.start(front))
        assert isinstance((await failed(behind)).error, BudgetExceeded)
        assert bed.loop.cuts == 1
        assert behind.account.worker_s == pytest.approx(0.5 * ITERATION_S)
        for key in keys:
            await bed.loop.stop(key)

    play(case(), bed)


def drained(job: Job) -> list[object]:
    return [job.events.get_nowait() for _ in range(job.events.qsize())]

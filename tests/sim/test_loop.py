"""The virtual loop: time costs nothing, order is decided, and a wait without an end is an error."""

import asyncio
import contextvars
import os
import subprocess
import sys

import pytest

from sim import loop as virtual
from tracehaul.runtime.clock import perf_s


def test_an_hour_passes_at_once():
    async def main():
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(3600)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time() - began

    real = perf_s()
    assert virtual.run(main) == pytest.approx(7200)
    assert perf_s() - real < 5


def test_a_wait_that_nothing_can_end_is_a_deadlock():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(virtual.Deadlock):
        virtual.run(main)


def test_spinning_without_time_is_a_livelock(monkeypatch):
    monkeypatch.setattr(virtual.VirtualLoop, "rounds_max", 1000)

    async def main():
        while True:  # noqa: ASYNC110 - the very thing under test
            await asyncio.sleep(0)

    with pytest.raises(virtual.LivelockError):
        virtual.run(main)


def test_threads_are_refused():
    async def main():
        with pytest.raises(AssertionError, match="thread"):
            await asyncio.to_thread(lambda: None)

    virtual.run(main)


def test_exceptions_that_nobody_awaits_are_collected():
    async def main():
        async def fail():
            raise ValueError("lost")

        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(1)
        del task
        return asyncio.get_running_loop().errors

    assert any("lost" in line for line in virtual.run(main))


def test_tasks_left_behind_are_cancelled_and_finish():
    ended = []

    async def main():
        async def stay():
            try:
                await asyncio.sleep(1e6)
            finally:
                await asyncio.sleep(1)
                ended.append(True)

        task = asyncio.get_running_loop().create_task(stay())
        await asyncio.sleep(0)
        return task

    virtual.run(main)
    assert ended == [True]


def spawn(process, coro):
    """A task of a simulated process."""
    context = contextvars.copy_context()
    context.run(virtual.PROCESS.set, process)
    return asyncio.get_running_loop().create_task(coro, context=context)


def test_a_frozen_process_stands_still_and_finds_its_timers_late():
    async def main():
        loop = asyncio.get_running_loop()
        seen = []

        async def tick(name):
            for _ in range(4):
                await asyncio.sleep(1)
                seen.append((name, round(loop.time(), 3)))

        tasks = [spawn("a", tick("a")), spawn("b", tick("b"))]
        await asyncio.sleep(1.5)
        loop.freeze("a")
        await asyncio.sleep(5)
        loop.thaw("a")
        await asyncio.gather(*tasks)
        return seen

    seen = virtual.run(main)
    assert [when for name, when in seen if name == "b"] == [1, 2, 3, 4]
    assert [when for name, when in seen if name == "a"] == [1, 6.5, 7.5, 8.5]


def test_a_timer_that_was_due_in_a_freeze_can_still_be_cancelled():
    async def main():
        loop = asyncio.get_running_loop()
        answer = loop.create_future()

        async def wait():
            async with asyncio.timeout(2):
                return await answer

        task = spawn("a", wait())
        await asyncio.sleep(1)
        loop.freeze("a")
        answer.set_result("in time")
        await asyncio.sleep(5)
        loop.thaw("a")
        return await task

    assert virtual.run(main) == "in time"


def test_a_killed_process_runs_nothing_more_not_even_its_cleanup():
    cleaned = []

    async def main():
        loop = asyncio.get_running_loop()

        async def serve():
            try:
                await asyncio.sleep(1e6)
            finally:
                cleaned.append(loop.time())

        task = spawn("a", serve())
        await asyncio.sleep(1)
        loop.freeze("a")
        task.cancel()
        await asyncio.sleep(10)
        return list(cleaned)

    assert virtual.run(main) == []


_SETS = """
import asyncio, random
from sim import loop as virtual
async def main():
    loop = asyncio.get_running_loop()
    async def work(i):
        try:
            await asyncio.sleep(random.random())
            if i == 7:
                raise ValueError
            await asyncio.sleep(10)
        finally:
            loop.record(f"end {i}")
    try:
        async with asyncio.TaskGroup() as group:  # keeps its tasks in a set
            for i in range(40):
                group.create_task(work(i))
    except* ValueError:
        pass
    done, _ = await asyncio.wait([loop.create_task(asyncio.sleep(0.1 * (i % 3))) for i in range(40)])
    loop.record(" ".join(str(hash(task)) for task in done))
    return loop.digest()
print(virtual.run(main, seed=SEED))
"""


def _digest_elsewhere(seed: int, hash_seed: str) -> str:
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    code = _SETS.replace("SEED", str(seed))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, text=True).stdout


def test_the_same_seed_gives_the_same_digest_in_every_process():
    digests = {_digest_elsewhere(1, hash_seed) for hash_seed in ("0", "1", "12345")}
    assert len(digests) == 1
    assert _digest_elsewhere(2, "0") not in digests

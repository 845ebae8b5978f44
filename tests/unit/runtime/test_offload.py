"""Work on threads: results, turns that let others in between, and what closing leaves."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from tracehaul.runtime.offload import InlineOffload, Offload, ThreadOffload

MAKERS: list[Callable[[], Offload]] = [lambda: ThreadOffload("test"), InlineOffload]


@pytest.mark.parametrize("make", MAKERS)
def test_results_and_exceptions_come_back(make: Callable[[], Offload]) -> None:
    async def main() -> None:
        offload = make()
        assert await offload.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await offload.run(lambda: 1 // 0)
        offload.close()

    asyncio.run(main())


@pytest.mark.parametrize("make", MAKERS)
def test_turns_are_exhausted_and_their_exception_comes_back(make: Callable[[], Offload]) -> None:
    async def main() -> None:
        offload = make()
        done: list[int] = []

        def work(numbers: range) -> Iterator[None]:
            for number in numbers:
                done.append(number)
                yield

        def broken() -> Iterator[None]:
            yield
            raise OSError("half way")

        await offload.turns(work(range(5)), work(range(5, 8)))
        assert sorted(done) == list(range(8))
        await offload.turns()
        with pytest.raises(OSError, match="half way"):
            await offload.turns(broken())
        offload.close()

    asyncio.run(main())


def test_short_work_comes_between_two_turns() -> None:
    async def main() -> None:
        offload = ThreadOffload("test", 1)
        order: list[str] = []
        begun, queued = threading.Event(), threading.Event()

        def long() -> Iterator[None]:
            for turn in range(3):
                order.append(f"turn {turn}")
                if turn == 0:
                    begun.set()
                    assert queued.wait(10)
                yield

        working = asyncio.ensure_future(offload.turns(long()))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        short = asyncio.ensure_future(offload.run(lambda: order.append("short")))
        await asyncio.sleep(0)
        queued.set()
        await asyncio.gather(working, short)
        assert order == ["turn 0", "short", "turn 1", "turn 2"]
        offload.close()

    asyncio.run(main())


def test_closing_ends_what_waits_and_what_has_turns_left() -> None:
    async def main() -> None:
        offload = ThreadOffload("test", 1)
        begun, closed = threading.Event(), threading.Event()
        turns = 0

        def endless() -> Iterator[None]:
            nonlocal turns
            while True:
                turns += 1
                begun.set()
                assert closed.wait(10)
                yield

        working = asyncio.ensure_future(offload.turns(endless()))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        waiting = asyncio.ensure_future(offload.run(lambda: None))
        await asyncio.sleep(0)
        offload.close()
        closed.set()
        for ended in (working, waiting):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(ended, 10)
        assert turns == 1
        with pytest.raises(RuntimeError, match="closed"):
            await offload.run(lambda: None)

    asyncio.run(main())

"""One timer for many waits: it ends the one that takes too long, and nothing else."""

import asyncio

import pytest

from sim.loop import run
from tracehaul.runtime import clock
from tracehaul.runtime.patience import Patience


def test_many_short_waits_are_left_alone_and_a_long_one_ends_on_time() -> None:
    async def main() -> None:
        patience = Patience(1.0)
        for _ in range(20):
            with patience:
                await asyncio.sleep(0.3)
        began_s = clock.now_s()
        with pytest.raises(TimeoutError), patience:
            await asyncio.sleep(60)
        assert clock.now_s() - began_s == pytest.approx(1.0)
        with patience:  # and it goes on
            await asyncio.sleep(0.9)
        patience.close()

    run(main)


def test_time_between_waits_does_not_count() -> None:
    async def main() -> None:
        patience = Patience(1.0)
        for _ in range(3):
            with patience:
                await asyncio.sleep(0.9)
            await asyncio.sleep(30)
        patience.close()

    run(main)


def test_a_cancelled_task_is_cancelled() -> None:
    async def main() -> None:
        async def wait() -> None:
            patience = Patience(1.0)
            try:
                with patience:
                    await asyncio.sleep(60)
            finally:
                patience.close()

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run(main)


def test_who_waits_may_raise() -> None:
    async def main() -> None:
        patience = Patience(1.0)
        with pytest.raises(ZeroDivisionError), patience:
            raise ZeroDivisionError
        patience.close()

    run(main)

"""Waits that others end: only those, and with what they say."""

import asyncio

import pytest

from sim.loop import run
from tracehaul.runtime import clock
from tracehaul.runtime.interruptible import Interruptible


def test_a_wait_ends_with_what_was_said_and_the_next_is_left_alone() -> None:
    async def main() -> None:
        waits = Interruptible()
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, waits.interrupt, KeyError("first"))
        loop.call_later(1.0, waits.interrupt, KeyError("second"))
        began_s = clock.now_s()
        with pytest.raises(KeyError, match="first"), waits:
            await asyncio.sleep(60)
        assert clock.now_s() - began_s == pytest.approx(1.0)
        with waits:
            await asyncio.sleep(60)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(main)


def test_who_does_not_wait_is_not_interrupted() -> None:
    async def main() -> None:
        waits = Interruptible()
        assert not waits.interrupt(KeyError())
        with waits:
            await asyncio.sleep(1)
        assert not waits.interrupt(KeyError())
        await asyncio.sleep(1)

    run(main)


def test_what_has_happened_does_not_outdo_an_interruption() -> None:
    async def main() -> None:
        waits = Interruptible()
        happened = asyncio.get_running_loop().create_future()

        def both() -> None:
            happened.set_result(None)
            assert waits.interrupt(KeyError())

        asyncio.get_running_loop().call_later(1.0, both)
        with pytest.raises(KeyError), waits:
            await happened

    run(main)


def test_a_cancelled_task_is_cancelled() -> None:
    for interrupted in (False, True):

        async def main(interrupted: bool = interrupted) -> None:
            waits = Interruptible()

            async def wait() -> None:
                with waits:
                    await asyncio.sleep(60)

            task = asyncio.create_task(wait())
            await asyncio.sleep(0.5)
            if interrupted:
                assert waits.interrupt(KeyError())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()

        run(main)


def test_who_waits_may_raise() -> None:
    async def main() -> None:
        waits = Interruptible()
        with pytest.raises(ZeroDivisionError), waits:
            raise ZeroDivisionError

    run(main)

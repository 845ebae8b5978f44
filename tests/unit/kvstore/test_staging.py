"""The pool of buffers between the data plane and the engine."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import kvstore.client.staging
from kvstore.client.client import assign
from kvstore.client.staging import Staging
from tracehaul.wire.errors import Overloaded, TimedOut
from tracehaul.wire.ids import NodeId


class HeapMemory:
    fd = -1

    def __init__(self, nbytes: int) -> None:
        self.buffer = memoryview(bytearray(nbytes))

    def close(self) -> None:
        pass


def play(case: Callable[[Staging], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await case(Staging(HeapMemory(4 * 100 + 99), 100))

    asyncio.run(main())


def test_buffers_are_whole_and_apart() -> None:
    async def case(staging: Staging) -> None:
        assert staging.count == 4
        buffers = await staging.acquire(4, 1.0)
        for n, buffer in enumerate(buffers):
            buffer.view(100)[:] = bytes([n]) * 100
        assert sorted(buffer.offset for buffer in buffers) == [0, 100, 200, 300]
        assert [bytes(buffer.view(3)) for buffer in buffers] == [bytes([n]) * 3 for n in range(4)]

    play(case)


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    async def case(staging: Staging) -> None:
        held = await staging.acquire(3, 1.0)
        order: list[str] = []

        async def take(name: str, count: int) -> None:
            buffers = await staging.acquire(count, 5.0)
            order.append(name)
            staging.release(buffers)

        tasks = [asyncio.create_task(take("large", 4)), asyncio.create_task(take("small", 1))]
        await asyncio.sleep(0.01)
        assert order == []
        staging.release(held)
        await asyncio.gather(*tasks)
        assert order == ["large", "small"]
        assert staging.free == 4

    play(case)


def test_a_wait_has_a_deadline_and_makes_room_for_the_next() -> None:
    async def case(staging: Staging) -> None:
        held = await staging.acquire(2, 1.0)
        small = asyncio.create_task(_later(staging))
        with pytest.raises(TimedOut):
            await staging.acquire(4, 0.05)
        await small
        staging.release(held)
        assert staging.free == 4

    async def _later(staging: Staging) -> None:
        await asyncio.sleep(0.01)  # behind the large one
        staging.release(await staging.acquire(1, 5.0))

    play(case)


def test_buffers_that_arrive_with_a_cancellation_are_not_lost() -> None:
    async def case(staging: Staging) -> None:
        held = await staging.acquire(4, 1.0)
        waiting = asyncio.create_task(staging.acquire(2, 5.0))
        await asyncio.sleep(0)
        staging.release(held)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert staging.free == 4

    play(case)


def test_the_queue_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.client.staging, "WAITERS_MAX", 1)

    async def case(staging: Staging) -> None:
        held = await staging.acquire(4, 1.0)
        waiting = asyncio.create_task(staging.acquire(1, 5.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await staging.acquire(1, 5.0)
        staging.release(held)
        staging.release(await waiting)

    play(case)


def test_a_held_buffer_returns_when_all_its_transfers_have_settled() -> None:
    async def case(staging: Staging) -> None:
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        (buffer, other) = await staging.acquire(2, 1.0)
        buffer.hold(first)
        buffer.hold(second)
        staging.release([buffer, other])
        assert (staging.free, staging.quarantined) == (3, 1)
        second.set_result(None)
        await asyncio.sleep(0)
        assert (staging.free, staging.quarantined) == (3, 1)
        first.set_result(None)
        await asyncio.sleep(0)
        assert (staging.free, staging.quarantined) == (4, 0)

    play(case)


def test_a_settled_transfer_does_not_hold() -> None:
    async def case(staging: Staging) -> None:
        settled = asyncio.get_running_loop().create_future()
        buffers = await staging.acquire(4, 1.0)
        buffers[0].hold(settled)
        settled.set_result(None)
        staging.release(buffers)
        assert staging.free == 4

    play(case)


A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({}, [None, None, None, None]),
        ({A: b"", B: b"\1\0\0\1"}, [B, None, None, B]),
        ({A: b"\1\1\0\1", B: b"\1\1\1\0"}, [B, B, B, A]),
        ({B: b"\1\1\0\0", C: b"\0\1\1\1", A: b"\1\0\0\0"}, [B, B, C, C]),
    ],
)
def test_the_longest_run_is_asked(held: dict[NodeId, bytes], expected: list[NodeId | None]) -> None:
    assert assign(held, 4) == expected


def test_equal_holders_share_the_readers_by_what_they_have_to_do() -> None:
    both = {A: b"\1\1\1\1", B: b"\1\1\1\1"}

    def asked(reading: dict[NodeId, int], held: dict[NodeId, bytes]) -> int:
        """Readers of 1000 that are sent to A."""
        drawn = [assign(held, 4, reading, f"reader {n}") for n in range(1000)]
        assert all(len(set(where)) <= 2 and None not in where for where in drawn)
        return sum(where[0] == A for where in drawn)

    assert 450 < asked({}, both) < 550
    assert 200 < asked({A: 2}, both) < 300
    assert asked({A: 0, B: 99}, both) > 950
    assert assign(both, 4, {}, "one") == assign(both, 4, {}, "one"), "the same reader is sent to the same"
    assert 380 < asked({}, both | {A: b"\1\1\1\0"}) < 480, "three blocks of four, then one from the other"

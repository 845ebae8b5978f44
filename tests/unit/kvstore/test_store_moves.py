"""What large puts and gets are made of: parts, and lanes that work on them."""

import asyncio

import pytest

from kvstore.client.moves import in_lanes, parts_of
from tracehaul.wire.errors import PeerLost


def test_parts_end_once_they_are_full() -> None:
    assert parts_of([3, 3, 3, 9, 1], lambda n: n, 6) == [[3, 3], [3, 9], [1]]
    assert parts_of([7, 7], lambda n: n, 1) == [[7], [7]]
    assert parts_of([], lambda n: n, 6) == []


def test_lanes_begin_parts_in_order_and_hold_their_number() -> None:
    begun: list[int] = []
    under_way = most = 0

    async def work(part: int) -> None:
        nonlocal under_way, most
        begun.append(part)
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1

    asyncio.run(in_lanes(work, list(range(10)), 3))
    assert begun == list(range(10))
    assert (most, under_way) == (3, 0)
    asyncio.run(in_lanes(work, [], 3))
    assert len(begun) == 10


def test_after_an_error_what_is_under_way_ends_and_nothing_more_begins() -> None:
    ended: list[int] = []

    async def work(part: int) -> None:
        if part == 1:
            raise PeerLost("gone")
        await asyncio.sleep(0.01)
        ended.append(part)

    with pytest.raises(PeerLost):
        asyncio.run(in_lanes(work, list(range(10)), 2))
    assert ended == [0]


def test_a_cancelled_call_cancels_its_lanes_and_waits_for_them() -> None:
    cleaned: list[int] = []

    async def work(part: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(part)

    async def main() -> None:
        calling = asyncio.create_task(in_lanes(work, list(range(10)), 2))
        await asyncio.sleep(0.01)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert cleaned == [0, 1]

    asyncio.run(main())

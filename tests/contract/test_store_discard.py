"""A tenant that discards its blocks, in memory and below."""

import asyncio

import pytest

from kvstore.node.checks import HASHES_MAX, NAME_CHARS_MAX
from tests.contract.test_store_operations import SLOTS, Life, both, client, h, play
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import Events, Removed, Snapshot, Subscribe
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.operations import Discard


async def heard(life: Life, hashes: set[BlockHash]) -> None:
    """Be a subscriber."""
    async for reply in life.raw.stream(Subscribe(), idle_timeout_s=10.0):
        match reply:
            case Snapshot():
                hashes |= set(reply.hashes)
            case Events():
                for change in reply.changes:
                    if isinstance(change, Removed):
                        hashes.discard(change.hash)
                    else:
                        hashes.add(change.hash)
            case _:
                raise AssertionError(reply)


@both
def test_a_tenant_discards_what_it_put(tiered: bool):
    async def case(life: Life) -> None:
        index: set[BlockHash] = set()
        follower = asyncio.create_task(heard(life, index))
        async with client(life, "c0") as put, client(life, "bench", tenant="bench") as measure:
            await put("abc")
            assert await measure("pqrst") == ["published"] * 5
            await life.written()
            assert (await life.located("ap")).get("disk") == ("ap" if tiered else None)
            mine = tuple(map(h, "apqrst"))
            assert await life.call(Discard(mine, "nobody")) == Ok()
            assert (await life.located("apqrst"))["memory"] == "apqrst"
            assert await life.call(Discard(mine, "bench")) == Ok()
            assert set((await life.located("abcpqrst")).values()) == {"abc"}
            await asyncio.sleep(0.02)
            assert index == set(map(h, "abc"))
            told = await life.describe()
            assert (told.blocks, told.slots_free, told.tiers[0].counters["evicted"]) == (3, 5, 0)
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)

    play(case, tiered)


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_discarded_before_it_is_written_does_not_stay_below(begun: bool):
    async def case(life: Life) -> None:
        assert life.node.tiering is not None
        async with client(life, "bench", tenant="bench") as measure:
            life.writes.gate.clear()
            await measure("p")
            await asyncio.sleep(0.02)  # its write waits at the gate
            assert life.node.tiering.behind == 1
            if not begun:
                await measure("q")
                assert life.node.tiering.behind == 2
            discarded = asyncio.create_task(life.call(Discard(tuple(map(h, "pq")), "bench")))
            await asyncio.sleep(0.02)
            life.writes.gate.set()
            await discarded
            await life.written()
            await asyncio.sleep(0.02)
            assert await life.located("pq") == {"memory": "", "disk": ""}
            told = await life.describe()
            assert told.slots_free == SLOTS
            assert life.node.tiering.stats.evicted_unwritten == 0

    play(case, tiered=True)


def test_what_is_written_while_others_are_erased_does_not_stay_below():
    async def case(life: Life) -> None:
        async with client(life, "bench", tenant="bench") as measure:
            await measure("p")
            await life.written()
            life.writes.gate.clear()
            await measure("q")
            await asyncio.sleep(0.02)  # its write waits at the gate, and before the other's erasure
            discarded = asyncio.create_task(life.call(Discard((h("q"), h("p")), "bench")))
            await asyncio.sleep(0.02)
            life.writes.gate.set()
            await discarded
            await life.written()
            await asyncio.sleep(0.02)
            assert await life.located("pq") == {"memory": "", "disk": ""}

    play(case, tiered=True)


def test_discards_are_bounded():
    async def case(life: Life) -> None:
        with pytest.raises(InvalidRequest):
            await life.call(Discard((h("a"),) * (HASHES_MAX + 1), "bench"))
        with pytest.raises(InvalidRequest):
            await life.call(Discard((h("a"),), "x" * (NAME_CHARS_MAX + 1)))

    play(case)

"""A prompt never gets another's answer: what reads through a reference that is not good any more gets a miss.

Every transport, with a store and its clients around it. Each time the reader believes in its reference.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from kvstore.client.client import StoreClient
from tests.contract.test_kvstore import SLOT, World, content, eventually, get, h, put
from tracehaul.transfer.base import Copy, Region, Transfer
from tracehaul.transfer.memory import FileMemory
from tracehaul.transfer.nixl import NixlTransfer
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.tcp import TcpTransfer
from tracehaul.transfer.ucxx import UcxxTransfer
from tracehaul.wire.blocks import Leased, RegionDescriptor
from tracehaul.wire.ids import BlockHash, Checksum, LeaseId

KINDS = ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("shm", "tcp", "nixl", "ucxx"))]
Meanwhile = Callable[[Sequence[Copy]], Awaitable[Sequence[Copy]]]
"""What happens after a lease and before its bytes are read; what is read then."""


class Between:
    """A transport between whose lease and read something happens."""

    def __init__(self, inner: Transfer, meanwhile: Meanwhile) -> None:
        self._inner = inner
        self._meanwhile = meanwhile
        self.kind = inner.kind
        self.register = inner.register
        self.reaches = inner.reaches
        self.write = inner.write
        self.close = inner.close

    async def read(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> Sequence[Checksum] | None:
        copies = await self._meanwhile(copies)
        return await self._inner.read(remote, local, copies, timeout_s=timeout_s)


class Carried(World):
    """With any transport below the store."""

    def __init__(self, kind: str) -> None:
        super().__init__("local" if kind == "local" else "tcp")
        self._carrier = kind

    def plane(self, owner: str, memory: FileMemory) -> Plane:
        made: dict[str, Callable[[], Transfer]] = {
            "tcp": lambda: TcpTransfer(owner),
            "nixl": lambda: NixlTransfer(owner, "request"),
            "ucxx": lambda: UcxxTransfer(owner),
        }
        if self._carrier not in made:
            return super().plane(owner, memory)
        transfer = made[self._carrier]()
        self._stack.push_async_callback(transfer.close)
        return Plane(transfer, transfer.register(memory))


Case = Callable[[World], Awaitable[None]]


@pytest.fixture(params=KINDS)
def play(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], None]:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("NIXL_LOG_LEVEL", "FATAL")

    async def main(case: Case) -> None:
        async with asyncio.timeout(60), Carried(request.param) as world:
            await case(world)
            for running in world.nodes.values():
                running.node.arena.check()

    return lambda case: asyncio.run(main(case))


async def reader_of(world: World, meanwhile: Meanwhile) -> StoreClient:
    return await world.client(wrap=lambda inner: Between(inner, meanwhile))


def test_a_slot_that_another_block_has_by_now(play: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The node takes the lease for ended and gives the slot away; the reader does not know."""

    async def case(world: World) -> None:
        running = await world.start("s0", slots=1)
        writer = await world.client()
        granted: list[tuple[LeaseId, str]] = []
        grant = running.node.arena.lease

        def lease(hashes: Sequence[BlockHash], holder: str, ttl_s: float, now_s: float) -> Leased | None:
            leased = grant(hashes, holder, ttl_s, now_s)
            assert leased is not None
            granted.append((leased.lease, holder))
            return leased

        async def meanwhile(copies: Sequence[Copy]) -> Sequence[Copy]:
            if await writer.exists([h("b")]) == [None]:
                running.node.arena.release(*granted.pop())
                assert await put(writer, ["b"]) == ["published"]
            return copies

        monkeypatch.setattr(running.node.arena, "lease", lease)
        reader = await reader_of(world, meanwhile)
        await put(writer, ["a"])
        assert await get(reader, ["a"]) == [None]
        assert reader.stats.corrupt == 1
        # The block that is there now is none the worse for it.
        assert await get(reader, ["a", "b"]) == [None, content("b")]

    play(case)


@pytest.mark.parametrize("shift", [SLOT, -SLOT, 1])
def test_a_place_that_is_another_blocks(play: Callable[[Case], None], shift: int) -> None:
    async def case(world: World) -> None:
        await world.start("s0", slots=3)
        shifts: list[int] = []

        async def meanwhile(copies: Sequence[Copy]) -> Sequence[Copy]:
            by = shifts.pop(0) if shifts else 0
            return [copy._replace(remote_offset=(copy.remote_offset + by) % (3 * SLOT)) for copy in copies]

        reader = await reader_of(world, meanwhile)
        for name in ("a", "b", "c"):
            await put(reader, [name])
        await reader.warm(5.0)
        shifts[:] = [shift, 0]
        assert await get(reader, ["b"]) == [None]
        assert reader.stats.corrupt == 1
        assert await get(reader, ["b"]) == [content("b")]

    play(case)


@pytest.mark.parametrize("offset", [3 * SLOT, 3 * SLOT - 1, 1 << 40, -SLOT])
def test_a_place_outside_of_all_memory(play: Callable[[Case], None], offset: int) -> None:
    async def case(world: World) -> None:
        await world.start("s0", slots=3)

        async def meanwhile(copies: Sequence[Copy]) -> Sequence[Copy]:
            return [copy._replace(remote_offset=offset) for copy in copies]

        reader = await reader_of(world, meanwhile)
        await put(reader, ["a", "b"])
        assert await get(reader, ["a"]) == [None]
        assert sum(reader.stats.misses.values()) == 1
        assert await get(await world.client(), ["a", "b"]) == [content("a"), content("b")]

    play(case)


def test_a_lease_that_ends_while_its_slot_goes_to_another(play: Callable[[Case], None]) -> None:
    async def case(world: World) -> None:
        running = await world.start("s0", slots=1, lease_ttl_max_s=0.3)
        writer = await world.client()

        async def meanwhile(copies: Sequence[Copy]) -> Sequence[Copy]:
            await eventually(lambda: running.node.arena.leases == 0)
            assert await put(writer, ["b"]) == ["published"]
            return copies

        reader = await reader_of(world, meanwhile)
        await put(writer, ["a"])
        assert await get(reader, ["a"]) == [None]
        assert sum(reader.stats.misses.values()) == 1
        assert await get(writer, ["b"]) == [content("b")]

    play(case)

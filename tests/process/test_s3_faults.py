"""The S3 tier against a real server over real HTTP, through a proxy that cuts, freezes, shortens, flips and refuses."""

import asyncio
import contextlib
import mmap
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import httpx
import obstore
import pytest
from obstore.store import S3Store

from kvstore.tiers import object_tier, s3
from kvstore.tiers.base import TierBlock
from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.objects import ObjectsRefused, parse_url
from kvstore.tiers.s3 import NoBucket, open_s3
from tracehaul.runtime import clock
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

SLOT = 64 << 10
BUDGET = 16 * SLOT
ROOT = BlockHash(b"\xff" * 16)
TIMEOUT_S = 2.0


class Proxy:
    """Between the tier and the server, one TCP connection for one. ``fault`` holds for what passes from now on."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.fault = ""
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def listen(self, port: int = 0) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            self.cut()
            await server.wait_closed()

    def cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._writers.add(up_writer)
        ways = [
            asyncio.create_task(self._up(reader, up_writer, writer)),
            asyncio.create_task(self._down(up_reader, writer)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for each in (writer, up_writer):
            self._writers.discard(each)
            each.close()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            match self.fault:
                case "cut":
                    return
                case "freeze":
                    await asyncio.sleep(3600)
                case "503" | "403":
                    while b"\r\n\r\n" not in data:
                        data += await reader.read(1 << 16)
                    back.write(f"HTTP/1.1 {self.fault} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
                    await back.drain()
                    return
            writer.write(data)
            await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Faults of answers hit long ones: those with a block in them."""
        while data := await reader.read(1 << 16):
            if len(data) > 4096:
                match self.fault:
                    case "shorten":
                        writer.write(data[: len(data) // 2])
                        await writer.drain()
                        return
                    case "flip":
                        data = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
                    case "stall":
                        writer.write(data[: len(data) // 2])
                        await asyncio.sleep(3600)
            writer.write(data)
            await writer.drain()


def h(name: str) -> BlockHash:
    return BlockHash(name.encode().ljust(16, b"."))


def content(name: str) -> bytes:
    return random.Random(name).randbytes(60_000)


def view_of(name: str = "") -> memoryview:
    view = memoryview(mmap.mmap(-1, SLOT))
    if name:
        view[:60_000] = content(name)
    return view


async def store(tier: ObjectTier, *names: str) -> list[str]:
    views = [view_of(name) for name in names]
    blocks = [TierBlock(h(name), ROOT, 60_000, checksum(content(name))) for name in names]
    outcomes = list(await tier.store(blocks, views))
    for view in views:
        memory = view.obj
        view.release()
        assert isinstance(memory, mmap.mmap)
        memory.close()  # raises if anybody still holds it
    return outcomes


async def load(tier: ObjectTier, *names: str) -> list[str]:
    views = [view_of() for _ in names]
    outcomes = list(await tier.load([h(name) for name in names], views))
    for name, view, outcome in zip(names, views, outcomes, strict=True):
        assert outcome != "loaded" or bytes(view[:60_000]) == content(name)
    return outcomes


async def until_available(tier: ObjectTier) -> None:
    async with asyncio.timeout(10):
        while not tier.available:  # noqa: ASYNC110 - polls a flag
            await asyncio.sleep(0.01)


def endpoint(port: int) -> None:
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def life(url: str, node: str = "store-0", nbytes: int = BUDGET) -> AsyncIterator[ObjectTier]:
    tier = await open_s3(url, node, nbytes, SLOT)
    running = asyncio.create_task(tier.run())
    try:
        yield tier
        tier.check()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        tier.close()


def play(case: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await case

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    for name in ("GET_TIMEOUT_S", "PUT_TIMEOUT_S", "CONTROL_TIMEOUT_S"):
        monkeypatch.setattr(s3, name, TIMEOUT_S)
    monkeypatch.setattr(object_tier, "PAUSE_S", 0.05)
    monkeypatch.setattr(object_tier, "PAUSE_MAX_S", 0.2)


NAMES: Sequence[str] = [f"b{i}" for i in range(6)]


@pytest.mark.parametrize("fault", ["cut", "freeze", "503", "403", "shorten", "stall"])
def test_a_service_that_fails_costs_misses_for_a_bounded_time(
    fault: str, s3_port: int, s3_url: Callable[[], str]
) -> None:
    url = s3_url()

    async def case() -> None:
        proxy = Proxy(s3_port)
        async with proxy.listen() as port:
            endpoint(port)
            async with life(url) as tier:
                await until_available(tier)
                assert await store(tier, *NAMES) == ["stored"] * 6
                proxy.fault = fault
                began_s = clock.now_s()
                assert await load(tier, *NAMES) == ["unavailable"] * 6
                assert clock.now_s() - began_s < 4 * TIMEOUT_S
                assert not tier.available or fault in ("shorten", "stall"), "probes still pass those"
                assert len(tier) == 6
                outcomes = await store(tier, "new")
                assert outcomes == ["failed"] or fault in ("shorten", "stall")
                # Known by now, so that nobody waits.
                began_s = clock.now_s()
                await load(tier, *NAMES)
                assert clock.now_s() - began_s < 4 * TIMEOUT_S
                proxy.fault = ""
                await until_available(tier)
                async with asyncio.timeout(10):
                    while await load(tier, *NAMES) != ["loaded"] * 6:  # noqa: ASYNC110 - each is an attempt
                        await asyncio.sleep(0.05)
                assert await store(tier, "newer") == ["stored"]

    play(case())


def test_a_flipped_bit_on_the_way_is_found(s3_port: int, s3_url: Callable[[], str]) -> None:
    url = s3_url()

    async def case() -> None:
        proxy = Proxy(s3_port)
        async with proxy.listen() as port:
            endpoint(port)
            async with life(url) as tier:
                await until_available(tier)
                await store(tier, *NAMES)
                proxy.fault = "flip"
                assert "loaded" not in await load(tier, *NAMES)
                assert tier.stats.corrupt > 0
                proxy.fault = ""
                await until_available(tier)
                await store(tier, *NAMES)
                assert await load(tier, *NAMES) == ["loaded"] * 6

    play(case())


def test_a_server_that_dies_and_comes_back_is_found_again(s3_port: int, s3_url: Callable[[], str]) -> None:
    url = s3_url()

    async def case() -> None:
        proxy = Proxy(s3_port)
        async with contextlib.AsyncExitStack() as stack:
            async with proxy.listen() as port:
                endpoint(port)
                tier = await stack.enter_async_context(life(url))
                await until_available(tier)
                await store(tier, *NAMES)
            assert await load(tier, *NAMES) == ["unavailable"] * 6  # nobody listens there now
            assert await store(tier, "x") == ["failed"]
            assert tier.stats.outages == 1
            await asyncio.sleep(0.5)
            assert tier.stats.outages == 1, "it is one outage as long as it lasts"
            async with Proxy(s3_port).listen(port):
                await until_available(tier)
                assert await load(tier, *NAMES) == ["loaded"] * 6

    play(case())


def test_a_node_that_starts_without_its_server_serves_and_finds_its_blocks_later(
    s3_port: int, s3_url: Callable[[], str]
) -> None:
    url = s3_url()

    async def case() -> None:
        async with Proxy(s3_port).listen() as port:
            endpoint(port)
            async with life(url) as tier:
                await until_available(tier)
                await store(tier, *NAMES)
        async with life(url) as tier:
            assert len(tier) == 0
            assert await store(tier, "x") == ["failed"]
            async with Proxy(s3_port).listen(port):
                await until_available(tier)
                assert await load(tier, *NAMES) == ["loaded"] * 6

    play(case())


def test_a_bucket_that_is_not_there_is_said_at_the_start(s3_port: int, s3_url: Callable[[], str]) -> None:
    s3_url()

    async def case() -> None:
        with pytest.raises(NoBucket, match="NoSuchBucket"):
            await open_s3("s3://there-is-none/x", "store-0", BUDGET, SLOT)

    play(case())


def test_wrong_credentials_are_said_at_the_start(s3_port: int, s3_url: Callable[[], str]) -> None:
    url = s3_url()

    async def case() -> None:
        proxy = Proxy(s3_port)
        proxy.fault = "403"
        async with proxy.listen() as port:
            endpoint(port)
            with pytest.raises(NoBucket, match="403"):
                await open_s3(url, "store-0", BUDGET, SLOT)

    play(case())


def test_a_bucket_that_is_emptied_or_taken_away_costs_misses(s3_port: int, s3_url: Callable[[], str]) -> None:
    url = s3_url()
    bucket, _ = parse_url(url)

    async def case() -> None:
        async with life(url) as tier:
            await until_available(tier)
            await store(tier, *NAMES)
            whole = S3Store(bucket, client_options={"allow_http": True})
            listed = [meta["path"] for meta in await obstore.list(whole).collect_async()]
            assert len(listed) == 6
            assert all(path.startswith("some/prefix/store-0/") for path in listed)
            await obstore.delete_async(whole, listed[:2])
            assert sorted(await load(tier, *NAMES)) == ["failed"] * 2 + ["loaded"] * 4
            assert len(tier) == 4
            await obstore.delete_async(whole, listed)
            async with httpx.AsyncClient(trust_env=False) as http:
                (await http.delete(f"http://127.0.0.1:{s3_port}/{bucket}")).raise_for_status()
            assert await load(tier, *tier_names(tier)) == ["unavailable"] * 4, "that is for an operator to mend"
            assert not tier.available

    play(case())


def tier_names(tier: ObjectTier) -> list[str]:
    return [bytes(block_hash).rstrip(b".").decode() for block_hash in tier.held()]


def test_two_nodes_of_one_bucket_do_not_see_each_other(s3_url: Callable[[], str]) -> None:
    url = s3_url()

    async def case() -> None:
        async with life(url, "store-1") as one, life(url, "store-10") as other:
            for tier in (one, other):
                await until_available(tier)
            await asyncio.gather(store(one, "same", "a"), store(other, "same", "b"))
            await one.drop(h("same"))
            assert await load(other, "same", "b", "a") == ["loaded", "loaded", "absent"]
        async with life(url, "store-1") as one, life(url, "store-10") as other:
            for tier in (one, other):
                await until_available(tier)
            assert (set(one.held()), set(other.held())) == ({h("a")}, {h("same"), h("b")})

    play(case())


def test_a_listing_of_many_pages_is_read_to_its_end(s3_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "CONTROL_TIMEOUT_S", 30.0)
    monkeypatch.setattr(s3, "PUT_TIMEOUT_S", 30.0)
    url = s3_url()
    count = 2500

    async def case() -> None:
        bucket, prefix = parse_url(url)
        objects = s3.S3Objects(bucket, f"{prefix}/store-0")
        from kvstore.tiers.objects import pack_name

        names = [pack_name(TierBlock(BlockHash(i.to_bytes(16)), ROOT, 3, checksum(b"abc")), i) for i in range(count)]
        for start in range(0, count, 32):
            await asyncio.gather(*(objects.put(name, memoryview(b"abc")) for name in names[start : start + 32]))
        async with life(url, nbytes=2000 * SLOT) as tier:
            async with asyncio.timeout(30):
                await until_available(tier)
            assert len(tier) == 2000
            assert tier.stats.useless == 500
            assert tier.stats.listings >= 3
        assert len([each async for page in objects.pages() for each in page]) == 2000

    play(case())


def test_what_ends_before_that_is_nothing_and_what_is_refused_is_not_that(
    s3_port: int, s3_url: Callable[[], str]
) -> None:
    url = s3_url()

    async def case() -> None:
        proxy = Proxy(s3_port)
        async with proxy.listen() as port:
            endpoint(port)
            objects = s3.S3Objects(*parse_url(url))
            name = "416/416.416"
            await objects.put(name, memoryview(b"data"))
            assert [await objects.read(name, *cut) for cut in ((1, 9), (4, 1), (9, 1))] == [b"ata", b"", b""]
            proxy.fault = "403"
            with pytest.raises(ObjectsRefused):
                await objects.read(name, 0, 4)

    play(case())

"""What the simulator relies on: links, crashes, freezes and contexts of the in-process network."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextvars import ContextVar, copy_context

import pytest

from sim import loop as virtual
from tracehaul.rpc.base import CallContext, Replies
from tracehaul.rpc.local import LocalNetwork
from tracehaul.runtime.clock import now_s
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import Subscribe
from tracehaul.wire.errors import PeerLost, TimedOut
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillProgress

SERVER = "store-0:1"
CLIENT = "decode-0:1"
WHO: ContextVar[str] = ContextVar("who", default="world")


class Counter:
    def __init__(self, items: int = 3) -> None:
        self.items = items
        self.calls = 0
        self.gone = 0
        self.who: list[str] = []

    async def call(self, request: Request, context: CallContext) -> Reply:
        self.calls += 1
        self.who.append(WHO.get())
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        for number in range(self.items):
            yield PrefillProgress(number)

    def disconnected(self, peer: str) -> None:
        self.gone += 1
        self.who.append(WHO.get())


class Script:
    """A link that asks ``rule`` for what is not 10 ms, and keeps a record."""

    def __init__(self) -> None:
        self.rules: dict[str, list[Sequence[float]]] = {}
        self.seen: list[tuple[str, str, str]] = []

    def delays(self, source: str, target: str, kind: str) -> Sequence[float]:
        self.seen.append((source, target, kind))
        rules = self.rules.get(kind)
        return rules.pop(0) if rules else (0.01,)


async def collect(stream: Replies, into: list[Reply]) -> None:
    async for reply in stream:
        into.append(reply)


def test_a_link_sees_every_frame_and_its_delays_add_up() -> None:
    async def main() -> None:
        link = Script()
        network = LocalNetwork(link)
        await network.at(SERVER).listen(SERVER, Counter())
        connection = await network.at(CLIENT).connect(SERVER, timeout_s=1)
        start_s = now_s()
        await connection.call(Ping(), timeout_s=1)
        assert now_s() - start_s == pytest.approx(0.02)
        await connection.close()
        await asyncio.sleep(1)
        assert link.seen == [
            (CLIENT, SERVER, "Connect"),
            (CLIENT, SERVER, "Hello"),
            (SERVER, CLIENT, "Hello"),
            (CLIENT, SERVER, "Call"),
            (SERVER, CLIENT, "Reply"),
            (CLIENT, SERVER, "Close"),
        ]

    virtual.run(main)


def test_frames_never_overtake_and_copies_are_discarded() -> None:
    async def main() -> None:
        link = Script()
        network = LocalNetwork(link)
        await network.listen(SERVER, Counter(items=5))
        connection = await network.connect(SERVER, timeout_s=1)
        link.rules["Item"] = [(0.5,), (0.0, 0.7), (0.1, 0.1), (0.0,)]
        replies = [reply async for reply in connection.stream(Subscribe(), idle_timeout_s=5)]
        assert replies == [PrefillProgress(n) for n in range(5)]

    virtual.run(main)


def test_a_lost_frame_breaks_the_connection_before_anything_later_is_seen() -> None:
    async def main() -> None:
        link = Script()
        network = LocalNetwork(link)
        service = Counter(items=5)
        await network.listen(SERVER, service)
        connection = await network.connect(SERVER, timeout_s=1)
        link.rules["Item"] = [(0.01,), ()]
        received: list[Reply] = []
        with pytest.raises(PeerLost, match="lost"):
            await collect(connection.stream(Subscribe(), idle_timeout_s=5), received)
        assert received == [PrefillProgress(0)]
        assert connection.closed
        await asyncio.sleep(1)
        assert service.gone == 1

    virtual.run(main)


def test_a_partition_is_silence_and_heals_by_reconnecting() -> None:
    async def main() -> None:
        link = Script()
        network = LocalNetwork(link)
        service = Counter()
        await network.listen(SERVER, service)
        connection = await network.connect(SERVER, timeout_s=1)
        link.rules = {kind: [()] for kind in ("Connect", "Call", "Cancel", "Close")}
        with pytest.raises(TimedOut):
            await network.connect(SERVER, timeout_s=3)
        with pytest.raises(TimedOut):
            await connection.call(Ping(), timeout_s=3)
        assert service.calls == 0
        assert not connection.closed
        with pytest.raises(PeerLost):  # the gap shows; that the server's word of it is lost too shows at the next
            await asyncio.gather(connection.call(Ping(), timeout_s=3), connection.call(Ping(), timeout_s=3))
        assert connection.closed
        assert service.calls == 0
        again = await network.connect(SERVER, timeout_s=1)
        assert await again.call(Ping(), timeout_s=1) == Ok()

    virtual.run(main)


def test_a_crash_that_nobody_heard_of_is_answered_by_the_host() -> None:
    async def main() -> None:
        link = Script()
        network = LocalNetwork(link)
        await network.listen(SERVER, Counter())
        connection = await network.connect(SERVER, timeout_s=1)
        link.rules["Close"] = [()]
        network.crash(SERVER)
        await asyncio.sleep(1)
        assert not connection.closed
        with pytest.raises(PeerLost):
            await connection.call(Ping(), timeout_s=3)

    virtual.run(main)


def test_a_crashed_client_is_gone_for_its_servers() -> None:
    async def main() -> None:
        network = LocalNetwork()
        service = Counter()
        await network.listen(SERVER, service)
        connection = await network.at(CLIENT).connect(SERVER, timeout_s=1)
        network.freeze(CLIENT)
        network.crash(CLIENT)
        await asyncio.sleep(0.01)
        assert service.gone == 1
        assert connection.closed

    virtual.run(main)


def test_a_severed_connection_can_be_made_again() -> None:
    async def main() -> None:
        network = LocalNetwork()
        service = Counter()
        await network.listen(SERVER, service)
        connection = await network.connect(SERVER, timeout_s=1)
        network.sever(SERVER)
        with pytest.raises(PeerLost):
            await connection.call(Ping(), timeout_s=1)
        assert service.gone == 1
        again = await network.connect(SERVER, timeout_s=1)
        assert await again.call(Ping(), timeout_s=1) == Ok()

    virtual.run(main)


def test_the_server_of_a_frozen_process_stalls_and_is_cut_off() -> None:
    async def main() -> None:
        network = LocalNetwork()
        service = Counter(items=1_000_000)
        await network.listen(SERVER, service)
        connection = await network.at(CLIENT).connect(SERVER, timeout_s=1)
        stream = connection.stream(Subscribe(), idle_timeout_s=60)
        received = [await anext(stream)]
        network.freeze(CLIENT)
        await asyncio.sleep(29)
        assert service.gone == 0
        await asyncio.sleep(2)
        assert service.gone == 1
        network.thaw(CLIENT)
        with pytest.raises(PeerLost):
            await collect(stream, received)
        assert received == [PrefillProgress(n) for n in range(len(received))]

    virtual.run(main)


def test_each_node_works_in_its_own_context() -> None:
    async def main() -> None:
        network = LocalNetwork()
        service = Counter()
        context = copy_context()
        context.run(WHO.set, "server")
        await asyncio.get_running_loop().create_task(network.listen(SERVER, service), context=context)
        WHO.set("client")
        connection = await network.connect(SERVER, timeout_s=1)
        await connection.call(Ping(), timeout_s=1)
        await connection.close()
        await asyncio.sleep(0.01)
        assert service.who == ["server", "server"]

    virtual.run(main)


def test_a_process_without_callbacks_greets_nobody_until_it_goes_on() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        network = LocalNetwork()
        context = copy_context()
        context.run(virtual.PROCESS.set, "store-0")
        await loop.create_task(network.listen(SERVER, Counter()), context=context)
        connection = await network.connect(SERVER, timeout_s=1)
        loop.freeze("store-0")
        with pytest.raises(TimedOut):
            await connection.call(Ping(), timeout_s=1)
        with pytest.raises(TimedOut):
            await network.connect(SERVER, timeout_s=1)
        loop.thaw("store-0")
        assert await connection.call(Ping(), timeout_s=1) == Ok()
        loop.freeze("store-0")  # and now it is killed
        call = asyncio.ensure_future(connection.call(Ping(), timeout_s=60))
        await asyncio.sleep(0.1)
        network.crash(SERVER)
        with pytest.raises(PeerLost):
            await call

    virtual.run(main)

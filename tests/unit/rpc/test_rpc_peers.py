import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from sim import loop as virtual
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import BACKOFF_MAX_S, Peers
from tracehaul.runtime.clock import now_s
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import Subscribe
from tracehaul.wire.errors import PeerLost, TimedOut
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillProgress

ADDRESS = "store-0:1"


class Echo:
    async def call(self, request: Request, context: CallContext) -> Reply:
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        yield PrefillProgress(1)
        await asyncio.sleep(60)

    def disconnected(self, peer: str) -> None:
        pass


class Slow:
    """A link of 10 ms that counts connects, and loses them while ``cut``."""

    def __init__(self) -> None:
        self.connects = 0
        self.cut = False

    def delays(self, source: str, target: str, kind: str) -> Sequence[float]:
        self.connects += kind == "Connect"
        return () if self.cut else (0.01,)


def test_callers_share_one_connection() -> None:
    async def main() -> None:
        link = Slow()
        network = LocalNetwork(link)
        await network.listen(ADDRESS, Echo())
        peers = Peers(network)
        await asyncio.gather(*(peers.call(ADDRESS, Ping(), timeout_s=1) for _ in range(20)))
        assert link.connects == 1
        await peers.close()
        with pytest.raises(PeerLost, match="stopping"):
            await peers.get(ADDRESS)

    virtual.run(main)


def test_a_dead_peer_fails_fast_and_is_found_again() -> None:
    async def main() -> None:
        link = Slow()
        network = LocalNetwork(link)
        peers = Peers(network)
        for _ in range(50):
            with pytest.raises(PeerLost, match="nobody listens"):
                await peers.get(ADDRESS)
        assert link.connects == 1
        await asyncio.sleep(BACKOFF_MAX_S)
        with pytest.raises(PeerLost):
            await peers.get(ADDRESS)
        assert link.connects == 2
        await network.listen(ADDRESS, Echo())
        await asyncio.sleep(BACKOFF_MAX_S)
        assert await peers.call(ADDRESS, Ping(), timeout_s=1) == Ok()
        await peers.close()

    virtual.run(main)


def test_a_lost_connection_is_replaced_at_once() -> None:
    async def main() -> None:
        network = LocalNetwork()
        await network.listen(ADDRESS, Echo())
        peers = Peers(network)
        stream = peers.stream(ADDRESS, Subscribe(), idle_timeout_s=5)
        assert await anext(stream) == PrefillProgress(1)
        network.sever(ADDRESS)
        with pytest.raises(PeerLost):
            await anext(stream)
        assert await peers.call(ADDRESS, Ping(), timeout_s=1) == Ok()
        await peers.close()

    virtual.run(main)


def test_a_calls_deadline_covers_the_connecting() -> None:
    async def main() -> None:
        link = Slow()
        link.cut = True
        network = LocalNetwork(link)
        await network.listen(ADDRESS, Echo())
        peers = Peers(network)
        start_s = now_s()
        with pytest.raises(TimedOut, match="no connection"):
            await peers.call(ADDRESS, Ping(), timeout_s=0.5)
        assert now_s() - start_s == pytest.approx(0.5)
        link.cut = False  # a caller that gave up says nothing about the peer
        assert await peers.call(ADDRESS, Ping(), timeout_s=0.5) == Ok()
        await peers.close()

    virtual.run(main)


def test_a_caller_that_leaves_does_not_spoil_it_for_others() -> None:
    async def main() -> None:
        network = LocalNetwork(Slow())
        await network.listen(ADDRESS, Echo())
        peers = Peers(network)
        first = asyncio.create_task(peers.get(ADDRESS))
        second = asyncio.create_task(peers.get(ADDRESS))
        await asyncio.sleep(0.015)
        first.cancel()
        connection = await second
        assert not connection.closed
        await peers.close()
        assert connection.closed

    virtual.run(main)

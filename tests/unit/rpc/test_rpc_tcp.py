import asyncio
from collections.abc import AsyncGenerator

import pytest
import uvloop

from tracehaul.rpc.base import CallContext
from tracehaul.rpc.tcp import TcpNetwork, join_address, split_address
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillProgress


class Echo:
    async def call(self, request: Request, context: CallContext) -> Reply:
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        yield PrefillProgress(1)

    def disconnected(self, peer: str) -> None:
        pass


@pytest.mark.parametrize(
    ("address", "parts"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("a.b:65535", ("a.b", 65535))]
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
    assert join_address(*parts) == address


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:-1", "host:65536", "host:²", "h" * 300 + ":1"])
def test_what_is_no_address_is_a_lost_peer(address: str) -> None:
    async def main() -> None:
        with pytest.raises(PeerLost):
            await TcpNetwork().connect(address, timeout_s=5)

    asyncio.run(main())


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_ipv6(runner: type) -> None:
    async def main() -> None:
        server = await TcpNetwork().listen("[::1]:0", Echo())
        connection = await TcpNetwork().connect(server.address, timeout_s=5)
        assert await connection.call(Ping(), timeout_s=5) == Ok()
        await connection.close()
        await server.close()

    runner(main())


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
@pytest.mark.parametrize(
    ("listen", "announce"),
    [("127.0.0.1:0", "localhost"), ("localhost:0", ""), ("[::1]:0", "::1")],
)
def test_what_is_announced_is_not_what_is_bound(runner: type, listen: str, announce: str) -> None:
    async def main() -> None:
        server = await TcpNetwork().listen(listen, Echo(), announce)
        host, port = split_address(server.address)
        assert host == (announce or "localhost")
        assert port > 0
        connection = await TcpNetwork().connect(server.address, timeout_s=5)
        assert await connection.call(Ping(), timeout_s=5) == Ok()
        await connection.close()
        await server.close()
        again = await TcpNetwork().listen(f"{listen.rpartition(':')[0]}:{port}", Echo(), announce)
        assert again.address == server.address, "a port may be fixed"
        await again.close()

    runner(main())


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_all_addresses_are_bound_and_one_is_announced(runner: type) -> None:
    async def main() -> None:
        for listen in ("0.0.0.0:0", "[::]:0"):
            with pytest.raises(OSError, match="say the address"):
                await TcpNetwork().listen(listen, Echo())
            with pytest.raises(OSError, match="each host's own"):
                await TcpNetwork().listen(listen, Echo(), "127.0.0.1")
        server = await TcpNetwork().listen("[::]:0", Echo(), "gpu-7")
        assert server.address.startswith("gpu-7:")
        port = split_address(server.address)[1]
        for host in ("127.0.0.1", "::1"):
            connection = await TcpNetwork().connect(join_address(host, port), timeout_s=5)
            assert await connection.call(Ping(), timeout_s=5) == Ok()
            await connection.close()
        await server.close()

    runner(main())

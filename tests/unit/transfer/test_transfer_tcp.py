"""What strangers and slow writers get from the TCP transport. Its transfers are in the contract suite."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from tracehaul.transfer import tcp, tcp_serving
from tracehaul.transfer import tcp_wire as wire
from tracehaul.transfer.base import Copy
from tracehaul.transfer.landing import COPIES_MAX
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.region import Registered
from tracehaul.transfer.tcp import TcpPayload, TcpTransfer
from tracehaul.wire.hashing import checksum

NBYTES = 1 << 20
WAIT_S = 10.0


def play(case: Callable[[TcpTransfer, Registered], Awaitable[None]]) -> None:
    async def main() -> None:
        transfer = TcpTransfer("owner#1", "127.0.0.1")
        memory = allocate(NBYTES, "test")
        try:
            await case(transfer, transfer.register(memory))
        finally:
            await transfer.close()
            memory.close()

    asyncio.run(main())


class Stranger:
    """A bare connection to an owner."""

    def __init__(self, region: Registered) -> None:
        self.payload = msgspec.msgpack.decode(region.descriptor.payload, type=TcpPayload)
        self.socket = socket.create_connection((self.payload.host, self.payload.port), timeout=WAIT_S)

    async def say(self, data: bytes) -> bytes:
        """Send, and hear until the owner hangs up."""

        def talk() -> bytes:
            heard = b""
            try:
                self.socket.sendall(data)
                while piece := self.socket.recv(65536):
                    heard += piece
            except ConnectionError:
                pass
            return heard

        return await asyncio.to_thread(talk)


def request(way: bytes, token: bytes, ranges: list[tuple[int, int]], nbytes: int = NBYTES) -> bytes:
    return wire.pack_request(wire.Head(way, token, nbytes, len(ranges)), ranges)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: example\r\n\r\n" + bytes(100),
        wire.HEAD.pack(b"thd1", b"x", bytes(16), NBYTES, 1) + bytes(16),
        wire.HEAD.pack(b"thd1", wire.READ, bytes(16), NBYTES, COPIES_MAX + 1),
    ],
)
def test_what_is_no_request_ends_the_connection(data: bytes) -> None:
    async def case(_: TcpTransfer, region: Registered) -> None:
        assert await Stranger(region).say(data) == b""

    play(case)


def test_without_the_token_nothing_is_told_or_taken() -> None:
    async def case(_: TcpTransfer, region: Registered) -> None:
        region.buffer[:] = b"s" * NBYTES
        assert await Stranger(region).say(request(wire.READ, bytes(16), [(0, 100)])) == wire.UNKNOWN_REGION
        token = Stranger(region).payload.token
        assert await Stranger(region).say(request(wire.READ, token, [(0, 9)], NBYTES - 1)) == wire.UNKNOWN_REGION
        for bad in [(NBYTES - 5, 6), (0, 1 << 63), ((1 << 64) - 1, 2)]:
            assert await Stranger(region).say(request(wire.READ, token, [(0, 1), bad])) == wire.BAD_RANGE
        await Stranger(region).say(request(wire.WRITE, bytes(16), [(0, 100)]) + b"x" * 100)
        await Stranger(region).say(request(wire.WRITE, token, [(NBYTES, 1)]) + b"x")
        assert bytes(region.buffer) == b"s" * NBYTES

    play(case)


def test_a_write_that_stood_still_too_long_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_serving, "STALL_S", 0.2)

    async def case(_: TcpTransfer, region: Registered) -> None:
        writer = Stranger(region)
        writer.socket.sendall(request(wire.WRITE, writer.payload.token, [(0, 100)]) + b"a" * 10)
        await asyncio.sleep(0.5)
        assert await writer.say(b"b" * 90) == b""
        assert bytes(region.buffer[10:100]) == bytes(90)

    play(case)


def test_more_transfers_than_connections_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "LINES_MAX", 2)

    async def case(transfer: TcpTransfer, region: Registered) -> None:
        memory = allocate(NBYTES, "local")
        local = transfer.register(memory)
        region.buffer[:] = bytes(range(256)) * (NBYTES >> 8)
        size = NBYTES >> 5
        reads = [
            transfer.read(region.descriptor, local, [Copy(i * size, i * size, size)], timeout_s=WAIT_S)
            for i in range(32)
        ]
        sums = await asyncio.gather(*reads)
        assert bytes(local.buffer) == bytes(region.buffer)
        assert {found for (found,) in sums} == {checksum(region.buffer[:size])}

    play(case)

"""What strangers and slow writers get from the TCP transport. Its transfers are in the contract suite."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import uvloop

from tracehaul.runtime import clock
from tracehaul.runtime.addresses import BadAddress, bound
from tracehaul.transfer import names, tcp_asking, tcp_serving
from tracehaul.transfer import tcp_wire as wire
from tracehaul.transfer.base import Copy
from tracehaul.transfer.landing import COPIES_MAX
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.names import Names
from tracehaul.transfer.place import Place
from tracehaul.transfer.region import Registered
from tracehaul.transfer.tcp import TcpPayload, TcpTransfer
from tracehaul.wire.errors import TransferError, TransferLost
from tracehaul.wire.hashing import checksum

NBYTES = 1 << 20
WAIT_S = 10.0


def play(case: Callable[[TcpTransfer, Registered], Awaitable[None]]) -> None:
    async def main() -> None:
        transfer = TcpTransfer("owner#1")
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
    monkeypatch.setattr(tcp_asking, "LINES_MAX", 2)

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


# --- where it is, and what it says of that


async def read_from(place: Place, changed: Callable[[TcpPayload], TcpPayload] = lambda payload: payload) -> str:
    """Read from an owner at ``place`` by what it announces, or a change of it; the host that was announced."""
    owner, reader = TcpTransfer("owner#1", place), TcpTransfer("reader#1")
    memory, ours = allocate(NBYTES, "owner"), allocate(NBYTES, "reader")
    try:
        memory.buffer[:5] = b"hello"
        remote = owner.register(memory).descriptor
        payload = changed(msgspec.msgpack.decode(remote.payload, type=TcpPayload))
        remote = msgspec.structs.replace(remote, payload=msgspec.msgpack.encode(payload))
        for _ in range(2):
            await reader.read(remote, reader.register(ours), [Copy(0, 0, 5)], timeout_s=WAIT_S)
            assert bytes(ours.buffer[:5]) == b"hello"
        return payload.host
    finally:
        await reader.close()
        await owner.close()
        memory.close()
        ours.close()


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
@pytest.mark.parametrize(
    ("place", "told"),
    [
        (Place("::1"), "::1"),
        (Place("127.0.0.1", "localhost"), "localhost"),
        (Place("localhost"), "localhost"),
    ],
)
def test_names_and_both_families(runner: Callable[..., None], place: Place, told: str) -> None:
    async def main() -> None:
        assert await read_from(place) == told

    runner(main())


@pytest.mark.parametrize("place", [Place("127.0.0.1", "both"), Place("::1", "both")])
def test_of_a_names_addresses_that_which_answers_is_taken(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    real = socket.getaddrinfo

    def several(host: str, port: int, *arguments: object, **options: object) -> object:
        hosts = ["192.0.2.1", "::1", "127.0.0.1"] if host == "both" else [host]
        return [found for each in hosts for found in real(each, port, *arguments, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", several)
    monkeypatch.setattr(names, "TRY_S", 0.1)  # nobody is at the first

    async def main() -> None:
        assert await read_from(place) == "both"

    asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_all_addresses_are_bound_and_one_is_announced(host: str) -> None:
    async def main() -> None:
        def here(payload: TcpPayload) -> TcpPayload:
            assert payload.host == "gpu-7"
            return msgspec.structs.replace(payload, host=host)

        await read_from(Place("::", "gpu-7"), here)

    asyncio.run(main())


@pytest.mark.parametrize(
    "place",
    [Place("0.0.0.0"), Place("::"), Place("0.0.0.0", "127.0.0.1"), Place("0.0.0.0", "localhost")],
)
def test_what_reaches_nobody_is_not_announced(place: Place) -> None:
    with pytest.raises(BadAddress):
        TcpTransfer("owner#1", place)


def test_a_fixed_port_is_that_one_or_none() -> None:
    async def main() -> None:
        with bound("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
            with pytest.raises(OSError, match=f"port {port}"):
                TcpTransfer("owner#1", Place(port=port))
        transfer = TcpTransfer("owner#1", Place(port=port))
        assert (transfer.host, transfer.port) == ("127.0.0.1", port)
        await transfer.close()

    asyncio.run(main())


def test_a_name_without_an_address_is_a_lost_peer() -> None:
    async def main() -> None:
        with pytest.raises(TransferLost, match="no address of nobody"):
            await read_from(Place(), lambda payload: msgspec.structs.replace(payload, host="nobody.invalid"))

    asyncio.run(main())


@pytest.mark.parametrize("host", ["", "a b", "-", "a/b", "h" * 300, "::1\x00", "é"])
def test_what_is_no_host_is_refused(host: str) -> None:
    async def main() -> None:
        with pytest.raises(TransferError, match="unusable descriptor"):
            await read_from(Place(), lambda payload: msgspec.structs.replace(payload, host=host))

    asyncio.run(main())


def test_a_slow_name_service_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the loop nor transfers with others; and who asks for the same name asks once."""
    gate, asked = threading.Event(), []
    real = socket.getaddrinfo

    def slow(host: str, *arguments: object, **options: object) -> object:
        if host != "far":
            return real(host, *arguments, **options)  # type: ignore[arg-type]
        asked.append(host)
        gate.wait(WAIT_S)
        return real("127.0.0.1", *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def far(payload: TcpPayload) -> TcpPayload:
            return msgspec.structs.replace(payload, host="far")

        reading = loop.create_task(read_from(Place(), far))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(WAIT_S / 2):
            await read_from(Place())
        assert not reading.done()
        gate.set()
        assert await reading == "far"
        assert asked == ["far"], "the second read goes on over the same connection"

    asyncio.run(main())


def test_a_name_service_that_never_answers_costs_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
        looked_up = Names()
        start_s = clock.now_s()
        with pytest.raises(TransferLost, match="no address of far within"):
            await looked_up.target("far", 1, 0.1)
        assert clock.now_s() - start_s < WAIT_S / 2
        waiting = asyncio.gather(*(looked_up.target("far", 1, WAIT_S) for _ in range(2)), return_exceptions=True)
        await asyncio.sleep(0.01)
        await looked_up.aclose()
        assert [type(outcome) for outcome in await waiting] == [TransferLost, TransferLost]

    asyncio.run(main())

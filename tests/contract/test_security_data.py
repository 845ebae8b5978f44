"""Who may read and write on the data plane, proven or under TLS; and what an eavesdropper sees of both planes."""

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from cluster.security.ca import retire, rotate
from cluster.security.laying import lay, lay_ca
from tests.contract.conftest import HOST, Echo, listening
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import Credentials
from tracehaul.transfer import tcp, tcp_asking, tcp_tls
from tracehaul.transfer.base import Copy, TransferTimedOut
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.tcp import TcpTransfer
from tracehaul.transfer.tcp_proof import Guard
from tracehaul.wire.blocks import Exists
from tracehaul.wire.errors import TransferError
from tracehaul.wire.ids import BlockHash

NBYTES = 1 << 20
DAY_S = 86400.0

Main = Callable[[], Coroutine[Any, Any, None]]


pytestmark = pytest.mark.usefixtures("talkative")


# --- the data plane ---------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["auth", "tls"])
def encrypted(request: pytest.FixtureRequest) -> bool:
    return request.param


@contextlib.asynccontextmanager
async def pair(owner: Guard | None, reader: Guard | None) -> AsyncGenerator[tuple[Any, ...]]:
    memories = [allocate(NBYTES, name) for name in ("owner", "reader")]
    transfers = [TcpTransfer("owner#1", guard=owner), TcpTransfer("reader#1", guard=reader)]
    try:
        yield (*transfers, *(t.register(memory) for t, memory in zip(transfers, memories, strict=True)))
    finally:
        for transfer in transfers:
            await transfer.close()
        for memory in memories:
            memory.close()


def test_nobody_outside_the_ca_reads_or_writes(
    authority: Any, stranger: Any, caplog: pytest.LogCaptureFixture, encrypted: bool
) -> None:
    """Although each knows the region's token."""
    half = authority.secrets("half")
    lay(half, stranger.issue("store-0"))
    lay_ca(half, authority.issue("x").ca)
    expired = authority.credentials("late", days=1, ago_s=10 * DAY_S)

    async def main() -> None:
        for credentials in (stranger.credentials("store-0"), Credentials(half), expired, None):
            reader = Guard(credentials, encrypted) if credentials is not None else None
            async with pair(Guard(authority.credentials("owner"), encrypted), reader) as (_, transfer, theirs, mine):
                theirs.buffer[:4] = b"kept"
                mine.buffer[:4] = b"evil"
                for move in (transfer.read, transfer.write):
                    with pytest.raises(TransferError):
                        await move(theirs.descriptor, mine, [Copy(0, 0, 4)], timeout_s=5)
                assert (bytes(theirs.buffer[:4]), bytes(mine.buffer[:4])) == (b"kept", b"evil")

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    said = str([vars(record) for record in caplog.records])
    assert "refused a data connection" in said
    for why in ("it does not trust the CA", "of an unknown CA", "expired", "it speaks no TLS"):
        assert why in said


@pytest.mark.parametrize("owner", ["plain", "auth", "tls"])
@pytest.mark.parametrize("reader", ["plain", "auth", "tls"])
def test_ends_that_demand_different_things_do_not_serve_each_other(authority: Any, owner: str, reader: str) -> None:
    """And say so at once."""

    def guard(name: str, word: str) -> Guard | None:
        return None if word == "plain" else Guard(authority.credentials(name), word == "tls")

    async def main() -> None:
        async with pair(guard("owner", owner), guard("reader", reader)) as (_, transfer, theirs, mine):
            reads = transfer.read(theirs.descriptor, mine, [Copy(0, 0, 4)], timeout_s=5)
            theirs.buffer[:4] = b"kept"
            if owner == reader:
                await reads
                assert bytes(mine.buffer[:4]) == b"kept"
                return
            with pytest.raises(TransferError) as refusal:
                await reads
            assert not isinstance(refusal.value, TransferTimedOut)
            assert bytes(mine.buffer[:4]) != b"kept"

    asyncio.run(main())


def test_what_was_heard_of_a_connection_opens_no_other(authority: Any) -> None:
    """Proven, not encrypted: all that an end said, with the token in clear, said again."""

    async def main() -> None:
        guards = [Guard(authority.credentials(name), False) for name in ("owner", "reader")]
        async with pair(*guards) as (_, transfer, theirs, mine):
            payload = msgspec.msgpack.decode(theirs.descriptor.payload, type=tcp.TcpPayload)
            async with recorded(payload.port) as (port, _, said):
                packed = msgspec.msgpack.encode(msgspec.structs.replace(payload, port=port))
                through = msgspec.structs.replace(theirs.descriptor, payload=packed)
                mine.buffer[:4] = b"good"
                await transfer.write(through, mine, [Copy(0, 0, 4)], timeout_s=5)
            assert bytes(theirs.buffer[:4]) == b"good"
            assert payload.token in said
            theirs.buffer[:4] = b"kept"
            request = bytes(said[said.index(b"thd1") :])
            for again in (bytes(said), request):
                reader, writer = await asyncio.open_connection(HOST, payload.port)
                writer.write(again)
                async with asyncio.timeout(5):
                    with contextlib.suppress(ConnectionError):
                        while heard := await reader.read(1 << 16):
                            assert payload.token not in heard
                writer.close()
            assert bytes(theirs.buffer[:4]) == b"kept"

    asyncio.run(main())


def test_one_who_proves_nothing_holds_up_nobody(authority: Any, encrypted: bool) -> None:
    async def main() -> None:
        guards = [Guard(authority.credentials(name), encrypted) for name in ("owner", "reader")]
        async with pair(*guards) as (_, transfer, theirs, mine):
            port = msgspec.msgpack.decode(theirs.descriptor.payload, type=tcp.TcpPayload).port
            silent = [await asyncio.open_connection(HOST, port) for _ in range(16)]
            for _, writer in silent[:8]:
                writer.write(b"\x16\x03\x01")
            await transfer.read(theirs.descriptor, mine, [Copy(0, 0, NBYTES)], timeout_s=5)
            for _, writer in silent:
                writer.close()

    asyncio.run(main())


def moves(transfer: TcpTransfer, theirs: Any, mine: Any) -> Awaitable[Any]:
    return transfer.read(theirs.descriptor, mine, [Copy(0, 0, NBYTES)], timeout_s=10)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """To whom data connections were made."""
    made: list[str | None] = []

    class Counted(tcp_tls.TlsSocket):
        def __init__(self, sock: Any, context: ssl.SSLContext, host: str | None) -> None:
            super().__init__(sock, context, host)
            made.append(host)

    monkeypatch.setattr(tcp_asking, "TlsSocket", Counted)
    return made


def test_new_certificates_make_new_data_connections_and_lose_no_transfer(
    authority: Any, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    owner, reader = authority.credentials("owner"), authority.credentials("reader")
    made = counted(monkeypatch)

    async def main() -> None:
        async with pair(Guard(owner, encrypted), Guard(reader, encrypted)) as (_, transfer, theirs, mine):
            theirs.buffer[:] = os.urandom(NBYTES)
            for _ in range(3):
                await moves(transfer, theirs, mine)
            assert 1 <= len(made) < 3, "one connection serves one transfer after the other"
            before = len(made)
            both = rotate(authority.folder, now_s=clock.wall_s())
            for name in ("owner", "reader"):
                lay_ca(authority.secrets(name), both)
            running = [asyncio.ensure_future(moves(transfer, theirs, mine)) for _ in range(4)]
            owner.refresh()
            reader.refresh()
            await asyncio.gather(*running)
            for name in ("owner", "reader"):
                lay(authority.secrets(name), authority.issue(name))
            lay_ca(authority.secrets("owner"), retire(authority.folder))
            owner.refresh()
            reader.refresh()
            await moves(transfer, theirs, mine)  # which an old connection's certificate would not have got
            assert mine.buffer == theirs.buffer
            assert len(made) > before

    asyncio.run(main())


def test_a_connection_ends_before_its_key_is_worn(authority: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_asking, "BYTES_MAX", 3 * NBYTES)
    made = counted(monkeypatch)
    guards = [Guard(authority.credentials(name), True) for name in ("owner", "reader")]

    async def main() -> None:
        async with pair(*guards) as (_, transfer, theirs, mine):
            for _ in range(10):
                await moves(transfer, theirs, mine)
            await asyncio.gather(*(moves(transfer, theirs, mine) for _ in range(90)))
            assert 100 // 5 <= len(made) <= 100 // 2

    asyncio.run(main())


# --- on the wire ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def recorded(port: int) -> AsyncGenerator[tuple[int, bytearray, bytearray]]:
    """A port that leads to another; all that passes, and what of it those say who come."""
    seen, said = bytearray(), bytearray()
    passing: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *kept: bytearray) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                for each in kept:
                    each.extend(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(HOST, port)
        passing.update(map(asyncio.ensure_future, (carry(reader, back, seen, said), carry(there, writer, seen))))

    proxy = await asyncio.start_server(take, HOST, 0)
    try:
        yield proxy.sockets[0].getsockname()[1], seen, said
    finally:
        proxy.close()
        for task in passing:
            task.cancel()


@pytest.mark.parametrize(
    ("control", "data"), [("plain", "plain"), ("mtls", "plain"), ("mtls", "auth"), ("mtls", "tls")]
)
def test_what_an_eavesdropper_sees(authority: Any, control: str, data: str) -> None:
    owner, reader = (authority.credentials(name) if control == "mtls" else None for name in ("owner", "reader"))
    guards = [Guard(each, data == "tls") if each is not None and data != "plain" else None for each in (owner, reader)]
    kv = os.urandom(NBYTES)
    query = Exists((BlockHash(b"a hash of 32 bytes, never spoken"),))

    async def main() -> None:
        async with listening(TcpNetwork(credentials=owner), Echo()) as address:
            async with recorded(int(address.rpartition(":")[2])) as (port, seen, _):
                connection = await TcpNetwork(credentials=reader).connect(f"{HOST}:{port}", timeout_s=5)
                await connection.call(query, timeout_s=5)
                await connection.close()
            assert len(seen) > 32
            assert (b"never spoken" in seen) is (control == "plain")
        async with pair(*guards) as (_, transfer, theirs, mine):
            payload = msgspec.msgpack.decode(theirs.descriptor.payload, type=tcp.TcpPayload)
            theirs.buffer[:] = kv
            async with recorded(payload.port) as (port, seen, _):
                packed = msgspec.msgpack.encode(msgspec.structs.replace(payload, port=port))
                through = msgspec.structs.replace(theirs.descriptor, payload=packed)
                await transfer.read(through, mine, [Copy(0, 0, NBYTES)], timeout_s=10)
                assert mine.buffer == kv
                mine.buffer[:] = kv[::-1]
                await transfer.write(through, mine, [Copy(0, 0, NBYTES)], timeout_s=10)
            assert len(seen) > 2 * NBYTES
            for secret in (payload.token, kv[:32], kv[-32:], kv[::-1][:32]):
                assert (secret in seen) is (data != "tls")

    asyncio.run(main())

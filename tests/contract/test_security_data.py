"""Who may read and write on the data plane under TLS; and what an eavesdropper sees of both planes."""

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
from tracehaul.transfer.base import Copy
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.tcp import TcpTransfer
from tracehaul.wire.blocks import Exists
from tracehaul.wire.errors import TransferError
from tracehaul.wire.ids import BlockHash

NBYTES = 1 << 20
DAY_S = 86400.0

Main = Callable[[], Coroutine[Any, Any, None]]


pytestmark = pytest.mark.usefixtures("talkative")


# --- the data plane ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pair(owner: Credentials | None, reader: Credentials | None) -> AsyncGenerator[tuple[Any, ...]]:
    memories = [allocate(NBYTES, name) for name in ("owner", "reader")]
    transfers = [TcpTransfer("owner#1", credentials=owner), TcpTransfer("reader#1", credentials=reader)]
    try:
        yield (*transfers, *(t.register(memory) for t, memory in zip(transfers, memories, strict=True)))
    finally:
        for transfer in transfers:
            await transfer.close()
        for memory in memories:
            memory.close()


def test_nobody_outside_the_ca_reads_or_writes(authority: Any, stranger: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Although each knows the region's token."""
    half = authority.secrets("half")
    lay(half, stranger.issue("store-0"))
    lay_ca(half, authority.issue("x").ca)
    expired = authority.credentials("late", days=1, ago_s=10 * DAY_S)

    async def main() -> None:
        for reader in (stranger.credentials("store-0"), Credentials(half), expired, None):
            async with pair(authority.credentials("owner"), reader) as (_, transfer, theirs, mine):
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


def test_a_tls_reader_is_not_served_in_clear(authority: Any) -> None:
    async def main() -> None:
        async with pair(None, authority.credentials("reader")) as (_, transfer, theirs, mine):
            with pytest.raises(TransferError):
                await transfer.read(theirs.descriptor, mine, [Copy(0, 0, 4)], timeout_s=5)

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
    authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = authority.credentials("owner"), authority.credentials("reader")
    made = counted(monkeypatch)

    async def main() -> None:
        async with pair(owner, reader) as (_, transfer, theirs, mine):
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
    reader = authority.credentials("reader")

    async def main() -> None:
        async with pair(authority.credentials("owner"), reader) as (_, transfer, theirs, mine):
            for _ in range(10):
                await moves(transfer, theirs, mine)
            await asyncio.gather(*(moves(transfer, theirs, mine) for _ in range(90)))
            assert 100 // 5 <= len(made) <= 100 // 2

    asyncio.run(main())


# --- on the wire ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def recorded(port: int) -> AsyncGenerator[tuple[int, bytearray]]:
    """A port that leads to another, and all that passes."""
    seen = bytearray()
    passing: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                seen.extend(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(HOST, port)
        passing.update(map(asyncio.ensure_future, (carry(reader, back), carry(there, writer))))

    proxy = await asyncio.start_server(take, HOST, 0)
    try:
        yield proxy.sockets[0].getsockname()[1], seen
    finally:
        proxy.close()
        for task in passing:
            task.cancel()


@pytest.mark.parametrize("encrypted", [False, True])
def test_what_an_eavesdropper_sees(authority: Any, encrypted: bool) -> None:
    owner = authority.credentials("owner") if encrypted else None
    reader = authority.credentials("reader") if encrypted else None
    kv = os.urandom(NBYTES)
    query = Exists((BlockHash(b"a hash of 32 bytes, never spoken"),))

    async def main() -> None:
        async with listening(TcpNetwork(credentials=owner), Echo()) as address:
            async with recorded(int(address.rpartition(":")[2])) as (port, seen):
                connection = await TcpNetwork(credentials=reader).connect(f"{HOST}:{port}", timeout_s=5)
                await connection.call(query, timeout_s=5)
                await connection.close()
            assert len(seen) > 32
            assert (b"never spoken" in seen) is not encrypted
        async with pair(owner, reader) as (_, transfer, theirs, mine):
            payload = msgspec.msgpack.decode(theirs.descriptor.payload, type=tcp.TcpPayload)
            theirs.buffer[:] = kv
            async with recorded(payload.port) as (port, seen):
                packed = msgspec.msgpack.encode(msgspec.structs.replace(payload, port=port))
                through = msgspec.structs.replace(theirs.descriptor, payload=packed)
                await transfer.read(through, mine, [Copy(0, 0, NBYTES)], timeout_s=10)
                assert mine.buffer == kv
                mine.buffer[:] = kv[::-1]
                await transfer.write(through, mine, [Copy(0, 0, NBYTES)], timeout_s=10)
            assert len(seen) > 2 * NBYTES
            for secret in (payload.token, kv[:32], kv[-32:], kv[::-1][:32]):
                assert (secret in seen) is not encrypted

    asyncio.run(main())

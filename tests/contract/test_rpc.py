"""The contract of tracehaul.rpc.base, over TCP on both event loops and in process."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
import uvloop

from sim import loop as virtual
from tracehaul.rpc import frames
from tracehaul.rpc.base import CallContext, Connection, Network, Replies, Server
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.session import DEFAULT_LIMITS, Limits
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.clock import now_s
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import Attach, Existing, Exists, Subscribe
from tracehaul.wire.errors import (
    ClusterError,
    ContextTooLong,
    Overloaded,
    PeerLost,
    ProtocolError,
    TimedOut,
    error_from_code,
)
from tracehaul.wire.ids import BlockHash, StepId, TraceId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillProgress

KINDS = ["tcp-asyncio", "tcp-uvloop", "local", "local-virtual"]
TCP_KINDS = ["tcp-asyncio", "tcp-uvloop"]
SOON_S = 5.0


class Recorder:
    """A service whose calls do what a test installs, and that records what happens to its handlers."""

    def __init__(self) -> None:
        self.on_call: Callable[[Request, CallContext], Awaitable[Reply]] = self._echo
        self.on_stream: Callable[[Request, CallContext], AsyncGenerator[Reply, None]] = count_to(3)
        self.started = 0
        self.cancelled = 0
        self.ended = 0
        self.contexts: list[CallContext] = []
        self.gone: list[tuple[str, int]] = []
        """Peers that left, and how many handlers had ended by then."""

    async def _echo(self, request: Request, context: CallContext) -> Reply:
        return Existing(held=b"".join(request.hashes)) if isinstance(request, Exists) else Ok()

    async def call(self, request: Request, context: CallContext) -> Reply:
        self.started += 1
        self.contexts.append(context)
        try:
            return await self.on_call(request, context)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        self.started += 1
        self.contexts.append(context)
        try:
            async with contextlib.aclosing(self.on_stream(request, context)) as replies:
                async for reply in replies:
                    yield reply
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    def disconnected(self, peer: str) -> None:
        self.gone.append((peer, self.ended))


class Bench:
    """A network, a server on it and its service."""

    def __init__(self, network: Network, service: Recorder, server: Server) -> None:
        self.network = network
        self.service = service
        self.server = server
        self.connections: list[Connection] = []

    async def connect(self) -> Connection:
        connection = await self.network.connect(self.server.address, timeout_s=SOON_S)
        self.connections.append(connection)
        return connection


def run(kind: str, test: Callable[[Bench], Awaitable[None]], limits: Limits = DEFAULT_LIMITS) -> None:
    async def main() -> None:
        network: Network = LocalNetwork(limits=limits) if kind.startswith("local") else TcpNetwork(limits)
        service = Recorder()
        server = await network.listen("127.0.0.1:0", service)
        bench = Bench(network, service, server)
        loop_errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        try:
            await test(bench)
        finally:
            for connection in bench.connections:
                await connection.close()
            await server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks leaked: {left}"
        assert not loop_errors

    match kind:
        case "tcp-uvloop":
            uvloop.run(main())
        case "local-virtual":
            virtual.run(main)
        case _:
            asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event to offer
            await asyncio.sleep(0.002)


async def collect(stream: Replies, into: list[Reply]) -> None:
    async for reply in stream:
        into.append(reply)


async def forever(request: Request, context: CallContext) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


def count_to(
    stop: int, then: Callable[[], Awaitable[object]] | None = None
) -> Callable[[Request, CallContext], AsyncGenerator[Reply, None]]:
    async def stream(request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        for number in range(stop):
            yield PrefillProgress(number)
        if then is not None:
            await then()

    return stream


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_call_brings_its_reply_and_its_context(kind: str) -> None:
    async def test(bench: Bench) -> None:
        connection = await bench.connect()
        reply = await connection.call(
            Exists((BlockHash(b"ab"), BlockHash(b"c"))),
            timeout_s=SOON_S,
            context=CallContext(trace=TraceId("t"), step=StepId("s"), peer="forged"),
        )
        assert reply == Existing(b"abc")
        [context] = bench.service.contexts
        assert (context.trace, context.step) == ("t", "s")
        assert 0 < context.timeout_s <= SOON_S
        assert context.peer not in ("", "forged")
        assert not connection.closed

    run(kind, test)


@every_kind
def test_concurrent_calls_find_their_own_replies_in_any_order(kind: str) -> None:
    async def later_first(request: Request, context: CallContext) -> Reply:
        assert isinstance(request, Exists)
        await asyncio.sleep(0.0002 * (100 - request.hashes[0][0]))
        return Existing(request.hashes[0])

    async def test(bench: Bench) -> None:
        bench.service.on_call = later_first
        connection = await bench.connect()
        hashes = [BlockHash(bytes([number])) for number in range(100)]
        replies = await asyncio.gather(*(connection.call(Exists((h,)), timeout_s=SOON_S) for h in hashes))
        assert replies == [Existing(h) for h in hashes]

    run(kind, test)


@every_kind
def test_two_connections_have_two_peers(kind: str) -> None:
    async def test(bench: Bench) -> None:
        for connection in (await bench.connect(), await bench.connect()):
            await connection.call(Ping(), timeout_s=SOON_S)
        first, second = bench.service.contexts
        assert first.peer != second.peer

    run(kind, test)


@every_kind
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cluster_error_arrives_as_itself(kind: str, streaming: bool) -> None:
    async def fail() -> Reply:
        raise ContextTooLong("8193 > 8192")

    async def test(bench: Bench) -> None:
        bench.service.on_call = lambda request, context: fail()
        bench.service.on_stream = count_to(2, then=fail)
        connection = await bench.connect()
        received: list[Reply] = []
        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        with pytest.raises(ContextTooLong, match="8193 > 8192"):
            await (collect(stream, received) if streaming else connection.call(Ping(), timeout_s=SOON_S))
        assert len(received) == (2 if streaming else 0)

    run(kind, test)


@every_kind
@pytest.mark.parametrize("bug", [KeyError("secret"), TimeoutError("inner"), asyncio.CancelledError()])
def test_a_bug_in_a_handler_arrives_as_a_plain_error_and_hurts_nobody_else(kind: str, bug: BaseException) -> None:
    async def crash(request: Request, context: CallContext) -> Reply:
        raise bug

    async def test(bench: Bench) -> None:
        connection = await bench.connect()
        bench.service.on_call = crash
        with pytest.raises(ClusterError) as caught:
            await connection.call(Ping(), timeout_s=SOON_S)
        assert type(caught.value) is ClusterError
        assert "secret" not in str(caught.value)
        bench.service.on_call = lambda request, context: asyncio.sleep(0, Ok())
        assert await connection.call(Ping(), timeout_s=SOON_S) == Ok()

    run(kind, test)


@every_kind
def test_a_deadline_ends_the_wait_and_the_handler(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_call = forever
        connection = await bench.connect()
        start_s = now_s()
        with pytest.raises(TimedOut):
            await connection.call(Ping(), timeout_s=0.05)
        assert now_s() - start_s < SOON_S
        await until(lambda: bench.service.cancelled == 1)
        assert not connection.closed

    run(kind, test)


@every_kind
def test_no_time_left_sends_nothing(kind: str) -> None:
    async def test(bench: Bench) -> None:
        connection = await bench.connect()
        with pytest.raises(TimedOut):
            await connection.call(Ping(), timeout_s=-1.0)
        await connection.call(Ping(), timeout_s=SOON_S)
        assert bench.service.started == 1

    run(kind, test)


@every_kind
def test_a_cancelled_call_stops_its_handler(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_call = forever
        connection = await bench.connect()
        call = asyncio.create_task(connection.call(Ping(), timeout_s=60))
        await until(lambda: bench.service.started == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: bench.service.cancelled == 1)

    run(kind, test)


@every_kind
def test_a_stream_brings_all_its_items_in_order(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_stream = count_to(1000)
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S, context=CallContext(trace=TraceId("t")))
        assert [reply async for reply in stream] == [PrefillProgress(n) for n in range(1000)]
        [context] = bench.service.contexts
        assert context.trace == "t"
        assert context.timeout_s == 0

    run(kind, test)


@every_kind
def test_what_has_come_is_taken_at_once_and_an_error_after_it(kind: str) -> None:
    async def fail() -> None:
        raise ContextTooLong("no more")

    async def test(bench: Bench) -> None:
        bench.service.on_stream = count_to(7, then=fail)
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        received = [await anext(stream)]
        await until(lambda: bench.service.ended == 1)
        await connection.call(Ping(), timeout_s=SOON_S)  # its answer comes after all of the stream
        received += await stream.take()
        assert received == [PrefillProgress(n) for n in range(7)]
        with pytest.raises(ContextTooLong):
            await stream.take()
        assert await stream.take() == []
        whole = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        bench.service.on_stream = count_to(3)
        taken: list[Reply] = []
        while more := await whole.take():
            taken += more
        assert taken == [PrefillProgress(n) for n in range(3)]

    run(kind, test)


@every_kind
def test_what_is_diverted_is_not_taken_and_the_rest_is_in_order(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_stream = count_to(9)
        connection = await bench.connect()
        diverted: list[Reply] = []

        def take(reply: Reply) -> bool:
            if reply == PrefillProgress(3):
                return False
            diverted.append(reply)
            return True

        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        stream.divert(take)
        taken = await stream.take()
        assert taken[0] == PrefillProgress(3)
        assert diverted == [PrefillProgress(n) for n in range(3)]
        while more := await stream.take():
            taken += more
        in_order = [PrefillProgress(n) for n in range(9)]
        assert taken == [reply for reply in in_order if reply in taken]
        assert diverted == [reply for reply in in_order if reply not in taken]

    run(kind, test)


@every_kind
def test_what_fails_while_it_is_diverted_ends_its_stream_alone(kind: str) -> None:
    def fail(reply: Reply) -> bool:
        raise ValueError("odd")

    async def test(bench: Bench) -> None:
        bench.service.on_stream = count_to(3, then=lambda: asyncio.sleep(60))
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        stream.divert(fail)
        with pytest.raises(ValueError, match="odd"):
            await stream.take()
        await until(lambda: bench.service.cancelled == 1)
        await connection.call(Ping(), timeout_s=SOON_S)

    run(kind, test)


@every_kind
def test_a_stream_that_was_closed_before_it_began_sends_nothing(kind: str) -> None:
    async def test(bench: Bench) -> None:
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        await stream.aclose()
        assert await stream.take() == []
        assert await connection.call(Ping(), timeout_s=SOON_S) == Ok()
        assert bench.service.started == 1

    run(kind, test)


@every_kind
@pytest.mark.parametrize("leave", ["aclose", "cancel"])
def test_leaving_a_stream_stops_its_handler(kind: str, leave: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_stream = count_to(1, then=lambda: asyncio.sleep(60))
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        assert await anext(stream) == PrefillProgress(0)
        if leave == "cancel":
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            await stream.aclose()
        await until(lambda: bench.service.ended == 1)
        assert await connection.call(Ping(), timeout_s=SOON_S) == Ok()

    run(kind, test)


@every_kind
@pytest.mark.slow
def test_a_slow_handler_is_not_taken_for_a_frozen_peer(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_stream = count_to(1, then=lambda: asyncio.sleep(0.8))
        connection = await bench.connect()
        replies = [reply async for reply in connection.stream(Subscribe(), idle_timeout_s=0.3)]
        assert replies == [PrefillProgress(0)]

    run(kind, test, msgspec.structs.replace(DEFAULT_LIMITS, alive_s=0.05))


@every_kind
def test_a_slow_consumer_is_overloaded_and_its_handler_stopped(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_stream = count_to(1_000_000)
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=SOON_S)
        received = [await anext(stream)]
        await until(lambda: bench.service.ended == 1)
        with pytest.raises(Overloaded):
            await collect(stream, received)
        assert received == [PrefillProgress(n) for n in range(len(received))]
        assert len(received) <= 17
        assert await connection.call(Ping(), timeout_s=SOON_S) == Ok()

    run(kind, test, Limits(stream_items_max=16))


@every_kind
def test_too_many_handlers_are_overloaded(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_call = forever
        connection = await bench.connect()
        calls = [asyncio.create_task(connection.call(Ping(), timeout_s=60)) for _ in range(2)]
        await until(lambda: bench.service.started == 2)
        with pytest.raises(Overloaded):
            await connection.call(Ping(), timeout_s=SOON_S)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)

    run(kind, test, Limits(handlers_max=2))


@every_kind
def test_too_many_connections_are_refused(kind: str) -> None:
    async def test(bench: Bench) -> None:
        first = await bench.connect()
        with pytest.raises(PeerLost):
            await bench.connect()
        await first.close()
        await until(lambda: len(bench.service.gone) == 1)
        await (await bench.connect()).call(Ping(), timeout_s=SOON_S)

    run(kind, test, Limits(connections_max=1))


@every_kind
def test_the_service_hears_once_of_a_lost_peer_after_its_handlers_ended(kind: str) -> None:
    async def reluctant(request: Request, context: CallContext) -> Reply:
        try:
            return await forever(request, context)
        finally:
            await asyncio.sleep(0.05)

    async def test(bench: Bench) -> None:
        bench.service.on_call = reluctant
        bench.service.on_stream = count_to(1, then=lambda: asyncio.sleep(60))
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=60)
        await anext(stream)
        call = asyncio.create_task(connection.call(Ping(), timeout_s=60))
        await until(lambda: bench.service.started == 2)
        await connection.close()
        with pytest.raises(PeerLost):
            await call
        with pytest.raises(PeerLost):
            await anext(stream)
        await until(lambda: bool(bench.service.gone))
        await asyncio.sleep(0.1)
        assert bench.service.gone == [(bench.service.contexts[0].peer, 2)]

    run(kind, test)


@every_kind
def test_a_closing_server_ends_calls_streams_and_handlers(kind: str) -> None:
    async def test(bench: Bench) -> None:
        bench.service.on_call = forever
        bench.service.on_stream = count_to(1, then=lambda: asyncio.sleep(60))
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=60)
        await anext(stream)
        call = asyncio.create_task(connection.call(Ping(), timeout_s=60))
        await until(lambda: bench.service.started == 2)
        await bench.server.close()
        assert bench.service.ended == 2
        assert len(bench.service.gone) == 1
        async with asyncio.timeout(SOON_S):
            with pytest.raises(PeerLost):
                await call
            with pytest.raises(PeerLost):
                await anext(stream)
            with pytest.raises(PeerLost):
                await connection.call(Ping(), timeout_s=SOON_S)
        assert connection.closed
        with pytest.raises(PeerLost):
            await bench.connect()

    run(kind, test)


@every_kind
def test_large_messages_both_ways(kind: str) -> None:
    async def test(bench: Bench) -> None:
        connection = await bench.connect()
        big = BlockHash(os.urandom(20 << 20))
        big_call = connection.call(Exists((big,)), timeout_s=60)
        small_call = connection.call(Ping(), timeout_s=60)
        assert await asyncio.gather(big_call, small_call) == [Existing(big), Ok()]

    run(kind, test)


@every_kind
def test_a_stream_of_large_items_waits_for_the_network_not_for_memory(kind: str) -> None:
    produced = 0

    async def chunks(request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        nonlocal produced
        for _ in range(200):
            produced += 1
            yield Existing(bytes(1 << 20))

    async def test(bench: Bench) -> None:
        bench.service.on_stream = chunks
        connection = await bench.connect()
        nbytes = 0
        async for reply in connection.stream(Subscribe(), idle_timeout_s=SOON_S):
            assert isinstance(reply, Existing)
            nbytes += len(reply.held)
        assert nbytes == 200 << 20
        assert produced == 200

    run(kind, test)


@every_kind
def test_an_oversize_message_fails_alone(kind: str) -> None:
    async def too_long(request: Request, context: CallContext) -> Reply:
        return Existing(bytes(2000)) if isinstance(request, Attach) else Ok()

    async def test(bench: Bench) -> None:
        bench.service.on_call = too_long
        connection = await bench.connect()
        with pytest.raises(ProtocolError, match="limit"):
            await connection.call(Exists((BlockHash(bytes(2000)),)), timeout_s=SOON_S)
        with pytest.raises(ProtocolError, match="limit"):
            await connection.call(Attach(), timeout_s=SOON_S)
        assert await connection.call(Ping(), timeout_s=SOON_S) == Ok()

    run(kind, test, Limits(frame_bytes_max=1000))


@every_kind
def test_nobody_listens(kind: str) -> None:
    async def test(bench: Bench) -> None:
        address = bench.server.address
        await bench.server.close()
        start_s = now_s()
        with pytest.raises(PeerLost):
            await bench.network.connect(address, timeout_s=30)
        assert now_s() - start_s < SOON_S

    run(kind, test)


@every_kind
def test_an_address_is_given_once(kind: str) -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(OSError, match=r"in use|address"):
            await bench.network.listen(bench.server.address, Recorder())

    run(kind, test)


# --- only in process --------------------------------------------------------------------------------------


def test_local_freeze_is_silence_and_thaw_delivers() -> None:
    async def test(bench: Bench) -> None:
        network = bench.network
        assert isinstance(network, LocalNetwork)
        bench.service.on_stream = count_to(2, then=lambda: asyncio.sleep(60))
        connection = await bench.connect()
        stream = connection.stream(Subscribe(), idle_timeout_s=0.3)
        await anext(stream)
        await anext(stream)
        network.freeze(bench.server.address)
        with pytest.raises(TimedOut, match="silent"):
            await anext(stream)
        with pytest.raises(TimedOut):
            await connection.call(Ping(), timeout_s=0.05)
        with pytest.raises(TimedOut):
            await network.connect(bench.server.address, timeout_s=0.05)
        network.thaw(bench.server.address)
        assert await connection.call(Ping(), timeout_s=SOON_S) == Ok()

    run("local", test, Limits(alive_s=0.05))


def test_local_crash_breaks_connections_at_once() -> None:
    async def test(bench: Bench) -> None:
        network = bench.network
        assert isinstance(network, LocalNetwork)
        bench.service.on_call = forever
        connection = await bench.connect()
        call = asyncio.create_task(connection.call(Ping(), timeout_s=60))
        await until(lambda: bench.service.started == 1)
        address = bench.server.address
        network.crash(address)
        async with asyncio.timeout(SOON_S):
            with pytest.raises(PeerLost):
                await call
            with pytest.raises(PeerLost):
                await network.connect(address, timeout_s=SOON_S)
        again = await network.listen(address, Recorder())
        await bench.server.close()  # the dead one's owner wakes up: the new one is not its business
        reborn = await network.connect(address, timeout_s=SOON_S)
        assert await reborn.call(Ping(), timeout_s=SOON_S) == Ok()
        await reborn.close()
        await again.close()

    run("local", test)


# --- only over TCP ----------------------------------------------------------------------------------------

every_tcp = pytest.mark.parametrize("kind", TCP_KINDS)


def raw_frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


HELLO = frames.pack(frames.Hello())
HOSTILE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "length before hello": struct.pack(">I", 1 << 20),
    "hostile length": HELLO + b"\xff\xff\xff\xff",
    "empty frame": HELLO + raw_frame(b""),
    "not msgpack": HELLO + raw_frame(b"\xc1\xc1\xc1"),
    "unknown frame": HELLO + raw_frame(msgspec.msgpack.encode([99, 1])),
    "unknown request": HELLO + raw_frame(msgspec.msgpack.encode([1, 1, {"type": "Explode"}, 1.0])),
    "hostile array": HELLO + raw_frame(b"\x92\x08\xdd\xff\xff\xff\xff"),
    "deep nesting": HELLO + raw_frame(b"\x93\x01\x01" + b"\x91" * 200_000),
    "no timeout": HELLO + raw_frame(msgspec.msgpack.encode([1, 1, {"type": "Ping"}, float("nan")])),
    "same call twice": HELLO + 2 * frames.pack(frames.Call(1, Ping(), 1.0)),
    "what servers say": HELLO + frames.pack(frames.End(1)),
    "second hello": HELLO + HELLO,
    "other version": frames.pack(frames.Hello(version=2)),
}


@every_tcp
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_end_their_own_connection_only(kind: str, what: str) -> None:
    async def test(bench: Bench) -> None:
        connection = await bench.connect()
        host, port = bench.server.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(HOSTILE[what])
        async with asyncio.timeout(SOON_S):
            with contextlib.suppress(ConnectionResetError):
                received = await reader.read(-1)
                assert received.startswith(HELLO)
        writer.close()
        assert await connection.call(Ping(), timeout_s=SOON_S) == Ok()

    run(kind, test)


@every_tcp
def test_a_client_that_says_nothing_is_cut_off(kind: str) -> None:
    async def test(bench: Bench) -> None:
        host, port = bench.server.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(SOON_S):
            assert await reader.read(-1) == HELLO
        writer.close()

    run(kind, test, Limits(hello_s=0.1))


@contextlib.asynccontextmanager
async def raw_server(greeting: bytes, then: bytes = b"") -> AsyncGenerator[str, None]:
    """Greets, answers whatever comes with ``then`` once, and says nothing more."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with contextlib.suppress(asyncio.IncompleteReadError):  # the client left
            await reader.readexactly(len(HELLO) + 1)
            writer.write(then)
            await done.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        done.set()
        server.close()
        await asyncio.sleep(0.01)


@every_tcp
def test_a_server_of_another_kind_is_a_clear_error(kind: str) -> None:
    async def test(bench: Bench) -> None:
        for greeting in (b"SSH-2.0-OpenSSH_9.6\r\n", frames.pack(frames.Hello(version=7)), raw_frame(b"\x91\x00")):
            async with raw_server(greeting) as address:
                if greeting.endswith(b"\x91\x00"):  # the defaults of Hello are this version
                    await (await bench.network.connect(address, timeout_s=SOON_S)).close()
                else:
                    with pytest.raises(ProtocolError, match=address):
                        await bench.network.connect(address, timeout_s=SOON_S)
        async with raw_server(b"") as address:
            with pytest.raises(TimedOut):
                await bench.network.connect(address, timeout_s=0.1)

    run(kind, test)


@every_tcp
def test_garbage_from_a_server_is_a_lost_peer(kind: str) -> None:
    async def test(bench: Bench) -> None:
        async with raw_server(HELLO, then=raw_frame(b"\xc1")) as address:
            connection = await bench.network.connect(address, timeout_s=SOON_S)
            with pytest.raises(PeerLost):
                await connection.call(Ping(), timeout_s=SOON_S)
            assert connection.closed

    run(kind, test)


@every_tcp
def test_a_client_that_takes_nothing_is_cut_off(kind: str) -> None:
    async def endless(request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        while True:
            yield Existing(bytes(1 << 18))

    async def test(bench: Bench) -> None:
        bench.service.on_stream = endless
        host, port = bench.server.address.split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(HELLO + frames.pack(frames.Open(1, Subscribe())))
            await until(lambda: len(bench.service.gone) == 1)
        assert bench.service.ended == 1

    run(kind, test, Limits(stall_s=0.3))


CHILD = """
import asyncio, sys
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import Exists
from tracehaul.wire.steps import PrefillProgress

class Service:
    async def call(self, request, context):
        await asyncio.sleep(60)
        return Ok()

    async def stream(self, request, context):
        if isinstance(request, Exists):
            for number in range(100_000):
                yield PrefillProgress(number)
            return
        yield PrefillProgress(1)
        await asyncio.sleep(60)

    def disconnected(self, peer):
        pass

async def main():
    server = await TcpNetwork().listen("127.0.0.1:0", Service())
    print(server.address, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@contextlib.contextmanager
def child() -> Any:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.slow
@every_tcp
def test_a_stopped_process_is_silent_and_a_killed_one_is_lost(kind: str) -> None:
    async def test(bench: Bench) -> None:
        with child() as (process, address):
            connection = await bench.network.connect(address, timeout_s=SOON_S)
            bench.connections.append(connection)
            stream = connection.stream(Subscribe(), idle_timeout_s=1.6)
            await anext(stream)
            second = connection.stream(Subscribe(), idle_timeout_s=60)
            await anext(second)
            pending = asyncio.create_task(anext(second))
            call = asyncio.create_task(connection.call(Ping(), timeout_s=60))
            with contextlib.suppress(TimeoutError):  # it lives: nothing happens for longer than the idle timeout
                async with asyncio.timeout(2.5):
                    await asyncio.wait([pending, call])
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(TimedOut):
                await anext(stream)
            assert not connection.closed
            start_s = now_s()
            process.kill()
            for waiting in (pending, call):
                with pytest.raises(PeerLost):
                    await waiting
            assert now_s() - start_s < SOON_S

    run(kind, test)


@every_tcp
@pytest.mark.slow
def test_a_burst_does_not_overload_a_consumer_that_keeps_up(kind: str) -> None:
    async def test(bench: Bench) -> None:
        with child() as (_, address):
            connection = await bench.network.connect(address, timeout_s=SOON_S)
            bench.connections.append(connection)
            received: list[Reply] = []
            stream = connection.stream(Exists(()), idle_timeout_s=SOON_S)
            received.append(await anext(stream))
            wait_blocking()
            await collect(stream, received)
            assert received == [PrefillProgress(n) for n in range(100_000)]

    run(kind, test)


def wait_blocking() -> None:
    """Stop this process's loop long enough for the socket to fill."""
    threading.Event().wait(0.5)


def test_every_error_code_has_one_class() -> None:
    assert type(error_from_code("overloaded", "")) is Overloaded
    assert type(error_from_code("from the future", "")) is ClusterError

"""The HTTP server inside a running event loop: no signal handlers, no logging of its own."""

import asyncio
import contextlib
import math
import socket
import weakref
from collections.abc import Generator
from typing import Any, cast

import msgspec
import uvicorn
from starlette.types import ASGIApp, Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.calls.errors import invalid
from router.dialects.openai.errors import error_body
from router.http.asgi import CHUNKS
from router.http.config import ApiConfig
from router.http.tls import Certificate
from tracehaul.runtime.accepting import Acceptor, AcceptStats

ROOM = 64
"""Connections beyond the limit, on which calls are answered 503; still more are closed."""
BACKLOG = 1024
KEEP_ALIVE_S = 75
START_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 5.0


class _Server(uvicorn.Server):
    acceptor: Acceptor | None = None
    """In the place of asyncio's own servers."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.acceptor is not None:
            self.acceptor.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals belong to the process that hosts us."""
        yield


class _TooLarge(Exception):
    """The headers are; the parser hands it on as one of its own errors."""


class _Protocol(HttpToolsProtocol):
    """Offers each call's :class:`_Chunks`, and ends connections whose headers are too large or do not end."""

    accepts: AcceptStats
    headers_timeout_s = 0.0
    headers_bytes_max = 0
    _header_bytes = 0
    """Of the message that is read now."""
    _unread_bytes = 0
    """Fed to the parser since it last told of something: of a part that does not end."""
    _head_bytes = 0
    """Of a head that has not ended, as it came."""
    _head_alone = True
    """What came last is of a head, from its beginning to its end."""
    _in_body = False
    _heading = True
    """Headers are awaited, or have begun."""
    _timer: asyncio.TimerHandle | None = None
    """While it waits for headers to end."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.headers_timeout_s, self._close_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread_bytes += len(data)
        self._head_alone = not self._in_body
        super().data_received(data)
        if self.transport.is_closing():
            return
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if self._heading and self._head_alone:
            self._head_bytes += len(data)
        if max(self._unread_bytes, self._head_bytes) > self.headers_bytes_max:
            self.send_400_response("")
        elif self._timer is None and (self._heading or cycle is None or cycle.response_complete):
            self._timer = self.loop.call_later(self.headers_timeout_s, self._close_late)

    def on_message_begin(self) -> None:
        self._header_bytes = self._head_bytes = 0
        self._heading = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread_bytes = self._head_bytes = 0
        self._heading = self._head_alone = False
        self._in_body = True
        self._heard()
        if len(self.connections) >= (self.limit_concurrency or math.inf):
            self.accepts.refuse("api", "connections", connections=len(self.connections))
        super().on_headers_complete()
        cycle = cast("RequestResponseCycle | None", self.cycle)  # none where another protocol takes over
        if cycle is not None:
            cast(dict[str, object], cycle.scope)["extensions"] = {CHUNKS: _Chunks(cycle)}
            if cycle.scope["http_version"] == "1.0":
                cast(Any, cycle).send = _Delimited(cycle)

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread_bytes, self._in_body = 0, False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """As far as it is one: a message that is too large has a status of its own."""
        if max(self._header_bytes, self._unread_bytes, self._head_bytes) > self.headers_bytes_max:
            self._refuse(431, f"headers are longer than {self.headers_bytes_max} bytes")
        else:
            super().send_400_response(msg)

    def _count(self, size: int) -> None:
        self._unread_bytes = 0
        self._header_bytes += size
        if self._header_bytes > self.headers_bytes_max:
            raise _TooLarge

    def _heard(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._header_bytes or self._unread_bytes:
            self._refuse(408, f"headers did not arrive within {self.headers_timeout_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, why: str) -> None:
        """Answer and close; not within another answer."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None and not cycle.response_complete:
            self.transport.abort()
            return
        body = msgspec.json.encode(error_body(invalid(why)))
        head = "content-type: application/json\r\nconnection: close\r\n"
        self.transport.write(STATUS_LINE[status] + f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


class _Delimited:
    """Sends to a client of HTTP/1.0, which knows no chunks: what has no length ends with the connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)  # whose attribute this is
        self._until_close = False

    async def __call__(self, message: Message) -> None:
        cycle = self._cycle()
        if cycle is None:
            return
        if message["type"] == "http.response.start":
            self._until_close = all(name.lower() != b"content-length" for name, _ in message.get("headers", []))
            if self._until_close:
                cycle.chunked_encoding = False
        elif self._until_close and message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, cast(Any, message))


class _Chunks:
    """Implements :class:`router.http.asgi.Chunks`, as uvicorn's own ``send`` does it."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)  # whose scope leads here

    @property
    def writable(self) -> bool:
        cycle = self._cycle()
        if cycle is None or cycle.chunked_encoding is not True:
            return False
        return not (cycle.flow.write_paused or cycle.response_complete)

    def write(self, data: bytes) -> None:
        cycle = self._cycle()
        if cycle is not None and not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class ApiServer:
    """A listening HTTP server."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None], host: str, port: int) -> None:
        self._server = server
        self._task = task
        self.host = host
        self.port = port
        """The port actually bound."""

    async def wait(self) -> None:
        """Returns when the server has ended; raises what it failed with."""
        await asyncio.shield(self._task)

    async def close(self) -> None:
        """Accept no more calls, let running ones end for the grace time, then cancel them."""
        self._server.should_exit = True
        await asyncio.gather(self._task, return_exceptions=True)
        # The server has cancelled what was left, and does not wait for it.
        left = set(self._server.server_state.tasks)
        if left:
            await asyncio.wait(left, timeout=CANCEL_TIMEOUT_S)


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    grace_s: int = 5,
    config: ApiConfig | None = None,
    certificate: Certificate | None = None,
    accepts: AcceptStats | None = None,
) -> ApiServer:
    """Start serving ``app``.

    Args:
        app: what is served.
        host: where, one address of this machine, or all.
        port: 0 takes any free one.
        grace_s: for calls in progress when it is closed.
        config: limits of headers.
        certificate: serve over TLS, with it.
        accepts: counts the connections that come.

    Raises:
        OSError: the address cannot be bound; says which.
    """
    limits = config or ApiConfig()
    accepts = accepts or AcceptStats()
    bounds = {"headers_timeout_s": limits.headers_timeout_s, "headers_bytes_max": limits.headers_bytes_max}
    listener = await _bind(host, port)
    protocol = cast(type[_Protocol], type("Protocol", (_Protocol,), {**bounds, "accepts": accepts}))
    settings = uvicorn.Config(
        app,
        loop="none",
        http=protocol,
        ws="none",
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections_max,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
    )
    settings.load()
    server = _Server(settings)
    task = asyncio.create_task(server.serve(sockets=[]), name="http-server")
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn offers no event to wait for
                await asyncio.sleep(0.005)
    except TimeoutError:
        task.cancel()
        raise
    if task.done():
        task.result()
    port = listener.getsockname()[1]
    server.acceptor = Acceptor(
        [listener],
        lambda: protocol(config=settings, server_state=server.server_state, app_state=server.lifespan.state),
        accepts,
        what=f"{host}:{port}",
        tls=certificate.context if certificate is not None else None,
        full=lambda: len(server.server_state.connections) >= limits.connections_max + ROOM,
    )
    return ApiServer(server, task, host, port)


async def _bind(host: str, port: int) -> socket.socket:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
        # Listening now, not with the server's start, tells two servers on one port apart.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener

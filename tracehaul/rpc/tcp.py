"""The control plane over TCP, with or without TLS, on uvloop or plain asyncio."""

import asyncio
import itertools
import socket
import ssl
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from tracehaul.rpc.base import Service
from tracehaul.rpc.calling import ClientSession
from tracehaul.rpc.frames import Frame, FrameReader, pack
from tracehaul.rpc.serving import ServerSession, close_all
from tracehaul.rpc.session import DEFAULT_LIMITS, Limits, Session
from tracehaul.rpc.tls import TlsEnd
from tracehaul.runtime.accepting import Acceptor, AcceptStats
from tracehaul.runtime.addresses import announced, bound
from tracehaul.runtime.credentials import Credentials, names_of, why_refused
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.errors import ClusterError, PeerLost, ProtocolError, TimedOut, Untrusted

log = Log(__name__)
_seldom = Seldom(log)

S = TypeVar("S", bound=Session)

_CALLS_BURST = 256
"""After so many frames in reads that follow each other, a server's handlers run before the next read."""
_REPLIES_BURST = 8192
"""The same of a client, whose consumers take all that has come: the later its loop is, the less each reply costs. With
one read more it is less than a stream may hold."""
_CLOSE_S = 1.0
"""How long a closing connection may flush."""
_WRITE_BUFFER_BYTES = 1 << 20
"""Senders wait while more than this is unsent."""
_LINUX_OPTIONS = {"TCP_USER_TIMEOUT": 10_000, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A host that acknowledges nothing for 10 s (the first is in ms) is gone; a frozen process's host still does."""
_PORT_MAX = 65_535

_peer_numbers = itertools.count(1)
"""Names of connections are unique in this process's life, whatever ports are used again."""


class TcpNetwork:
    """Implements :class:`tracehaul.rpc.base.Network`. With ``credentials`` all is under TLS, and both ends prove who
    they are."""

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        *,
        credentials: Credentials | None = None,
        accepts: AcceptStats | None = None,
    ) -> None:
        self._limits = limits
        self._credentials = credentials
        self.accepts = accepts or AcceptStats()
        """Of all its servers."""

    async def listen(self, address: str, service: Service, announce: str = "") -> "TcpServer":
        host, port = split_address(address)
        server = TcpServer(service, self._limits, self.accepts, self._credentials)
        await server.start(host, port, announced(host, announce))
        return server

    async def connect(self, address: str, *, timeout_s: float) -> ClientSession:
        limits = self._limits
        pipe = _TcpPipe(limits, lambda pipe: ClientSession(pipe, limits), _REPLIES_BURST)
        loop = asyncio.get_running_loop()
        try:
            host, port = split_address(address)
            async with asyncio.timeout(timeout_s):
                if self._credentials is None:
                    await loop.create_connection(lambda: pipe, host, port)
                else:
                    tls = TlsEnd(self._credentials.now.client, pipe, host)
                    await loop.create_connection(lambda: tls, host, port)
                    await tls.secured
                session = pipe.session
                assert session is not None
                await session.greeted()
                return session
        except TimeoutError:
            pipe.close()
            raise TimedOut(f"{address} did not answer within {timeout_s:g} s") from None
        except ssl.SSLError as error:
            pipe.close()
            raise Untrusted(f"{address}: {why_refused(error)}") from error
        except (OSError, UnicodeError) as error:  # the latter: a host that no name service takes
            pipe.close()
            raise PeerLost(f"cannot connect to {address}: {error}") from error
        except ClusterError as error:
            pipe.close()
            raise type(error)(f"{address}: {error}") from None
        except asyncio.CancelledError:
            pipe.close()
            raise


class TcpServer:
    """Implements :class:`tracehaul.rpc.base.Server`."""

    def __init__(self, service: Service, limits: Limits, accepts: AcceptStats, credentials: Credentials | None) -> None:
        self._service = service
        self._limits = limits
        self._accepts = accepts
        self._credentials = credentials
        self._strangers = 0
        """Connections whose peers have not shown who they are."""
        self._closing = False
        self._sessions: dict[ServerSession, None] = {}
        self._address = ""
        self._acceptor: Acceptor | None = None

    async def start(self, host: str, port: int, announce: str) -> None:
        """Bind to ``host``, and serve under the name ``announce``; raises OSError."""
        listener = await asyncio.get_running_loop().run_in_executor(None, bound, host, port)
        listener.setblocking(False)
        self._address = join_address(announce, listener.getsockname()[1])
        self._acceptor = Acceptor([listener], self._accept, self._accepts, what=self._address)

    @property
    def address(self) -> str:
        return self._address

    def _accept(self) -> asyncio.Protocol:
        if self._credentials is not None and len(self._sessions) + self._strangers >= self._limits.connections_max:
            return _TcpPipe(self._limits, self._refuse, _CALLS_BURST)
        pipe = _TcpPipe(self._limits, self._open, _CALLS_BURST)
        if self._credentials is None:
            return pipe
        stranger = TlsEnd(self._credentials.now.server, pipe, None, _refused)
        self._strangers += 1
        stranger.secured.add_done_callback(self._on_secured)
        return stranger

    def _on_secured(self, _: asyncio.Future[None]) -> None:
        self._strangers -= 1

    def _open(self, pipe: "_TcpPipe[ServerSession]") -> ServerSession | None:
        if self._closing or len(self._sessions) >= self._limits.connections_max:
            return self._refuse(pipe)
        peer = f"{pipe.remote}#{next(_peer_numbers)}"
        session = ServerSession(pipe, self._limits, self._service, peer, self._forget, pipe.names)
        self._sessions[session] = None
        return session

    def _refuse(self, _: "_TcpPipe[ServerSession]") -> None:
        self._accepts.refuse(self._address, "connections", connections=len(self._sessions))

    def _forget(self, session: ServerSession) -> None:
        self._sessions.pop(session, None)

    async def close(self) -> None:
        assert self._acceptor is not None
        self._closing = True
        self._acceptor.close()
        await close_all(list(self._sessions))


class _TcpPipe(asyncio.Protocol, Generic[S]):
    """One TCP connection as a :class:`tracehaul.rpc.session.Pipe`; ``open_session`` may refuse it with None."""

    def __init__(self, limits: Limits, open_session: Callable[["_TcpPipe[S]"], S | None], burst_max: int) -> None:
        self._frame_bytes_max = limits.frame_bytes_max
        self._open_session = open_session
        self._reader = FrameReader(limits.frame_bytes_max)
        self._transport: asyncio.Transport | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._burst_max = burst_max
        self._burst = 0
        """Frames read since others were let run."""
        self.session: S | None = None
        self.remote = ""
        self.names: frozenset[str] | None = None
        """Of the peer, as its certificate proves."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        _tune(self._transport.get_extra_info("socket"))
        peername = self._transport.get_extra_info("peername")
        self.remote = join_address(peername[0], peername[1]) if peername else "unknown"
        self.names = names_of(self._transport.get_extra_info("peercert"))
        self.session = self._open_session(self)
        if self.session is None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.session is None:
            return
        try:
            frames = self._reader.feed(data)
        except ProtocolError as error:
            self.session.violated(error)
            return
        self.session.received(frames)
        self._burst += len(frames)
        if self._burst >= self._burst_max:
            self._burst = 0
            self._let_others_run()

    def _let_others_run(self) -> None:
        # libuv reads a full socket many times in a row: consumers would be overloaded before their first turn
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        if self.session is not None:
            self.session.pause_writing()

    def resume_writing(self) -> None:
        if self.session is not None:
            self.session.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._close_timer is not None:
            self._close_timer.cancel()
        if self.session is not None:
            if isinstance(exc, ssl.SSLError):  # in TLS 1.3 a client hears after its handshake that it is refused
                self.session.lost(Untrusted(why_refused(exc)))
            else:
                self.session.lost(PeerLost(f"connection to {self.remote} lost: {exc or 'closed by peer'}"))

    def send(self, frame: Frame) -> None:
        transport = self._transport
        assert transport is not None
        if not transport.is_closing():
            transport.write(pack(frame, self._frame_bytes_max))

    def close(self) -> None:
        transport = self._transport
        if transport is not None and self._close_timer is None:
            transport.close()
            self._close_timer = asyncio.get_running_loop().call_later(_CLOSE_S, transport.abort)


def _refused(host: str, why: str) -> None:
    _seldom.warning("refused a connection", about=f"{host} {why}", peer=host, why=why)


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _LINUX_OPTIONS.items():
        option: int | None = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 host stands in brackets.

    Raises:
        OSError: it is not an address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > _PORT_MAX:
        raise OSError(f"not host:port: {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Inverse of :func:`split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

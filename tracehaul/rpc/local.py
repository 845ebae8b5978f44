"""The control plane in one process: the contract of TCP without sockets, threads or real time.

Every message is packed and unpacked. A connection delivers, in each direction, a prefix of what was sent: once, in
order. Faults keep to that, as TCP does: a copy delivered twice is discarded, and a lost frame breaks the connection
as soon as a later one arrives (until then, silence).

Whatever a node receives is handled in the context (of :mod:`contextvars`) in which it called ``listen`` or
``connect``, as if it were a process of its own: the simulator tells its processes apart by that.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from contextvars import copy_context
from typing import NamedTuple, Protocol

from tracehaul.rpc.base import Service
from tracehaul.rpc.calling import ClientSession
from tracehaul.rpc.frames import Frame, FrameReader, pack
from tracehaul.rpc.serving import ServerSession, close_all
from tracehaul.rpc.session import DEFAULT_LIMITS, Limits, Session
from tracehaul.runtime.clock import now_s
from tracehaul.wire.errors import PeerLost, ProtocolError, TimedOut

_WINDOW_FRAMES = 1024
"""Frames under way in one direction before the sender waits: stands for the socket buffers."""
_FIRST_PORT = 20_000


class Link(Protocol):
    """What the simulator puts between addresses."""

    def delays(self, source: str, target: str, kind: str) -> Sequence[float]:
        """Seconds until each copy of a frame arrives: none is a loss, two a duplicate.

        ``kind`` is the frame's class name in :mod:`tracehaul.rpc.frames`, ``Connect`` for the opening of a
        connection, or ``Close`` for its end. Frames of one direction of one connection never overtake each other:
        a later frame arrives no earlier than the one before.
        """
        ...


class LocalNetwork:
    """Implements :class:`tracehaul.rpc.base.Network` for all nodes of one process.

    Connections made here directly come from the address ``client``; see :meth:`at` for a node's own.
    """

    def __init__(self, link: Link | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self._link = link
        self._limits = limits
        self._frozen: set[str] = set()
        self._servers: dict[str, LocalServer] = {}
        self._pipes: dict[_LocalPipe, None] = {}
        """Both ends of every connection, in order of opening."""
        self._ports = itertools.count(_FIRST_PORT)
        self._numbers = itertools.count(1)
        self.context = copy_context()
        """Of the world outside all nodes: it answers for those that crashed."""

    def at(self, address: str) -> "LocalNode":
        """This network as seen by the node that listens at ``address``: its connections have that source."""
        return LocalNode(self, address)

    def crash(self, address: str) -> None:
        """The process at ``address`` dies: nobody listens there, and its connections break at the other side."""
        self._servers.pop(address, None)
        dropped = address in self._frozen
        self._frozen.discard(address)
        for pipe in list(self._pipes):
            if pipe.local == address:
                pipe.crash(drop_unsent=dropped)
            elif pipe.remote == address:
                pipe.wake()

    def freeze(self, address: str) -> None:
        """The process at ``address`` stops: frames from and to it are held."""
        self._frozen.add(address)

    def thaw(self, address: str) -> None:
        """The process at ``address`` goes on: what was held is delivered in order."""
        self._frozen.discard(address)
        for pipe in list(self._pipes):
            if address in (pipe.local, pipe.remote):
                pipe.wake()

    def sever(self, address: str) -> None:
        """Every connection of the node at ``address`` breaks; what was under way to it is lost. Nobody dies."""
        for pipe in list(self._pipes):
            if pipe.local == address:
                pipe.crash(drop_unsent=False)

    async def listen(self, address: str, service: Service, announce: str = "") -> "LocalServer":
        host, _, port = address.rpartition(":")
        if port == "0":
            port = str(next(self._ports))
        address = f"{announce or host}:{port}"
        if address in self._servers:
            raise OSError(f"address in use: {address}")
        server = self._servers[address] = LocalServer(self, address, service, self._limits)
        return server

    async def connect(self, address: str, *, timeout_s: float) -> ClientSession:
        return await self.connect_from("client", address, timeout_s=timeout_s)

    async def connect_from(self, source: str, address: str, *, timeout_s: float) -> ClientSession:
        """As :meth:`connect`, from the node at ``source``."""
        pipe = _LocalPipe(self, source, address, self._limits)
        try:
            async with asyncio.timeout(timeout_s):
                await self._dial(source, address)
                session = self._open(pipe)
                await session.greeted()
                return session
        except TimeoutError:
            pipe.close()
            raise TimedOut(f"{address} did not answer within {timeout_s:g} s") from None
        except BaseException:
            pipe.close()
            raise

    async def _dial(self, source: str, address: str) -> None:
        delays = self.delays(source, address, "Connect")
        if not delays:
            await asyncio.Event().wait()  # lost: the caller's deadline ends this
        await asyncio.sleep(min(delays))

    def _open(self, pipe: "_LocalPipe") -> ClientSession:
        server = self._servers.get(pipe.remote)
        if server is None:
            raise PeerLost(f"cannot connect to {pipe.remote}: nobody listens")
        remote = _LocalPipe(self, pipe.remote, pipe.local, self._limits, server)
        pipe.peer, remote.peer = remote, pipe
        self._pipes[pipe] = self._pipes[remote] = None
        session = pipe.session = ClientSession(pipe, self._limits)
        return session

    def peer_name(self, address: str) -> str:
        """A name for a connection from ``address``, given once."""
        return f"{address}#{next(self._numbers)}"

    def delays(self, source: str, target: str, kind: str) -> Sequence[float]:
        """What the link says; without one, a single copy at once."""
        return self._link.delays(source, target, kind) if self._link is not None else (0.0,)

    def is_held(self, pipe: "_LocalPipe") -> bool:
        """Whether frames sent at this end wait for a thaw."""
        return pipe.local in self._frozen or pipe.remote in self._frozen

    def forget_pipe(self, pipe: "_LocalPipe") -> None:
        """Both ends are closed."""
        self._pipes.pop(pipe, None)

    def forget_server(self, server: "LocalServer") -> None:
        """That server listens no more; another may have its address since a crash."""
        if self._servers.get(server.address) is server:
            del self._servers[server.address]


class LocalNode:
    """Implements :class:`tracehaul.rpc.base.Network` for one node of a :class:`LocalNetwork`."""

    def __init__(self, network: LocalNetwork, address: str) -> None:
        self._network = network
        self._address = address

    async def listen(self, address: str, service: Service, announce: str = "") -> "LocalServer":
        return await self._network.listen(address, service, announce)

    async def connect(self, address: str, *, timeout_s: float) -> ClientSession:
        return await self._network.connect_from(self._address, address, timeout_s=timeout_s)


class LocalServer:
    """Implements :class:`tracehaul.rpc.base.Server`."""

    def __init__(self, network: LocalNetwork, address: str, service: Service, limits: Limits) -> None:
        self._network = network
        self._address = address
        self._service = service
        self._limits = limits
        self._sessions: dict[ServerSession, None] = {}
        self._closed = False
        self.context = copy_context()
        """Of whoever listens: its connections are served in it."""

    @property
    def address(self) -> str:
        return self._address

    def accept(self, pipe: "_LocalPipe") -> ServerSession | None:
        """The session of a new connection; None if there are too many."""
        if self._closed or len(self._sessions) >= self._limits.connections_max:
            return None
        peer = self._network.peer_name(pipe.remote)
        session = ServerSession(pipe, self._limits, self._service, peer, self._forget)
        self._sessions[session] = None
        return session

    def _forget(self, session: ServerSession) -> None:
        self._sessions.pop(session, None)

    async def close(self) -> None:
        self._closed = True
        self._network.forget_server(self)
        await close_all(list(self._sessions))


class _Parcel(NamedTuple):
    """A copy of a frame under way."""

    due_s: float
    number: int
    """Counts the frames of its direction, so that the receiver sees duplicates and gaps."""
    data: bytes | None
    """None: the connection ends."""


class _LocalPipe:
    """One end of a connection as a :class:`tracehaul.rpc.session.Pipe`, with what it sent and is under way.

    The end of a ``server`` gets its session when the first frame arrives, so a frozen server greets nobody.
    """

    def __init__(
        self, network: LocalNetwork, local: str, remote: str, limits: Limits, server: LocalServer | None = None
    ) -> None:
        self.local = local
        self.remote = remote
        self.peer: _LocalPipe | None = None
        self.session: Session | None = None
        self._network = network
        self._server = server
        self.context = server.context if server is not None else copy_context()
        self._loop = asyncio.get_running_loop()
        self._frame_bytes_max = limits.frame_bytes_max
        self._reader = FrameReader(limits.frame_bytes_max)
        self._closed = False
        self._under_way: deque[_Parcel] = deque()
        self._sent = 0
        self._received = 0
        self._last_due_s = 0.0
        self._pending: asyncio.Handle | None = None

    @property
    def closed(self) -> bool:
        """This end sends nothing more, and takes nothing."""
        return self._closed

    def send(self, frame: Frame) -> None:
        if self._closed:
            return
        data = pack(frame, self._frame_bytes_max)
        self._sent += 1
        self._post(type(frame).__name__, data)
        if len(self._under_way) >= _WINDOW_FRAMES and self.session is not None:
            self.session.pause_writing()

    def close(self) -> None:
        if not self._closed:
            self._post("Close", None)
            self._end("closed here")

    def crash(self, *, drop_unsent: bool) -> None:
        """The process at this end dies. What it sent while frozen never left it."""
        if drop_unsent:
            self._under_way.clear()
        self.close()
        self.context = self._network.context  # the host outlives its process, and answers for it
        if self.peer is not None:
            self.peer.reschedule()

    def wake(self) -> None:
        """Deliver what is due, once nothing holds it."""
        if self._pending is None and self._under_way and not self._network.is_held(self):
            assert self.peer is not None
            due_s = self._under_way[0].due_s
            self._pending = self._loop.call_at(due_s, self._deliver_due, context=self.peer.context)

    def reschedule(self) -> None:
        """The receiver's context changed."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self.wake()

    def _post(self, kind: str, data: bytes | None) -> None:
        if self.peer is None:
            return  # never connected
        for delay_s in self._network.delays(self.local, self.remote, kind):
            assert delay_s >= 0
            self._last_due_s = max(self._last_due_s, now_s() + delay_s)
            self._under_way.append(_Parcel(self._last_due_s, self._sent, data))
        self.wake()

    def _deliver_due(self) -> None:
        self._pending = None
        assert self.peer is not None
        now = now_s()
        while self._under_way and self._under_way[0].due_s <= now and not self._network.is_held(self):
            self.peer.receive(self._under_way.popleft())
        if len(self._under_way) < _WINDOW_FRAMES // 2 and self.session is not None:
            self.session.resume_writing()
        self.wake()

    def receive(self, parcel: _Parcel) -> None:
        """A parcel from the other end arrives here."""
        if self._closed:
            if parcel.data is not None:
                self._post("Close", None)  # as a host answers for a socket that it does not know
        elif parcel.data is None:
            self._end("closed by peer")
        elif parcel.number == self._received + 1:
            self._received = parcel.number
            self._unpack(parcel.data)
        elif parcel.number > self._received:
            self._post("Close", None)
            self._end("a frame was lost")

    def _unpack(self, data: bytes) -> None:
        if self.session is None and self._server is not None:
            self.session = self._server.accept(self)
        if self.session is None:
            self.close()
            return
        try:
            frames = self._reader.feed(data)
        except ProtocolError as error:
            self.session.violated(error)
            return
        self.session.received(frames)

    def _end(self, reason: str) -> None:
        self._closed = True
        if self.peer is not None and self.peer.closed:  # until then, frames may be held for a thaw
            self._network.forget_pipe(self)
            self._network.forget_pipe(self.peer)
        if self.session is not None:
            lost = PeerLost(f"connection to {self.remote} lost: {reason}")
            self._loop.call_soon(self.session.lost, lost, context=self.context)

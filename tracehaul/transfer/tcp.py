"""Transfers over plain TCP: the owner's threads send from its region, or land in it; ours do the rest.

Where there is no RDMA this is the fastest way between hosts: each transfer has a connection of its own, bytes go
between the sockets and the regions without another copy, and are summed while a core's cache still has them. Nothing
lands late in our memory: a transfer that is given up closes its connection.

Plain, it is for a network on which nobody else is: a region's token is on it for all to see. With credentials every
connection is under TLS, and both ends have shown a certificate before the token is told.
"""

import asyncio
import contextlib
import errno
import secrets
import socket
import ssl
import threading
from collections import deque
from collections.abc import Sequence

import msgspec

from tracehaul.runtime import clock
from tracehaul.runtime.addresses import bound
from tracehaul.runtime.credentials import Credentials, why_refused
from tracehaul.transfer import tcp_wire as wire
from tracehaul.transfer.base import Copy, Memory, Region
from tracehaul.transfer.cursor import Cursor
from tracehaul.transfer.landing import check_copies, land
from tracehaul.transfer.names import Names, Target, is_host, known
from tracehaul.transfer.place import LOOPBACK, Place
from tracehaul.transfer.pump import READABLE, WRITABLE, Pump
from tracehaul.transfer.region import Registered
from tracehaul.transfer.tcp_serving import Listener
from tracehaul.transfer.tcp_tls import BYTES_MAX, TlsSocket
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError, TransferLost
from tracehaul.wire.ids import Checksum

THREADS = 2
LINES_MAX = 8
"""Connections to one peer; more transfers than that wait for one another."""


ENDS_MAX = 1024
"""Peers remembered before those without a connection are forgotten."""


class TcpPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a region's owner listens, and what makes it answer."""

    host: str
    """An address, or a name."""
    port: int
    token: bytes
    """Of one region in one life of its owner."""


class TcpTransfer:
    """The TCP transport of ``owner``, listening at ``place``; with ``credentials``, under TLS.

    See :class:`.base.Transfer`.

    Raises:
        OSError: it cannot listen there, or no peer could reach what it would announce.
    """

    def __init__(self, owner: str, place: Place = LOOPBACK, credentials: Credentials | None = None) -> None:
        self._owner = owner
        self._host = place.announced
        sock = bound(place.listen, place.port)
        self._regions: dict[bytes, memoryview] = {}
        self._pump = Pump("tcp", THREADS)
        self._listener = Listener(sock, self._pump, self._regions, credentials)
        self._pump.add(self._listener, READABLE)
        self._credentials = credentials
        self._ends: dict[tuple[str, int], _End] = {}
        self._names = Names()
        self._orders: dict[asyncio.Future[list[Checksum]], _Order] = {}
        self._closed = False

    @property
    def kind(self) -> str:
        return "tcp"

    @property
    def host(self) -> str:
        """What peers are told to connect to."""
        return self._host

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return self._listener.socket.getsockname()[1]

    def register(self, memory: Memory) -> Registered:
        token = secrets.token_bytes(wire.TOKEN_BYTES)
        self._regions[token] = memory.buffer
        packed = msgspec.msgpack.encode(TcpPayload(self._host, self.port, token))
        return Registered(memory.buffer, RegionDescriptor(self.kind, self._owner, memory.buffer.nbytes, packed))

    def reaches(self, remote: RegionDescriptor) -> bool:
        return remote.kind == self.kind

    async def read(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> list[Checksum]:
        return await self._transfer(wire.READ, remote, local, copies, timeout_s)

    async def write(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> list[Checksum]:
        return await self._transfer(wire.WRITE, remote, local, copies, timeout_s)

    async def _transfer(
        self, way: bytes, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], timeout_s: float
    ) -> list[Checksum]:
        if self._closed:
            raise TransferLost("this side closed its transport")
        if remote.kind != self.kind:
            raise TransferError(f"a {remote.kind} region is not reachable by {self.kind}")
        payload = _unpack(remote)
        nbytes = check_copies(copies, local.buffer.nbytes, remote.nbytes)
        what = f"{nbytes} bytes {'from' if way == wire.READ else 'to'} {remote.owner}"
        end = self._end(payload)
        if not end.lines:  # a name may stand for another address by now
            until_s = clock.now_s() + timeout_s
            end.target = known(*end.key) or await self._names.target(*end.key, timeout_s)
            timeout_s = until_s - clock.now_s()
            if self._closed:
                raise TransferLost("this side closed its transport")
        order = _Order(way, remote, payload.token, local.buffer, copies)
        self._orders[order.future] = order
        order.future.add_done_callback(self._orders.pop)
        end.submit(order)
        return await land(order.future, timeout_s, what, order.stop)

    def _end(self, payload: TcpPayload) -> "_End":
        key = payload.host, payload.port
        end = self._ends.get(key)
        if end is None:
            if len(self._ends) >= ENDS_MAX:
                self._ends = {key: end for key, end in self._ends.items() if end.lines}
            end = self._ends[key] = _End(key, self._pump, self._credentials)
        return end

    async def broken(self) -> None:
        # Shielded: to stop waiting must not cancel what a thread will set.
        await asyncio.shield(asyncio.wrap_future(self._pump.ended))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._names.aclose()
        await asyncio.get_running_loop().run_in_executor(None, self._pump.close)
        for order in list(self._orders.values()):  # now: nothing moves any more
            order.fail(TransferLost("this side closed its transport"))
        self._ends.clear()


class _Order:
    """One transfer on its way."""

    def __init__(
        self, way: bytes, remote: RegionDescriptor, token: bytes, buffer: memoryview, copies: Sequence[Copy]
    ) -> None:
        self.way = way
        self.owner = remote.owner
        head = wire.Head(way, token, remote.nbytes, len(copies))
        self.request = wire.pack_request(head, [(copy.remote_offset, copy.nbytes) for copy in copies])
        self.cursor = Cursor(buffer, [(copy.local_offset, copy.nbytes) for copy in copies], summing=True)
        self.count = len(copies)
        self.end: _End | None = None
        self.line: _Line | None = None
        self.stopped = False
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Checksum]] = self._loop.create_future()

    def stop(self) -> None:
        """Give up: the connection is closed, after which nothing moves any more. On the loop."""
        self.stopped = True
        if self.end is not None and self.end.withdraw(self):
            self.fail(TransferLost("given up"))
        elif (line := self.line) is not None:
            line.cut(self)

    def succeed(self, sums: list[Checksum]) -> None:
        """All has landed. On any thread."""
        self._tell(sums, None)

    def fail(self, error: TransferError) -> None:
        """It has ended. On any thread."""
        self._tell([], error)

    def _tell(self, sums: list[Checksum], error: TransferError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._settle, sums, error)

    def _settle(self, sums: list[Checksum], error: TransferError | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(sums)
        else:
            self.future.set_exception(error)


class _End:
    """One peer process: its connections, and who waits for one."""

    def __init__(self, key: tuple[str, int], pump: Pump, credentials: Credentials | None) -> None:
        self.key = key
        """Host and port, as it was announced."""
        self.target: Target | None = None
        """Where that is; before the first connection, None."""
        self._pump = pump
        self._credentials = credentials
        self._lock = threading.Lock()
        self._idle: list[_Line] = []
        self._lines = 0
        self._waiting: deque[_Order] = deque()

    @property
    def lines(self) -> int:
        """Open connections."""
        return self._lines

    def submit(self, order: _Order) -> None:
        """Start it on a connection, or have it wait for one. On the loop."""
        order.end = self
        while True:
            with self._lock:
                if not self._idle and self._lines >= LINES_MAX:
                    self._waiting.append(order)
                    return
                line = self._idle.pop() if self._idle else None
                self._lines += line is None
            if line is None:
                self._open(order)
                return
            if line.start(order):
                return

    def _open(self, order: _Order) -> None:
        assert self.target is not None
        family, place = self.target
        sock = socket.socket(family)
        wire.prepare(sock)
        version, secured = 0, None
        if self._credentials is not None:
            now = self._credentials.now
            version, secured = now.version, TlsSocket(sock, now.client, self.key[0])
        line = _Line(sock, self, secured, version)
        code = sock.connect_ex(place)
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            order.fail(TransferLost(f"{order.owner} cannot be reached: {errno.errorcode.get(code, code)}"))
            self.gone(line)
            return
        line.begin(order)
        self._pump.add(line, WRITABLE)

    def withdraw(self, order: _Order) -> bool:
        """Whether it waited, and now no longer does."""
        with self._lock:
            if order in self._waiting:
                self._waiting.remove(order)
                return True
            return False

    def next(self, line: "_Line") -> _Order | None:
        """What a connection that is free does next; None: it is idle. On a thread."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(line)
            return None

    def gone(self, line: "_Line") -> None:
        """A connection has ended. On any thread."""
        with self._lock:
            self._lines -= 1
            if line in self._idle:
                self._idle.remove(line)
            waiting = self._waiting.popleft() if self._waiting else None
            self._lines += waiting is not None
        if waiting is not None:
            self._open(waiting)

    @property
    def version(self) -> int:
        """Of the certificates to be used now."""
        return self._credentials.now.version if self._credentials is not None else 0

    def arm(self, line: "_Line", events: int) -> None:
        """See :class:`.pump.Pump`."""
        self._pump.arm(line, events)


class _Line:
    """One connection to a peer; one transfer after the other.

    ``secured``: the same socket under TLS, with certificates of that version, whose handshake is still to come.
    """

    def __init__(self, sock: socket.socket, end: _End, secured: TlsSocket | None, version: int) -> None:
        self.socket = secured or sock
        self._secured = self._shaking = secured
        self._version = version
        self._end = end
        self._lock = threading.Lock()
        self._order: _Order | None = None
        self._over = False
        self._inbox = bytearray()
        self._request = b""

    def start(self, order: _Order) -> bool:
        """Begin a transfer; False if the connection has ended meanwhile."""
        with self._lock:
            if self._over:
                return False
            if self._worn():
                self._over = True
                self._cut()  # a thread finds it idle, and closes it
                return False
            self.begin(order)
            self._end.arm(self, WRITABLE)
            return True

    def cut(self, order: _Order) -> None:
        """End the connection if that is what is going on on it."""
        with self._lock:
            if self._order is order:
                self._cut()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def _worn(self) -> bool:
        """Whether another connection must take over: of the certificates that count now, or with a fresh key."""
        secured = self._secured
        return secured is not None and (self._version != self._end.version or secured.moved_bytes > BYTES_MAX)

    def begin(self, order: _Order) -> None:
        """Make a transfer what is going on here, before anything can happen on the line."""
        self._order = order
        self._inbox = bytearray()
        self._request = order.request
        order.line = self

    def advance(self) -> bool:
        with self._lock:
            order = self._order
            if order is None:  # idle: the peer has closed it
                self._over = True
            else:
                try:
                    if not self._go(order):
                        return False
                    self._over = True
                except (OSError, TransferError) as error:
                    self._over = True
                    order.line = None
                    order.fail(_lost(order.owner, error))
        self._end.gone(self)
        return True

    def _go(self, order: _Order) -> bool:
        """As far as it goes now; arms the line last, or says that it has ended with its transfer done.

        Raises OSError, TransferError: it has ended before.
        """
        if order.stopped:
            raise TransferLost("given up")
        if self._shaking is not None:
            events = self._shaking.handshake()
            if events:
                self._end.arm(self, events)
                return False
            self._shaking = None
        try:
            while self._request:
                self._request = self._request[self.socket.send(self._request) :]
            if not wire.flush(self.socket):
                raise BlockingIOError
        except BlockingIOError:
            self._end.arm(self, WRITABLE)
            return False
        if order.way == wire.WRITE and not wire.send(self.socket, order.cursor):
            self._end.arm(self, WRITABLE)
            return False
        if not self._finished(order):
            self._end.arm(self, READABLE)
            return False
        order.line = None
        if self._worn():
            return True
        self._order = self._end.next(self)
        if self._order is not None:
            self.begin(self._order)
        self._end.arm(self, READABLE if self._order is None else WRITABLE)
        return False

    def _finished(self, order: _Order) -> bool:
        """Receive the reply; whether the transfer is over, and its caller told."""
        if not self._fill(1):
            return False
        refused = bytes(self._inbox[:1])
        if refused != wire.OK:
            error = TransferLost if refused == wire.UNKNOWN_REGION else TransferError
            raise error(f"{order.owner} refused: status {refused.hex()}")
        if order.way == wire.READ:
            if not wire.receive(self.socket, order.cursor):
                return False
        else:
            if not self._fill(1 + 8 * order.count):
                return False
            if wire.unpack_sums(self._inbox[1:]) != order.cursor.sums:
                raise TransferError(f"what was written to {order.owner} is not there")
        order.succeed(order.cursor.sums)
        return True

    def _fill(self, nbytes: int) -> bool:
        while len(self._inbox) < nbytes:
            try:
                received = self.socket.recv(nbytes - len(self._inbox))
            except BlockingIOError:
                return False
            if not received:
                raise ConnectionResetError("it closed the connection")
            self._inbox += received
        return True


def _lost(owner: str, error: OSError | TransferError) -> TransferError:
    if isinstance(error, TransferError):
        return error
    if isinstance(error, ssl.SSLError):
        return TransferLost(f"{owner}: {why_refused(error)}")
    return TransferLost(f"{owner} is gone: {error}")


def _unpack(remote: RegionDescriptor) -> TcpPayload:
    try:
        payload = msgspec.msgpack.decode(remote.payload, type=TcpPayload)
    except (msgspec.MsgspecError, ValueError) as error:
        raise TransferError(f"unusable descriptor of {remote.owner}: {error}") from error
    sound = len(payload.token) == wire.TOKEN_BYTES and 0 < payload.port < 1 << 16 and is_host(payload.host)
    if not sound or remote.nbytes >= 1 << 64:
        raise TransferError(f"unusable descriptor of {remote.owner}")
    return payload

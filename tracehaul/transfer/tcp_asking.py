"""The asker's end of the TCP transport: its connections to each peer, and what each of them does."""

import asyncio
import contextlib
import errno
import socket
import ssl
import threading
from collections import deque
from collections.abc import Sequence

from tracehaul.runtime.credentials import why_refused
from tracehaul.transfer import tcp_wire as wire
from tracehaul.transfer.base import Copy
from tracehaul.transfer.cursor import Cursor
from tracehaul.transfer.names import Target
from tracehaul.transfer.pump import READABLE, WRITABLE, Pump
from tracehaul.transfer.tcp_proof import Guard, Proof
from tracehaul.transfer.tcp_tls import BYTES_MAX, TlsSocket
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError, TransferLost
from tracehaul.wire.ids import Checksum

LINES_MAX = 8
"""Connections to one peer; more transfers than that wait for one another."""


class Order:
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
        self.end: End | None = None
        self.line: Line | None = None
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


class End:
    """One peer process: its connections, and who waits for one."""

    def __init__(self, key: tuple[str, int], pump: Pump, guard: Guard | None) -> None:
        self.key = key
        """Host and port, as it was announced."""
        self.target: Target | None = None
        """Where that is; before the first connection, None."""
        self._pump = pump
        self._guard = guard
        self._lock = threading.Lock()
        self._idle: list[Line] = []
        self._lines = 0
        self._waiting: deque[Order] = deque()

    @property
    def lines(self) -> int:
        """Open connections."""
        return self._lines

    def submit(self, order: Order) -> None:
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

    def _open(self, order: Order) -> None:
        assert self.target is not None
        family, place = self.target
        sock = socket.socket(family)
        wire.prepare(sock)
        version, secured = self.version, None
        if self._guard is not None:
            secured = TlsSocket(sock, self._guard.credentials.now.client, self.key[0])
        line = Line(sock, self, secured, version, encrypted=self._guard is None or self._guard.encrypted)
        code = sock.connect_ex(place)
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            order.fail(TransferLost(f"{order.owner} cannot be reached: {errno.errorcode.get(code, code)}"))
            self.gone(line)
            return
        line.begin(order)
        self._pump.add(line, WRITABLE)

    def withdraw(self, order: Order) -> bool:
        """Whether it waited, and now no longer does."""
        with self._lock:
            if order in self._waiting:
                self._waiting.remove(order)
                return True
            return False

    def next(self, line: "Line") -> Order | None:
        """What a connection that is free does next; None: it is idle. On a thread."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(line)
            return None

    def gone(self, line: "Line") -> None:
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
        return self._guard.credentials.now.version if self._guard is not None else 0

    def arm(self, line: "Line", events: int) -> None:
        """See :class:`.pump.Pump`."""
        self._pump.arm(line, events)


class Line:
    """One connection to a peer; one transfer after the other.

    ``secured``: the same socket under TLS, with certificates of that version, whose handshake is still to come.
    ``encrypted``: whether what follows stays inside.
    """

    def __init__(
        self, sock: socket.socket, end: End, secured: TlsSocket | None, version: int, *, encrypted: bool
    ) -> None:
        self.socket = secured if secured is not None and encrypted else sock
        self._secured = secured
        self._shaking = secured if secured is None or encrypted else Proof(secured, asking=True)
        self._version = version
        self._end = end
        self._lock = threading.Lock()
        self._order: Order | None = None
        self._over = False
        self._inbox = bytearray()
        self._request = b""

    def start(self, order: Order) -> bool:
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

    def cut(self, order: Order) -> None:
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

    def begin(self, order: Order) -> None:
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

    def _go(self, order: Order) -> bool:
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

    def _finished(self, order: Order) -> bool:
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

"""The owner's end of the TCP transport: sends and lands bytes of registered regions, for whoever knows their tokens."""

import contextlib
import socket
import threading
from collections.abc import Mapping

from tracehaul.runtime import clock
from tracehaul.runtime.accepting import NO_DESCRIPTOR, AcceptStats, Spare
from tracehaul.runtime.credentials import HANDSHAKE_S, why_refused
from tracehaul.runtime.log import Log, Seldom
from tracehaul.transfer import tcp_wire as wire
from tracehaul.transfer.cursor import Cursor
from tracehaul.transfer.landing import COPIES_MAX
from tracehaul.transfer.pump import READABLE, WRITABLE, Pump
from tracehaul.transfer.tcp_proof import Guard, Proof
from tracehaul.transfer.tcp_tls import TlsSocket

_seldom = Seldom(Log(__name__))

CONNECTIONS_MAX = 4096
PAUSE_S = 0.05
STALL_S = 10.0
"""A write whose next bytes take longer is cut off. A writer that was frozen must not land bytes in a slot that has
been given to another meanwhile: this is well below the time that a store lets such a slot rest."""


class Listener:
    """Takes connections at a socket that listens; with a ``guard``, of those who show a good certificate."""

    def __init__(
        self,
        sock: socket.socket,
        pump: Pump,
        regions: Mapping[bytes, memoryview],
        guard: Guard | None = None,
    ) -> None:
        self.socket = sock
        self.socket.setblocking(False)
        self._pump = pump
        self._regions = regions
        self._spare = Spare()
        self.accepts = AcceptStats()
        self._guard = guard
        self.serving: set[Serving] = set()

    def advance(self) -> bool:
        """Accept what waits."""
        try:
            while self._accept_one():
                pass
        except BlockingIOError:
            pass
        except OSError:  # nothing can be taken now: others must end first
            threading.Event().wait(PAUSE_S)
        self._pump.arm(self, READABLE)
        return False

    def _accept_one(self) -> bool:
        """Whether one was taken, or refused aloud."""
        try:
            accepted, peer = self.socket.accept()
        except OSError as error:
            if error.errno not in NO_DESCRIPTOR or not self._spare.refuse_one(self.socket):
                raise
            self.accepts.refuse("data plane", "descriptors", why=error)
            return True
        if len(self.serving) >= CONNECTIONS_MAX:
            self._end_strangers()
            accepted.close()
            self.accepts.refuse("data plane", "connections", connections=len(self.serving))
            return True
        self.accepts.accepted += 1
        wire.prepare(accepted)
        serving = self._serving(accepted, peer[0])
        self.serving.add(serving)
        self._pump.add(serving, READABLE)
        return True

    def _serving(self, accepted: socket.socket, peer: str) -> "Serving":
        if self._guard is None:
            return Serving(accepted, self, None, peer)
        secured = TlsSocket(accepted, self._guard.credentials.now.server, None)
        if self._guard.encrypted:
            return Serving(secured, self, secured, peer)
        return Serving(accepted, self, Proof(secured, asking=False), peer)

    def close(self) -> None:
        """After its pump was."""
        self._spare.close()

    def _end_strangers(self) -> None:
        """Make room: end those who have taken too long to say who they are."""
        now_s = clock.perf_s()
        for serving in list(self.serving):
            if serving.stranger and now_s - serving.since_s > HANDSHAKE_S:
                with contextlib.suppress(OSError):
                    serving.socket.shutdown(socket.SHUT_RDWR)

    def region(self, token: bytes) -> memoryview | None:
        """The region of that token."""
        return self._regions.get(token)

    def arm(self, serving: "Serving", events: int) -> None:
        """See :class:`.pump.Pump`."""
        self._pump.arm(serving, events)


class Serving:
    """One connection; one request after the other.

    ``shaking``: what is over once both ends have shown their certificates, if they must; ``peer`` is on that host.
    """

    def __init__(
        self, sock: socket.socket | TlsSocket, listener: Listener, shaking: TlsSocket | Proof | None, peer: str
    ) -> None:
        self.socket = sock
        self._listener = listener
        self._shaking = shaking
        self._peer = peer
        self.since_s = clock.perf_s()
        self._begin()

    def _begin(self) -> None:
        self._inbox = bytearray()
        self._head: wire.Head | None = None
        self._landing: Cursor | None = None
        self._answering = False
        self._reply = b""
        self._sending: Cursor | None = None
        self._refused = False
        self._moved_s = clock.perf_s()

    @property
    def stranger(self) -> bool:
        """Whether the peer still has to show a certificate."""
        return self._shaking is not None

    def advance(self) -> bool:
        try:
            events = self._go() if self._shaking is None else self._shake(self._shaking)
        except OSError:
            events = None
        if events is None:
            self._listener.serving.discard(self)
            return True
        self._listener.arm(self, events)
        return False

    def _shake(self, shaking: TlsSocket | Proof) -> int | None:
        """As :meth:`_go`, while the peer is unknown."""
        try:
            events = shaking.handshake()
        except OSError as error:
            why = why_refused(error)
            _seldom.warning("refused a data connection", about=f"{self._peer} {why}", peer=self._peer, why=why)
            return None
        if events:
            return events
        self._shaking = None
        return self._go()

    def _go(self) -> int | None:
        """What to wait for next; None: the connection is over."""
        while True:
            if not self._answering:
                if not self._take_request():
                    return None if self._refused else READABLE
                if self._landing is not None and not self._land(self._landing):
                    return None if self._refused else READABLE
                self._answering = True
            if not self._answer():
                return WRITABLE
            if self._refused:
                return None
            self._begin()

    def _take_request(self) -> bool:
        """Whether the head and all ranges are here, and the reply or the landing has been prepared."""
        if self._landing is not None:
            return True
        if self._head is None:
            if not self._fill(wire.HEAD.size):
                return False
            self._head = wire.unpack_head(self._inbox)
            if self._head is None or self._head.ranges > COPIES_MAX:
                self._refused = True
                return False
        head = self._head
        region = self._listener.region(head.token)
        if region is None or region.nbytes != head.region_bytes:  # nothing more of a stranger's is kept here
            self._refuse(wire.UNKNOWN_REGION)
            return True
        if not self._fill(wire.HEAD.size + head.ranges * wire.RANGE.size):
            return False
        ranges = wire.unpack_ranges(self._inbox[wire.HEAD.size :])
        if any(offset + nbytes > region.nbytes for offset, nbytes in ranges):
            self._refuse(wire.BAD_RANGE)
        elif head.way == wire.READ:
            self._reply = wire.OK
            self._sending = Cursor(region, ranges, summing=False)
        else:
            self._landing = Cursor(region, ranges, summing=True)
            self._moved_s = clock.perf_s()
        return True

    def _refuse(self, status: bytes) -> None:
        self._reply = status
        self._refused = True

    def _land(self, landing: Cursor) -> bool:
        """Whether a write's bytes have all landed."""
        if clock.perf_s() - self._moved_s > STALL_S:
            self._refused = True
            return False
        if not wire.receive(self.socket, landing):
            self._moved_s = clock.perf_s()
            return False
        self._reply = wire.OK + wire.pack_sums(landing.sums)
        return True

    def _answer(self) -> bool:
        """Whether all of the reply is sent."""
        while self._reply:
            try:
                sent = self.socket.send(self._reply)
            except BlockingIOError:
                return False
            self._reply = self._reply[sent:]
        return wire.flush(self.socket) if self._sending is None else wire.send(self.socket, self._sending)

    def _fill(self, nbytes: int) -> bool:
        """Whether so many bytes of the request are here."""
        while len(self._inbox) < nbytes:
            try:
                received = self.socket.recv(nbytes - len(self._inbox))
            except BlockingIOError:
                return False
            if not received:
                raise ConnectionResetError("the requester is gone")
            self._inbox += received
        return True

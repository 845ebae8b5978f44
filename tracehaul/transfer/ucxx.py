"""Transfers between hosts by UCXX, where NIXL is missing. The only module that imports ucxx and knows its errors.

UCXX has messages, not one-sided access, so :class:`UcxxAgent` makes remote writes of them: a header says where the
bytes belong, pieces follow as messages of their own and land there directly, and the target answers when all have.
A read is a pull by request (see :mod:`.notes`), as it is with NIXL over TCP.

What shapes this file, all of it observed: UCX aborts the process when it is given a damaged worker address, so each
travels with a checksum; an import of ucxx writes UCX's variables into the environment; two builds of UCX in one
process end in a crash, so a process uses NIXL or UCXX, never both; an endpoint learns that its peer is gone within
milliseconds; closing an endpoint ends all that was under way on it, and then nothing of that lands any more.

Each message carries its sender's name and address: a connection that was dropped comes back by itself, and a name is
bound to the address that had it first, so that nobody can speak in the name of another.
"""

import importlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tracehaul.transfer import ucxx_words as words
from tracehaul.transfer.exchange import NameTaken, Waking
from tracehaul.transfer.notes import Triples
from tracehaul.transfer.polled import PolledTransfer
from tracehaul.transfer.ucxx_words import DATA, Envelope, Landed, Noted, Refused, Words, Write
from tracehaul.wire.errors import TransferError, TransferLost

PIECES_IN_FLIGHT = 8
"""On one connection. What waits takes turns, so that a small write need not wait for the end of a large one."""
TURNS_MAX = 8
"""Looks at the worker in a row before the exchange has its turn."""
PROGRESS_MAX = 16
"""Steps of the worker in one look."""
CONNECTIONS_MAX = 2048
WRITES_MAX = 1024
"""Writes of one peer into our memory at once."""
EARLY_MAX = 4096
"""Pieces that came before their header."""
CLOSE_PERIOD_NS = 1_000_000
CLOSE_ATTEMPTS = 100

Bytes = NDArray[np.uint8]


class _Sending:
    """A write of ours: ``pieces`` are still to be sent."""

    def __init__(self, connection: "_Connection", pieces: Iterator[tuple[int, Bytes]]) -> None:
        self.connection = connection
        self.pieces = pieces
        self.landed = False
        self.error: TransferError | None = None


class _Receiving:
    """A peer's write into our memory, until ``left`` pieces have landed."""

    def __init__(self, name: str, connection: "_Connection", write: Write, left: int) -> None:
        self.name = name
        self.connection = connection
        self.id = write.id
        self.note = write.note
        self.left = left


class _Connection:
    """An endpoint, and what is to be sent and received on it."""

    def __init__(self, address: bytes, endpoint: Any) -> None:
        self.address = address
        self.endpoint = endpoint
        self.broken = False
        self.waiting: deque[_Sending] = deque()
        self.sends: list[tuple[Any, Bytes]] = []
        """Requests of pieces under way. A request does not keep its bytes alive: we do."""
        self.controls: list[tuple[Any, Bytes]] = []
        self.expected: dict[int, tuple[_Receiving, Bytes]] = {}
        """By tag."""
        self.landings: list[tuple[Any, _Receiving]] = []
        self.receiving = 0


class UcxxAgent:
    """:class:`.exchange.Agent` by UCXX's bindings; made, used and closed by one thread."""

    def __init__(self, name: str) -> None:
        self._ucx, self._array = _bindings()
        self._name = name
        try:
            flags = (self._ucx.Feature.TAG, self._ucx.Feature.WAKEUP)
            self._context = self._ucx.UCXContext({}, feature_flags=flags)
            self._worker = self._ucx.UCXWorker(
                self._context, enable_delayed_submission=False, enable_python_future=False
            )
            self._worker.init_blocking_progress_mode()
            self._address: bytes = self._worker.address.tobytes()
        except self._ucx.UCXError as error:
            raise TransferError(f"UCXX cannot start: {error}") from error
        self._any = self._ucx.UCXXTag(0), self._ucx.UCXXTagMask(0)
        self._regions: list[tuple[int, Bytes]] = []
        self._names: dict[str, bytes] = {}
        self._connections: dict[bytes, _Connection] = {}
        self._lost: set[str] = set()
        """Peers whose connection broke and was made again by themselves: what was asked over the old one is lost."""
        self._closing: list[_Connection] = []
        """Dropped, with requests that have not ended yet."""
        self._writes: dict[int, _Sending] = {}
        self._early: dict[int, Any] = {}
        self._stray: list[Any] = []
        """Receipts of what nobody wants, with their buffers."""
        self._inbox: list[tuple[Any, Bytes]] = []
        self._heard: list[tuple[str, bytes]] = []
        self._last_id = 0
        self._tag_base = DATA | int.from_bytes(os.urandom(3), "little") << 40
        self._last_tag = 0
        self._more = False
        self.dropped = 0
        """Messages that made no sense."""

    # --- what the exchange asks for

    @property
    def wake_fds(self) -> Sequence[int]:
        return (self._worker.epoll_file_descriptor,)

    def arm(self) -> Waking:
        return "armed" if not self._more and self._worker.arm() else "busy"

    def register(self, address: int, nbytes: int) -> bytes:
        self._regions.append((address, words.bytes_at(address, nbytes)))
        return words.pack_peer(self._name, self._address)

    def add_peer(self, name: str, metadata: bytes) -> None:
        peer = words.unpack_peer(metadata)
        if peer.name != name:
            raise TransferError(f"metadata of {peer.name} under the name of {name}")
        self._bind(name, peer.address)
        self._connect(peer.address)

    def remove_peer(self, name: str) -> None:
        if name in self._lost:  # the connection that it has now is a new one
            self._lost.discard(name)
            return
        address = self._names.pop(name, None)
        if address is not None:
            self._drop(address)

    def post(self, way: Literal["read", "write"], peer: str, ours: Triples, theirs: Triples, note: bytes) -> int:
        assert way == "write", "reads are pulls by request"
        connection = self._reach(peer)
        tags = range(self._last_tag + 1, self._last_tag + 1 + words.pieces_in(ours[:, 1]))
        self._last_tag = tags.stop - 1
        self._last_id += 1
        rows = words.pack_rows(theirs)
        self._tell(connection, Write(self._last_id, self._tag_base + tags.start, rows, note))
        views = [self._view(address, nbytes) for address, nbytes in ours[:, :2].tolist()]
        pieces = zip((self._tag_base + tag for tag in tags), words.cut(views), strict=True)
        sending = _Sending(connection, pieces)
        self._writes[self._last_id] = sending
        connection.waiting.append(sending)
        self._send(connection)
        self._more = True
        return self._last_id

    def poll(self, handle: int) -> bool:
        sending = self._writes[handle]
        if sending.error is not None:
            raise sending.error
        if not sending.landed and sending.connection.broken:
            raise TransferLost("UCXX write: the peer is gone")
        return sending.landed

    def release(self, handle: int) -> None:
        self._writes.pop(handle, None)

    def notify(self, peer: str, note: bytes) -> None:
        self._tell(self._reach(peer), Noted(note))
        self._more = True

    def heard(self) -> list[tuple[str, bytes]]:
        self._more = True
        for _ in range(TURNS_MAX):
            if not self._turn():
                self._more = False
                break
            if self._heard:
                break
        heard, self._heard = self._heard, []
        return heard

    def close(self) -> None:
        for address in list(self._connections):
            self._drop(address)
        # In this order, and all of it: the last reference to a request keeps the worker, and its sockets, alive.
        for held in (self._closing, self._stray, self._inbox):
            held.clear()
        self._early.clear()
        self._writes.clear()
        self._regions.clear()
        del self._worker
        del self._context

    # --- turns

    def _turn(self) -> bool:
        """Progress, then everything that has ended or can begin; whether there was anything."""
        stepped = 0
        while stepped < PROGRESS_MAX and self._worker.progress_once():
            stepped += 1
        moved = stepped > 0
        while True:
            probe = self._worker.tag_probe(*self._any, True)
            if not probe.matched:
                break
            moved = True
            self._arrived(probe)
        moved |= self._read_inbox()
        for connection in list(self._connections.values()):
            moved |= self._landings(connection) | self._send(connection)
            if not connection.broken and not connection.endpoint.alive:
                connection.broken = True
                moved = True
        if self._stray:
            self._stray = [held for held in self._stray if not held[0].completed]
        if self._closing:
            self._closing = [c for c in self._closing if not all(r.completed for r in _requests(c))]
        return moved

    def _arrived(self, probe: Any) -> None:
        """A message has begun to arrive: say where its bytes go."""
        tag: int = probe.sender_tag.value
        if tag & DATA:
            for connection in self._connections.values():
                if tag in connection.expected:
                    self._land(connection, tag, probe)
                    return
            if len(self._early) >= EARLY_MAX:
                self._discard(self._early.pop(next(iter(self._early))))
            self._early[tag] = probe
        elif probe.length > words.ENVELOPE_BYTES_MAX:
            self._discard(probe)
        else:
            buffer = np.empty(probe.length, dtype=np.uint8)
            self._inbox.append((self._worker.tag_recv_with_handle(self._array(buffer), probe), buffer))

    def _land(self, connection: _Connection, tag: int, probe: Any) -> None:
        receiving, target = connection.expected.pop(tag)
        if probe.length != target.nbytes:
            self._discard(probe)
            self._refuse(receiving, f"a piece of {probe.length} bytes, not {target.nbytes}")
            return
        request = connection.endpoint.tag_recv_with_handle(self._array(target), probe)
        connection.landings.append((request, receiving))

    def _discard(self, probe: Any) -> None:
        """Take a message off UCX's hands that nobody wants; it ends as truncated."""
        self.dropped += 1
        buffer = np.empty(1, dtype=np.uint8)
        self._stray.append((self._worker.tag_recv_with_handle(self._array(buffer), probe), buffer))

    def _landings(self, connection: _Connection) -> bool:
        done = [landing for landing in connection.landings if landing[0].completed]
        if not done:
            return False
        connection.landings = [landing for landing in connection.landings if not landing[0].completed]
        for request, receiving in done:
            try:
                request.check_error()
            except self._ucx.UCXError as error:
                self._refuse(receiving, f"a piece was lost: {error}")
                continue
            receiving.left -= 1
            if receiving.left == 0:
                self._landed(receiving)
        return True

    def _landed(self, receiving: _Receiving) -> None:
        receiving.connection.receiving -= 1
        if receiving.note:
            self._heard.append((receiving.name, receiving.note))
        self._tell(receiving.connection, Landed(receiving.id))

    def _refuse(self, receiving: _Receiving, reason: str) -> None:
        """Of the pieces that still come, those that are expected land and are of no use."""
        if receiving.left > 0:
            receiving.left = -1 << 32
            receiving.connection.receiving -= 1
            self._tell(receiving.connection, Refused(receiving.id, reason))

    def _send(self, connection: _Connection) -> bool:
        """Keep a few pieces under way, one of each write in turn."""
        moved = False
        for requests in (connection.controls, connection.sends):
            done = [request for request, _ in requests if request.completed]
            if not done:
                continue
            moved = True
            requests[:] = [held for held in requests if not held[0].completed]
            for request in done:
                try:
                    request.check_error()
                except self._ucx.UCXError:
                    connection.broken = True
        while connection.waiting and len(connection.sends) < PIECES_IN_FLIGHT and not connection.broken:
            sending = connection.waiting.popleft()
            piece = next(sending.pieces, None)
            if piece is None:
                continue
            moved = True
            tag, view = piece
            connection.sends.append(self._post(connection, view, tag))
            connection.waiting.append(sending)
        return moved

    # --- what peers say

    def _read_inbox(self) -> bool:
        done = [letter for letter in self._inbox if letter[0].completed]
        if not done:
            return False
        self._inbox = [letter for letter in self._inbox if not letter[0].completed]
        for request, buffer in done:
            try:
                request.check_error()
                self._hear(words.unpack(buffer.tobytes()))
            except (TransferError, self._ucx.UCXError):
                self.dropped += 1
        return True

    def _hear(self, envelope: Envelope) -> None:
        self._bind(envelope.name, envelope.address)
        connection = self._connect(envelope.address)
        match envelope.words:
            case Noted(note=note):
                self._heard.append((envelope.name, note))
            case Write() as write:
                self._begin(envelope.name, connection, write)
            case Landed(id=id):
                sending = self._sending(id, connection)
                sending.landed = True
            case Refused(id=id, reason=reason):
                sending = self._sending(id, connection)
                sending.error = TransferError(f"{envelope.name} refused: {reason[:200]}")

    def _sending(self, id: int, connection: _Connection) -> _Sending:
        sending = self._writes.get(id)
        if sending is None or sending.connection is not connection:
            raise TransferError("an answer to nothing")
        return sending

    def _begin(self, name: str, connection: _Connection, write: Write) -> None:
        """A write of a peer: its pieces land where it says, if that is memory that we offered."""
        receiving = _Receiving(name, connection, write, 0)
        try:
            if connection.receiving >= WRITES_MAX:
                raise TransferError("too many writes at once")
            targets = [self._view(address, nbytes) for address, nbytes in words.unpack_rows(write.rows)]
        except TransferError as error:
            self._tell(connection, Refused(write.id, str(error)))
            return
        tags: list[int] = []
        for tag, target in enumerate(words.cut(targets), start=write.tag):
            connection.expected[tag] = receiving, target
            tags.append(tag)
        receiving.left = len(tags)
        connection.receiving += 1
        for tag in tags:
            early = self._early.pop(tag, None)
            if early is not None:
                self._land(connection, tag, early)

    # --- connections

    def _bind(self, name: str, address: bytes) -> None:
        bound = self._names.get(name)
        if bound == address:
            return
        if bound is not None:
            known = self._connections.get(bound)
            if known is not None and not known.broken and known.endpoint.alive:
                raise NameTaken(f"{name} is another peer")
            self._lost.discard(name)
            self.remove_peer(name)
        if len(self._names) >= CONNECTIONS_MAX:
            self._forget_broken()
        self._names[name] = address

    def _forget_broken(self) -> None:
        for name, address in list(self._names.items()):
            if address not in self._connections or self._connections[address].broken:
                self.remove_peer(name)
        if len(self._names) >= CONNECTIONS_MAX:
            raise TransferError(f"{CONNECTIONS_MAX} peers at once; no more")

    def _connect(self, address: bytes) -> _Connection:
        known = self._connections.get(address)
        if known is not None and not known.broken:
            return known
        if known is not None:
            self._lost |= {name for name, bound in self._names.items() if bound == address}
            self._drop(address)
        try:
            peer = self._ucx.UCXAddress.create_from_buffer(address)
            endpoint = self._ucx.UCXEndpoint.create_from_worker_address(self._worker, peer, True)
        except self._ucx.UCXError as error:
            raise TransferLost(f"UCXX connect: {error}") from error
        self._connections[address] = _Connection(address, endpoint)
        return self._connections[address]

    def _drop(self, address: bytes) -> None:
        connection = self._connections.pop(address, None)
        if connection is not None:
            connection.broken = True
            connection.endpoint.close_blocking(period=CLOSE_PERIOD_NS, max_attempts=CLOSE_ATTEMPTS)
            connection.expected.clear()
            connection.waiting.clear()
            self._closing.append(connection)

    def _reach(self, peer: str) -> _Connection:
        connection = self._connections.get(self._names.get(peer, b""))
        if connection is None or connection.broken or not connection.endpoint.alive or peer in self._lost:
            raise TransferLost(f"UCXX: {peer} is gone")
        return connection

    def _tell(self, connection: _Connection, message: Words) -> None:
        if not connection.broken and connection.endpoint.alive:
            data = np.frombuffer(words.pack(self._name, self._address, message), dtype=np.uint8)
            connection.controls.append(self._post(connection, data, 0))

    def _post(self, connection: _Connection, data: Bytes, tag: int) -> tuple[Any, Bytes]:
        return connection.endpoint.tag_send(self._array(data), self._ucx.UCXXTag(tag)), data

    def _view(self, address: int, nbytes: int) -> Bytes:
        for start, region in self._regions:
            if start <= address and address + nbytes <= start + region.nbytes:
                return region[address - start : address - start + nbytes]
        raise TransferError("a range is outside all regions")


class UcxxTransfer(PolledTransfer):
    """The UCXX transport of ``owner`` (``node#generation``). See :class:`.base.Transfer`."""

    def __init__(self, owner: str) -> None:
        """Blocks for about half a second while UCX looks at the machine.

        Args:
            owner: Never used twice in the life of the cluster.

        Raises:
            TransferError: UCXX is not installed or cannot start.
        """
        super().__init__("ucxx", owner, "pull", partial(UcxxAgent, owner))


def _requests(connection: _Connection) -> list[Any]:
    return [held[0] for held in (*connection.sends, *connection.controls, *connection.landings)]


def _bindings() -> tuple[Any, Any]:
    """UCXX's native module, and how it takes buffers; the environment stays the operator's."""
    before = dict(os.environ)
    try:
        library = importlib.import_module("ucxx._lib.libucxx")
        array = importlib.import_module("ucxx._lib.arr")
    except ImportError as error:
        raise TransferError("UCXX is not installed: pip install tracehaul-store[ucxx]") from error
    for key in [key for key in os.environ if key.startswith("UCX_") and key not in before]:
        del os.environ[key]
    return library, array.Array

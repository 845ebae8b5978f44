"""What the TCP transport says on its sockets, and moving a cursor over one. Both ends are of the same version.

::

    request   head (magic, way, region's token and bytes, number of ranges), ranges (offset, bytes), a write's bytes
    reply     status; of a read then its bytes, of a write the checksum of each range where it landed

Whatever is not understood ends the connection. With TLS all of it is inside.
"""

import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from tracehaul.runtime.offload import yield_core
from tracehaul.transfer.cursor import Cursor
from tracehaul.transfer.tcp_tls import RECORD_BYTES, TlsSocket
from tracehaul.wire.ids import Checksum

TOKEN_BYTES = 16
TURN_BYTES = 1 << 20
"""Moved on one socket before others that are ready have their turn: about half a millisecond."""
CALL_BYTES = 512 << 10
"""Moved by one system call, and summed in the cache after it; then the core is left to others that wait for it."""
LOW_BYTES = 256 << 10
"""A receiver is woken for no less, but at the end."""

READ, WRITE = b"r", b"w"
OK, UNKNOWN_REGION, BAD_RANGE = b"\x00", b"\x01", b"\x02"

HEAD = struct.Struct("<4sc16sQI")
RANGE = struct.Struct("<QQ")
_MAGIC = b"thd1"


class Head(NamedTuple):
    """How a request begins."""

    way: bytes
    token: bytes
    region_bytes: int
    """What the requester takes the region to be: a descriptor that was tampered with is refused."""
    ranges: int


def pack_request(head: Head, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Head and ranges."""
    return HEAD.pack(_MAGIC, *head) + b"".join([RANGE.pack(*r) for r in ranges])


def unpack_head(packed: bytes | bytearray) -> Head | None:
    """None if that is no head."""
    magic, *rest = HEAD.unpack(packed)
    head = Head(*rest)
    return head if magic == _MAGIC and head.way in (READ, WRITE) else None


def unpack_ranges(packed: bytes | bytearray) -> list[tuple[int, int]]:
    """Offset and bytes of each."""
    return [(offset, nbytes) for offset, nbytes in RANGE.iter_unpack(packed)]


def pack_sums(sums: Sequence[Checksum]) -> bytes:
    """As a write's reply ends."""
    return struct.pack(f"<{len(sums)}Q", *sums)


def unpack_sums(packed: bytes | bytearray) -> list[Checksum]:
    """As a write's reply ends."""
    return [Checksum(value) for (value,) in struct.iter_unpack("<Q", packed)]


def prepare(sock: socket.socket) -> None:
    """Options of a connection, either end."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send(sock: socket.socket | TlsSocket, cursor: Cursor) -> bool:
    """Send what the socket takes, for a turn; True when all is sent. Raises OSError."""
    turn = TURN_BYTES
    while cursor.left_bytes and turn > 0:
        try:
            sent = sock.sendmsg(cursor.views(CALL_BYTES))
        except BlockingIOError:
            break
        cursor.advance(sent)
        turn -= sent
        yield_core()
    return not cursor.left_bytes and flush(sock)


def flush(sock: socket.socket | TlsSocket) -> bool:
    """Whether what was sent is the system's. Raises OSError."""
    return not isinstance(sock, TlsSocket) or sock.flush()


def receive(sock: socket.socket | TlsSocket, cursor: Cursor) -> bool:
    """Receive what is there, for a turn; True when all has landed. Raises OSError, also at the stream's end."""
    turn = TURN_BYTES
    while cursor.left_bytes and turn > 0:
        try:
            received = sock.recvmsg_into(cursor.views(CALL_BYTES))[0]
        except BlockingIOError:
            break
        if not received:
            raise ConnectionResetError("the peer closed the connection")
        cursor.advance(received)
        turn -= received
        yield_core()
    left_bytes = cursor.left_bytes
    if isinstance(sock, TlsSocket):
        while cursor.left_bytes and (held_bytes := sock.held_into(cursor.views(CALL_BYTES))):
            cursor.advance(held_bytes)
        left_bytes = cursor.left_bytes - RECORD_BYTES  # of a record, the beginning may have left the socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, min(LOW_BYTES, left_bytes)))
    return not cursor.left_bytes

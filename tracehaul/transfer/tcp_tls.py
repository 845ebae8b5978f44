"""A TLS connection with what the TCP transport uses of a socket: what would block raises BlockingIOError.

Bytes are deciphered into the regions and enciphered out of them, without another copy, while others may run Python.
"""

import errno
import os
import socket
import ssl
from collections.abc import Sequence

from tracehaul.transfer.pump import READABLE, WRITABLE

RECORD_BYTES = 17 << 10
"""More than a record has on the wire."""
BYTES_MAX = 1 << 37
"""Of one connection: well below what one key of AES-GCM may encipher."""


class TlsSocket:
    """Over a non-blocking TCP socket that is connected or about to be.

    ``host``: what a server's certificate must be of; None: this is the server's end.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str | None) -> None:
        self._socket = sock
        self._context = context
        self._host = host
        self._tls: ssl.SSLSocket | None = None
        self._stuck_bytes = 0
        """What the last write was of, if it must be repeated."""
        self.moved_bytes = 0

    def handshake(self) -> int:
        """Go on with it as far as it goes; the events to wait for, or 0: both ends are known.

        Raises:
            OSError: the connection is over; as SSLError, one end does not trust the other.
        """
        if self._tls is None:
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            self._tls = self._context.wrap_socket(
                self._socket,
                server_side=self._host is None,
                server_hostname=self._host,
                do_handshake_on_connect=False,
            )
            self._socket = self._tls
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return READABLE
        except ssl.SSLWantWriteError:
            return WRITABLE
        return 0

    @property
    def held_bytes(self) -> int:
        """Deciphered and not yet received: no event tells of them."""
        return self._tls.pending() if self._tls is not None else 0

    def recvmsg_into(self, views: Sequence[memoryview]) -> tuple[int]:
        """As a socket's: how many bytes came; 0 at the stream's end."""
        assert self._tls is not None
        receive = self._tls.recv_into
        total = 0
        try:
            for view in views:
                at, size = 0, len(view)
                while at < size:
                    received = receive(view[at:])
                    if not received:
                        return (total,)
                    at += received
                    total += received
        except ssl.SSLWantReadError:
            if not total:
                raise BlockingIOError(errno.EAGAIN, "no record is here") from None
        self.moved_bytes += total
        return (total,)

    def recv(self, nbytes: int) -> bytes:
        """As a socket's."""
        assert self._tls is not None
        try:
            return self._tls.recv(nbytes)
        except ssl.SSLWantReadError:
            raise BlockingIOError(errno.EAGAIN, "no record is here") from None

    def sendmsg(self, views: Sequence[memoryview]) -> int:
        """As a socket's."""
        total = 0
        try:
            for view in views:
                total += self.send(view)
        except BlockingIOError:
            if not total:
                raise
        self.moved_bytes += total
        return total

    def send(self, data: bytes | memoryview) -> int:
        """As a socket's; after a BlockingIOError, the next call must begin with the same bytes."""
        assert self._tls is not None
        if self._stuck_bytes:
            data = data[: self._stuck_bytes]  # of which records may be sent already
        try:
            sent = self._tls.send(data)
        except ssl.SSLWantWriteError:
            self._stuck_bytes = len(data)
            raise BlockingIOError(errno.EAGAIN, "the socket is full") from None
        self._stuck_bytes = 0
        return sent

    def fileno(self) -> int:
        """As a socket's."""
        return self._socket.fileno()

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """As a socket's."""
        self._socket.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        """As a TCP socket's: nothing is said to the peer."""
        socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        """As a socket's."""
        self._socket.close()

"""A TLS connection with what the TCP transport uses of a socket: what would block raises BlockingIOError.

Bytes are deciphered into the regions and enciphered out of them. What is on the wire passes a buffer, so that one
system call moves many records.
"""

import os
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import cast

from tracehaul.transfer.pump import READABLE, WRITABLE

RECORD_BYTES = 17 << 10
"""More than a record has on the wire."""
BYTES_MAX = 1 << 37
"""Of one connection: well below what one key of AES-GCM may encipher."""
WIRE_BYTES = 256 << 10
"""Received by one system call, and enciphered before one that sends."""

_thread = threading.local()


class TlsSocket:
    """Over a non-blocking TCP socket that is connected or about to be.

    ``host``: what a server's certificate must be of; None: this is the server's end.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str | None) -> None:
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=host is None, server_hostname=host)
        self._unsent = memoryview(b"")
        self.moved_bytes = 0

    def handshake(self) -> int:
        """Go on with it as far as it goes; the events to wait for, or 0: both ends are known.

        Raises:
            OSError: the connection is over; as SSLError, one end does not trust the other.
        """
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        while True:
            try:
                self._flush()
            except BlockingIOError:
                return WRITABLE
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    continue
                try:
                    self._take()
                except BlockingIOError:
                    return READABLE
            except ssl.SSLError:
                self.flush()  # the peer is told
                raise
            else:
                break
        try:
            self._flush()
        except BlockingIOError:
            return WRITABLE  # it is asked for again, and is over at once
        return 0

    def recvmsg_into(self, views: Sequence[memoryview]) -> tuple[int]:
        """As a socket's: how many bytes came; 0 at the stream's end."""
        return (self._read(views, more=True),)

    def held_into(self, views: Sequence[memoryview]) -> int:
        """The same of what has left the socket already, of which no event tells; 0: that is no whole record."""
        return self._read(views, more=False)

    def _read(self, views: Sequence[memoryview], *, more: bool) -> int:
        read = self._tls.read
        total = 0
        try:
            for view in views:
                at, size = 0, len(view)
                while at < size:
                    try:
                        received = cast(int, read(size - at, view[at:]))
                    except ssl.SSLWantReadError:
                        if not more:
                            return total
                        self._take()
                        continue
                    if not received:
                        return total
                    at += received
                    total += received
        except BlockingIOError:
            if not total:
                raise
        finally:
            self.moved_bytes += total
        return total

    def recv(self, nbytes: int) -> bytes:
        """As a socket's."""
        while True:
            try:
                return self._tls.read(nbytes)
            except ssl.SSLWantReadError:
                self._take()

    def sendmsg(self, views: Sequence[memoryview]) -> int:
        """As a socket's; it is all sent when :meth:`flush` says so."""
        self._flush()
        total = 0
        for view in views:
            for at in range(0, len(view), WIRE_BYTES):
                written = self._tls.write(view[at : at + WIRE_BYTES])
                self.moved_bytes += written
                total += written
                if self._outgoing.pending >= WIRE_BYTES and not self.flush():
                    return total
        self.flush()
        return total

    def send(self, data: bytes) -> int:
        """As a socket's; see :meth:`sendmsg`."""
        return self.sendmsg([memoryview(data)])

    def flush(self) -> bool:
        """Whether all that was sent has left for the socket."""
        try:
            self._flush()
        except BlockingIOError:
            return False
        return True

    def _take(self) -> None:
        """Records from the socket."""
        buffer = getattr(_thread, "buffer", None)
        if buffer is None:
            buffer = _thread.buffer = memoryview(bytearray(WIRE_BYTES))
        received = self._socket.recv_into(buffer)
        if received:
            self._incoming.write(buffer[:received])
        else:
            self._incoming.write_eof()

    def _flush(self) -> None:
        """Records to the socket. Raises BlockingIOError while it does not take them all."""
        if not self._unsent and self._outgoing.pending:
            self._unsent = memoryview(self._outgoing.read())
        while self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def fileno(self) -> int:
        """As a socket's."""
        return self._socket.fileno()

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """As a socket's."""
        self._socket.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        """As a TCP socket's: nothing is said to the peer."""
        self._socket.shutdown(how)

    def close(self) -> None:
        """As a socket's."""
        self._socket.close()

"""TLS between a connection and its protocol, on uvloop or plain asyncio.

The loops' own tells nobody why it refused a peer, not even the peer, and keeps one context for a server's life.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

from tracehaul.runtime.credentials import HANDSHAKE_S, why_refused

_READ_BYTES = 16 << 10
"""What a record has at most: more would only be allocated."""
_ALERT = b"\x15\x03\x01\x00\x02\x02\x46"
"""For a client that speaks no TLS, and would hear nothing: from it a node knows what it has met."""


class TlsEnd(asyncio.Protocol):
    """One end of a connection: the protocol of what carries it, and the transport of ``protocol``, which is told of the
    connection when both ends have shown their certificates.

    ``host``: what a server's certificate must be of; None: this is the server's end, and ``refused`` is told of whom
    (its host) it did not let in, and why.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        protocol: asyncio.Protocol,
        host: str | None,
        refused: Callable[[str, str], None] = lambda host, why: None,
    ) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=host is None, server_hostname=host)
        self._protocol = protocol
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None
        self._paused = False
        self._error: Exception | None = None
        self.secured: asyncio.Future[None] = self._loop.create_future()
        """Done when the protocol has its connection; an OSError, as SSLError where trust was lacking: it never will."""

    # --- for what carries it ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._late = self._loop.call_later(HANDSHAKE_S, self._fail, TimeoutError("it is too slow at showing who it is"))
        self._shake()

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        if self.secured.done() or self._shake():
            self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        error = self._error or exc
        if self._known:
            self._protocol.connection_lost(error)
            return
        error = error or ConnectionResetError("it closed the connection")
        if not self.secured.done():
            self.secured.set_exception(error)
            self.secured.exception()  # a server does not ask
        self._refused(self._host, why_refused(error))

    def pause_writing(self) -> None:
        if self._known:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._known:
            self._protocol.resume_writing()

    # --- for the protocol ---------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """As a transport's."""
        self._tls.write(data)
        self._flush()

    def pause_reading(self) -> None:
        """As a transport's."""
        self._paused = True
        self._below.pause_reading()

    def resume_reading(self) -> None:
        """As a transport's."""
        self._paused = False
        self._below.resume_reading()
        self._read()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As a transport's."""
        self._below.set_write_buffer_limits(high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As a transport's."""
        return self._tls.getpeercert() if name == "peercert" else self._below.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """As a transport's."""
        return self._below.is_closing()

    def close(self) -> None:
        """As a transport's."""
        self._below.close()

    def abort(self) -> None:
        """As a transport's."""
        self._below.abort()

    # --- between them -------------------------------------------------------------------------------------

    @property
    def _below(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    @property
    def _known(self) -> bool:
        return self.secured.done() and not self.secured.cancelled() and self.secured.exception() is None

    @property
    def _host(self) -> str:
        peername = self._below.get_extra_info("peername")
        return peername[0] if peername else "unknown"

    def _shake(self) -> bool:
        """Go on with the handshake; whether it is over, and the protocol has its connection."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as error:
            self._fail(error)
            return False
        self._flush()
        if self._late is not None:
            self._late.cancel()
        if self.secured.cancelled():  # nobody waits for it any more
            self._below.abort()
            return False
        self.secured.set_result(None)
        self._protocol.connection_made(cast(asyncio.Transport, self))
        return True

    def _read(self) -> None:
        try:
            while not self._paused and not self._below.is_closing() and (self._incoming.pending or self._tls.pending()):
                data = self._tls.read(_READ_BYTES)
                if not data:
                    self._below.close()
                    return
                self._protocol.data_received(data)
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the connection; the peer is told why as far as TLS has words for it."""
        self._error = self._error or error
        if self._tls.server_side and not self._known and not self._outgoing.pending and not self._below.is_closing():
            self._below.write(_ALERT)
        self._flush()
        self._below.close()

    def _flush(self) -> None:
        if self._outgoing.pending and not self._below.is_closing():
            self._below.write(self._outgoing.read())

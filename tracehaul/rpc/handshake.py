"""From an accepted TCP connection to one under TLS, on uvloop or plain asyncio, with the certificates of that moment.

The loops' own servers keep one context for life, and say nothing of whom they refuse.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from tracehaul.runtime.credentials import HANDSHAKE_S, Credentials, why_refused
from tracehaul.runtime.log import Log, Seldom

_seldom = Seldom(Log(__name__))


class Handshake(asyncio.Protocol):
    """Makes ``open_protocol``'s protocol that of a connection once both ends have shown good certificates."""

    def __init__(self, credentials: Credentials, open_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._credentials = credentials
        self._open_protocol = open_protocol
        self._task: asyncio.Task[None] | None = None
        self._early = bytearray()
        """What came with the handshake's end: a loop's turn of it."""
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = cast(asyncio.Transport, transport)
        plain.pause_reading()
        self._task = asyncio.get_running_loop().create_task(self._run(plain))

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    async def _run(self, plain: asyncio.Transport) -> None:
        peername = plain.get_extra_info("peername")
        host = peername[0] if peername else "unknown"
        try:
            secured = await asyncio.get_running_loop().start_tls(
                plain, self, self._credentials.now.server, server_side=True, ssl_handshake_timeout=HANDSHAKE_S
            )
        except (OSError, ValueError) as error:  # SSLError, ConnectionError and TimeoutError are OSErrors
            why = why_refused(error)
            _seldom.warning("refused a connection", about=f"{host} {why}", peer=host, why=why)
            plain.abort()
            return
        if secured is None or self._lost:
            return
        protocol = self._open_protocol()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if self._early:
            protocol.data_received(bytes(self._early))

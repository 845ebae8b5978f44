"""Who is at the other end of a data connection: shown by certificates when it is made, before anything else is said.

Under ``tls`` all that follows stays inside. Under ``auth`` both ends show their certificates in a TLS handshake, tell
each other inside of it that they are satisfied, and go on in clear on the same connection: nobody without a certificate
gets one, and bytes move as fast as plain ones. What is sent in clear is proven by nothing but the connection that it is
on: who captures packets reads it, and who can put packets into it is believed.
"""

from typing import NamedTuple

from tracehaul.runtime.credentials import Credentials
from tracehaul.transfer.pump import READABLE, WRITABLE
from tracehaul.transfer.tcp_tls import TlsSocket

_WORD = b"thda".ljust(33, b"\0")
"""As long as a request's head, and none: an end that keeps all inside TLS hangs up on it, as one that does not on a
head."""


class Guard(NamedTuple):
    """What a process's data plane demands of its peers."""

    credentials: Credentials
    encrypted: bool
    """Or else proven alone."""

    @property
    def word(self) -> str:
        """For an operator."""
        return "TLS" if self.encrypted else "authenticated"


class Proof:
    """Of one connection that goes on in clear: the handshake, then a word each way inside of it.

    The end that made the connection speaks first, and in clear only after it was answered: no byte in clear is taken
    for one of TLS.
    """

    def __init__(self, tls: TlsSocket, *, asking: bool) -> None:
        """``asking``: this end made the connection."""
        self._tls = tls
        self._steps = [self._shake, self._say, self._hear] if asking else [self._shake, self._hear, self._say]
        self._unsent = _WORD
        self._heard = b""

    def handshake(self) -> int:
        """As :meth:`.tcp_tls.TlsSocket.handshake`."""
        while self._steps:
            if events := self._steps[0]():
                return events
            self._steps.pop(0)
        return 0

    def _shake(self) -> int:
        return self._tls.handshake()

    def _say(self) -> int:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._tls.send(self._unsent) :]
        except BlockingIOError:
            return WRITABLE
        return 0 if self._tls.flush() else WRITABLE

    def _hear(self) -> int:
        try:
            while len(self._heard) < len(_WORD):
                received = self._tls.recv(len(_WORD) - len(self._heard))
                if not received:
                    raise ConnectionResetError("it closed the connection")
                self._heard += received
        except BlockingIOError:
            return READABLE
        if self._heard != _WORD:
            raise ConnectionResetError('its [security] says another "data" than this one\'s')
        return 0

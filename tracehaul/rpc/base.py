"""The control plane's interface: every implementation passes ``tests/contract/test_rpc.py``."""

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import msgspec

from tracehaul.wire.ids import StepId, TraceId
from tracehaul.wire.messages import Reply, Request


class CallContext(msgspec.Struct, frozen=True):
    """What travels with every call, beside its message."""

    trace: TraceId | None = None
    step: StepId | None = None
    peer: str = ""
    """Names the connection at the side that serves the call; set there, unique in that process's life."""
    timeout_s: float = 0.0
    """What was left of the caller's deadline when it sent the call; 0 for a stream without a total limit."""
    names: frozenset[str] | None = None
    """The nodes that the caller's certificate is of; None: the connection proves nothing. Set where it is served."""


NO_CONTEXT = CallContext()


class Service(Protocol):
    """What a process serves. A ClusterError raised here reaches the caller as the same class and message.

    Any other exception is a bug: it is logged here and reaches the caller as a plain ClusterError.
    When the caller's deadline passes, it cancels, or its connection breaks, the handler is cancelled.
    """

    async def call(self, request: Request, context: CallContext) -> Reply:
        """Answer one request with one reply."""
        ...

    def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        """Answer one request with many replies; closed (``aclose``) when the caller leaves."""
        ...

    def disconnected(self, peer: str) -> None:
        """The connection named ``peer`` is gone: free what is held for it. Called once, after its handlers ended."""
        ...


class Replies(Protocol):
    """One stream's replies, as they come, for one consumer: the request is sent when the first is asked for.

    Closing, or an error from :meth:`take` or from iterating (a cancellation, too), stops the peer's handler.
    """

    def __aiter__(self) -> "Replies": ...

    async def __anext__(self) -> Reply: ...

    async def take(self) -> list[Reply]:
        """All that have come and were not taken, in order; waits for one. Empty: the stream is complete.

        Raises:
            TimedOut: nothing, not even a sign of life, for ``idle_timeout_s``.
            PeerLost: the connection broke.
            Overloaded: the consumer fell too far behind (the buffer's limit).
            ClusterError: what the handler raised.
        """
        ...

    def divert(self, take: Callable[[Reply], bool]) -> None:
        """While the consumer waits in :meth:`take`, what comes is given to ``take`` first, at once: True, and it is
        done with; False, and the consumer gets it as ever. What ``take`` raises ends the stream."""
        ...

    async def aclose(self) -> None:
        """Nothing more is wanted. Closing twice is harmless."""
        ...


class Connection(Protocol):
    """A client's side of one connection. Safe for concurrent calls; never reconnects by itself."""

    @property
    def closed(self) -> bool:
        """True once the connection is lost or closed: get another."""
        ...

    async def call(self, request: Request, *, timeout_s: float, context: CallContext = NO_CONTEXT) -> Reply:
        """Send one request, await its one reply.

        Raises:
            TimedOut: no reply within ``timeout_s``; the peer's handler is told to stop.
            PeerLost: the connection broke.
            ClusterError: what the handler raised.
        """
        ...

    def stream(self, request: Request, *, idle_timeout_s: float, context: CallContext = NO_CONTEXT) -> Replies:
        """Send one request, take its replies.

        While a stream is open the serving side proves every second that it lives, so a handler that is merely
        slow does not time out, and a frozen process does.
        """
        ...

    async def close(self) -> None:
        """Close; pending calls raise PeerLost."""
        ...


class Server(Protocol):
    """A listening endpoint."""

    @property
    def address(self) -> str:
        """``host:port`` that peers reach it by, with the port actually bound."""
        ...

    async def close(self) -> None:
        """Stop listening, cancel running handlers, close connections."""
        ...


class Network(Protocol):
    """Makes servers and connections: TCP in a cluster, in process in tests and in the simulator."""

    async def listen(self, address: str, service: Service, announce: str = "") -> Server:
        """Serve ``service`` at ``host:port`` (port 0: any free one).

        ``announce`` is the host, an address or a name, that peers reach it by; empty: the one that is bound.

        Raises:
            OSError: the address cannot be bound, or no peer could reach what would be announced.
        """
        ...

    async def connect(self, address: str, *, timeout_s: float) -> Connection:
        """Open a connection.

        Raises:
            PeerLost: nobody listens there.
            Untrusted: one end does not take the other's certificate.
            TimedOut: no answer within ``timeout_s``.
        """
        ...

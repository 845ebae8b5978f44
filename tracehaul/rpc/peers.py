"""A process's connections to its peers, one per address, made when first needed."""

import asyncio
from collections.abc import Awaitable, Callable

from tracehaul.rpc.base import NO_CONTEXT, CallContext, Connection, Network, Replies
from tracehaul.runtime.clock import now_s
from tracehaul.wire.errors import ClusterError, PeerLost, TimedOut
from tracehaul.wire.messages import Reply, Request

CONNECT_TIMEOUT_S = 2.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 1.0
ADDRESSES_MAX = 1024
"""Addresses remembered; of restarted nodes the old ones pile up."""


class Peers:
    """Pool of connections. A peer that could not be reached fails at once until its backoff is over.

    Safe for concurrent use: callers of one address share one connection and one attempt to make it.
    """

    def __init__(self, network: Network, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._network = network
        self._connect_timeout_s = connect_timeout_s
        self._peers: dict[str, _Peer] = {}
        self._closed = False

    async def get(self, address: str) -> Connection:
        """An open connection to ``address``.

        Raises:
            PeerLost: nobody listens there, or lately nobody did.
            TimedOut: no answer within the connect timeout.
            ProtocolError: it is no node of this version.
        """
        peer = self._peers.get(address)
        if peer is not None and peer.connection is not None and not peer.connection.closed:
            return peer.connection
        if peer is None:
            self._forget_old()
            peer = self._peers[address] = _Peer()
        async with peer.dialing:
            if self._closed:
                raise PeerLost("this node is stopping")
            if peer.connection is None or peer.connection.closed:
                peer.connection = await self._dial(address, peer)
            return peer.connection

    async def _dial(self, address: str, peer: "_Peer") -> Connection:
        if peer.error is not None and now_s() < peer.retry_s:
            raise type(peer.error)(str(peer.error))
        try:
            connection = await self._network.connect(address, timeout_s=self._connect_timeout_s)
        except ClusterError as error:
            peer.failed(error)
            raise
        peer.error = None
        peer.backoff_s = BACKOFF_MIN_S
        if self._closed:  # meanwhile
            await connection.close()
            raise PeerLost("this node is stopping")
        return connection

    async def call(
        self, address: str, request: Request, *, timeout_s: float, context: CallContext = NO_CONTEXT
    ) -> Reply:
        """As :meth:`Connection.call`; ``timeout_s`` covers connecting too."""
        deadline_s = now_s() + timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                connection = await self.get(address)
        except TimeoutError:
            raise TimedOut(f"no connection to {address} within {timeout_s:g} s") from None
        return await connection.call(request, timeout_s=deadline_s - now_s(), context=context)

    def stream(
        self, address: str, request: Request, *, idle_timeout_s: float, context: CallContext = NO_CONTEXT
    ) -> Replies:
        """As :meth:`Connection.stream`; taking raises what :meth:`get` does, too."""

        async def open_stream() -> Replies:
            connection = await self.get(address)
            return connection.stream(request, idle_timeout_s=idle_timeout_s, context=context)

        return _Replies(open_stream)

    async def close(self) -> None:
        """Close all connections; nothing can be asked afterwards."""
        self._closed = True
        connections = [peer.connection for peer in self._peers.values() if peer.connection is not None]
        self._peers.clear()
        await asyncio.gather(*(connection.close() for connection in connections))

    def _forget_old(self) -> None:
        if len(self._peers) >= ADDRESSES_MAX:
            now = now_s()
            self._peers = {address: peer for address, peer in self._peers.items() if not peer.is_old(now)}


class _Replies:
    """Implements :class:`tracehaul.rpc.base.Replies` where the connection may have to be made first."""

    def __init__(self, open_stream: Callable[[], Awaitable[Replies]]) -> None:
        self._open_stream: Callable[[], Awaitable[Replies]] | None = open_stream
        """Until it was called."""
        self._replies: Replies | None = None
        self._diverted: Callable[[Reply], bool] | None = None

    def __aiter__(self) -> "_Replies":
        return self

    async def __anext__(self) -> Reply:
        replies = self._replies or await self._opened()
        if replies is None:
            raise StopAsyncIteration
        return await anext(replies)

    async def take(self) -> list[Reply]:
        replies = self._replies or await self._opened()
        return [] if replies is None else await replies.take()

    def divert(self, take: Callable[[Reply], bool]) -> None:
        self._diverted = take
        if self._replies is not None:
            self._replies.divert(take)

    async def aclose(self) -> None:
        self._open_stream = self._diverted = None
        if self._replies is not None:
            await self._replies.aclose()

    async def _opened(self) -> Replies | None:
        """None: it was closed, or could not be opened."""
        open_stream, self._open_stream = self._open_stream, None
        if open_stream is not None:
            self._replies = await open_stream()
            if self._diverted is not None:
                self._replies.divert(self._diverted)
        return self._replies


class _Peer:
    """What is known of one address."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.dialing = asyncio.Lock()
        self.error: ClusterError | None = None
        """Why the last attempt failed; None after a success."""
        self.retry_s = 0.0
        self.backoff_s = BACKOFF_MIN_S

    def failed(self, error: ClusterError) -> None:
        """An attempt failed: nobody tries again for a while."""
        self.error = error
        self.retry_s = now_s() + self.backoff_s
        self.backoff_s = min(2 * self.backoff_s, BACKOFF_MAX_S)

    def is_old(self, now: float) -> bool:
        """Nothing is lost by forgetting it."""
        open_ = self.connection is not None and not self.connection.closed
        return not open_ and not self.dialing.locked() and now >= self.retry_s

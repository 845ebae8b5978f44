"""Transfers over plain TCP: the owner's threads send from its region, or land in it; ours do the rest.

Where there is no RDMA this is the fastest way between hosts: each transfer has a connection of its own, bytes go
between the sockets and the regions without another copy, and are summed while a core's cache still has them. Nothing
lands late in our memory: a transfer that is given up closes its connection.

Plain, it is for a network on which nobody else is: a region's token is on it for all to see, and opens the region to
whoever tells it. With a guard both ends of every connection have shown a certificate before the token is told, and all
is under TLS if it says so (:mod:`tracehaul.transfer.tcp_proof`).
"""

import asyncio
import secrets
from collections.abc import Sequence

import msgspec

from tracehaul.runtime import clock
from tracehaul.runtime.addresses import bound
from tracehaul.transfer import tcp_wire as wire
from tracehaul.transfer.base import Copy, Memory, Region
from tracehaul.transfer.landing import check_copies, land
from tracehaul.transfer.names import Names, is_host, known
from tracehaul.transfer.place import LOOPBACK, Place
from tracehaul.transfer.pump import READABLE, Pump
from tracehaul.transfer.region import Registered
from tracehaul.transfer.tcp_asking import End, Order
from tracehaul.transfer.tcp_proof import Guard
from tracehaul.transfer.tcp_serving import Listener
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError, TransferLost
from tracehaul.wire.ids import Checksum

THREADS = 2
ENDS_MAX = 1024
"""Peers remembered before those without a connection are forgotten."""


class TcpPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a region's owner listens, and what makes it answer."""

    host: str
    """An address, or a name."""
    port: int
    token: bytes
    """Of one region in one life of its owner."""


class TcpTransfer:
    """The TCP transport of ``owner``, listening at ``place``; ``guard``: for those alone that it lets in.

    See :class:`.base.Transfer`.

    Raises:
        OSError: it cannot listen there, or no peer could reach what it would announce.
    """

    def __init__(self, owner: str, place: Place = LOOPBACK, guard: Guard | None = None) -> None:
        self._owner = owner
        self._host = place.announced
        sock = bound(place.listen, place.port)
        self._regions: dict[bytes, memoryview] = {}
        self._pump = Pump("tcp", THREADS)
        self._listener = Listener(sock, self._pump, self._regions, guard)
        self.accepts = self._listener.accepts
        self._pump.add(self._listener, READABLE)
        self._guard = guard
        self._ends: dict[tuple[str, int], End] = {}
        self._names = Names()
        self._orders: dict[asyncio.Future[list[Checksum]], Order] = {}
        self._closed = False

    @property
    def kind(self) -> str:
        return "tcp"

    @property
    def host(self) -> str:
        """What peers are told to connect to."""
        return self._host

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return self._listener.socket.getsockname()[1]

    def register(self, memory: Memory) -> Registered:
        token = secrets.token_bytes(wire.TOKEN_BYTES)
        self._regions[token] = memory.buffer
        packed = msgspec.msgpack.encode(TcpPayload(self._host, self.port, token))
        return Registered(memory.buffer, RegionDescriptor(self.kind, self._owner, memory.buffer.nbytes, packed))

    def reaches(self, remote: RegionDescriptor) -> bool:
        return remote.kind == self.kind

    async def read(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> list[Checksum]:
        return await self._transfer(wire.READ, remote, local, copies, timeout_s)

    async def write(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> list[Checksum]:
        return await self._transfer(wire.WRITE, remote, local, copies, timeout_s)

    async def _transfer(
        self, way: bytes, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], timeout_s: float
    ) -> list[Checksum]:
        if self._closed:
            raise TransferLost("this side closed its transport")
        if remote.kind != self.kind:
            raise TransferError(f"a {remote.kind} region is not reachable by {self.kind}")
        payload = _unpack(remote)
        nbytes = check_copies(copies, local.buffer.nbytes, remote.nbytes)
        what = f"{nbytes} bytes {'from' if way == wire.READ else 'to'} {remote.owner}"
        end = self._end(payload)
        if not end.lines:  # a name may stand for another address by now
            until_s = clock.now_s() + timeout_s
            end.target = known(*end.key) or await self._names.target(*end.key, timeout_s)
            timeout_s = until_s - clock.now_s()
            if self._closed:
                raise TransferLost("this side closed its transport")
        order = Order(way, remote, payload.token, local.buffer, copies)
        self._orders[order.future] = order
        order.future.add_done_callback(self._orders.pop)
        end.submit(order)
        return await land(order.future, timeout_s, what, order.stop)

    def _end(self, payload: TcpPayload) -> "End":
        key = payload.host, payload.port
        end = self._ends.get(key)
        if end is None:
            if len(self._ends) >= ENDS_MAX:
                self._ends = {key: end for key, end in self._ends.items() if end.lines}
            end = self._ends[key] = End(key, self._pump, self._guard)
        return end

    async def broken(self) -> None:
        # Shielded: to stop waiting must not cancel what a thread will set.
        await asyncio.shield(asyncio.wrap_future(self._pump.ended))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._names.aclose()
        await asyncio.get_running_loop().run_in_executor(None, self._pump.close)
        self._listener.close()
        for order in list(self._orders.values()):  # now: nothing moves any more
            order.fail(TransferLost("this side closed its transport"))
        self._ends.clear()


def _unpack(remote: RegionDescriptor) -> TcpPayload:
    try:
        payload = msgspec.msgpack.decode(remote.payload, type=TcpPayload)
    except (msgspec.MsgspecError, ValueError) as error:
        raise TransferError(f"unusable descriptor of {remote.owner}: {error}") from error
    sound = len(payload.token) == wire.TOKEN_BYTES and 0 < payload.port < 1 << 16 and is_host(payload.host)
    if not sound or remote.nbytes >= 1 << 64:
        raise TransferError(f"unusable descriptor of {remote.owner}")
    return payload

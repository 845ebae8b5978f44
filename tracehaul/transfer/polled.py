"""A transport over an agent that one thread polls: what NIXL and UCXX have in common."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from tracehaul.runtime import clock
from tracehaul.transfer import notes
from tracehaul.transfer.base import Copy, Memory, Region, TransferTimedOut
from tracehaul.transfer.exchange import Agent
from tracehaul.transfer.landing import check_copies, land
from tracehaul.transfer.lanes import Movement, Way
from tracehaul.transfer.memory import address_of
from tracehaul.transfer.notes import AgentPayload
from tracehaul.transfer.poller import Poller
from tracehaul.transfer.region import Registered
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError

TRANSFERS_MAX = 4096
"""Most transfers of one process at once, quarantined ones included."""


class AgentRegion(Registered):
    """Memory registered with an agent."""

    def __init__(self, buffer: memoryview, descriptor: RegionDescriptor, payload: AgentPayload) -> None:
        super().__init__(buffer, descriptor)
        self.payload = payload


class PolledTransfer:
    """The transport of ``owner`` over the agent that ``make_agent`` makes; see :class:`.base.Transfer`."""

    def __init__(self, kind: str, owner: str, read_way: Way, make_agent: Callable[[], Agent]) -> None:
        """Blocks until the agent is there.

        Raises:
            TransferError: it cannot be made.
        """
        self._kind = kind
        self._owner = owner
        self._read_way: Way = read_way
        self._poller = Poller(f"{kind}-{owner}", make_agent)
        self._under_way = 0
        self._quarantined_bytes = 0

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def quarantined_bytes(self) -> int:
        """Local bytes of transfers past their deadline that may still be read or written by the network."""
        return self._quarantined_bytes

    @property
    def dropped(self) -> int:
        """Notifications from peers that made no sense."""
        return self._poller.exchange.dropped

    def register(self, memory: Memory) -> AgentRegion:
        buffer = memory.buffer
        address = address_of(buffer)
        payload = self._poller.ask(lambda exchange: exchange.register(address, buffer.nbytes))
        descriptor = RegionDescriptor(
            kind=self.kind, owner=self._owner, nbytes=buffer.nbytes, payload=notes.pack(payload)
        )
        return AgentRegion(buffer, descriptor, payload)

    def reaches(self, remote: RegionDescriptor) -> bool:
        return remote.kind == self.kind

    async def read(self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float) -> None:
        await self._transfer(self._read_way, remote, local, copies, timeout_s)

    async def write(self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float) -> None:
        await self._transfer("write", remote, local, copies, timeout_s)

    async def _transfer(
        self, way: Way, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], timeout_s: float
    ) -> None:
        assert isinstance(local, AgentRegion), "a transport moves only what it registered"
        if remote.kind != self.kind:
            raise TransferError(f"a {remote.kind} region is not reachable by {self.kind}")
        if remote.owner == self._owner:
            raise TransferError(f"{remote.owner} is this process")
        theirs = notes.unpack_payload(remote)
        nbytes = check_copies(copies, local.buffer.nbytes, remote.nbytes)
        if self._under_way >= TRANSFERS_MAX:
            raise TransferError(f"{TRANSFERS_MAX} transfers are under way; no more")
        loop = asyncio.get_running_loop()
        work: asyncio.Future[None] = loop.create_future()
        over = partial(_over, loop, work)
        movement = Movement(way, remote.owner, theirs, local.payload, tuple(copies), over)
        self._poller.submit(lambda exchange: exchange.start(movement, clock.perf_s()))
        self._under_way += 1
        work.add_done_callback(self._ended)
        what = f"{nbytes} bytes {'to' if way == 'write' else 'from'} {remote.owner}"
        try:
            await land(work, timeout_s, what, lambda: self._give_up(movement))
        except TransferTimedOut as error:
            self._quarantined_bytes += nbytes
            error.settled.add_done_callback(partial(self._settled, nbytes))
            raise

    def _give_up(self, movement: Movement) -> None:
        with contextlib.suppress(TransferError):  # the poller has ended, and the transfer with it
            self._poller.submit(lambda exchange: exchange.give_up(movement))

    def _ended(self, work: asyncio.Future[None]) -> None:
        self._under_way -= 1

    def _settled(self, nbytes: int, settled: asyncio.Future[None]) -> None:
        self._quarantined_bytes -= nbytes

    async def broken(self) -> None:
        # Shielded: to stop waiting must not cancel what the thread will set.
        await asyncio.shield(asyncio.wrap_future(self._poller.ended))

    async def close(self) -> None:
        self._poller.stop()
        await asyncio.to_thread(self._poller.join)


def _over(loop: asyncio.AbstractEventLoop, work: asyncio.Future[None], error: TransferError | None) -> None:
    """Called by the poller: hand the outcome to the loop, if it still runs."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_resolve, work, error)


def _resolve(work: asyncio.Future[None], error: TransferError | None) -> None:
    assert not work.done(), "a transfer ends once"
    if error is None:
        work.set_result(None)
    else:
        work.set_exception(error)

"""The network and the copies between simulated nodes, as the weather has them."""

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from sim.faults import Weather
from sim.loop import PROCESS
from sim.slot_checker import SlotChecker
from tracehaul.runtime import clock
from tracehaul.transfer.base import Copy, Memory, Region
from tracehaul.transfer.local import Landing, LocalTransfer
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.ids import NodeId

COPY_GIVES_UP_S = 3.0
"""A reliable transport retries a copy over a cut link for so long; then it is lost."""

_ON_LANDING: ContextVar[Callable[[], None] | None] = ContextVar("on_landing", default=None)


def node_of(name: str) -> NodeId:
    """The node behind an address (``node:port``) or an owner (``node#generation``)."""
    return NodeId(name.partition("#")[0].partition(":")[0])


class FrameLink:
    """Implements :class:`tracehaul.rpc.local.Link`: late frames, none lost on a connection that lives."""

    def __init__(self, weather: Weather) -> None:
        self._weather = weather

    def delays(self, source: str, target: str, kind: str) -> Sequence[float]:
        a, b = node_of(source), node_of(target)
        return (self._weather.frame_delay_s(a, b) + self._weather.cut_s(a, b, clock.now_s()),)


class CopyLink:
    """Implements :class:`tracehaul.transfer.local.Link`: late, lost and corrupted copies."""

    def __init__(self, weather: Weather, alive: Callable[[str], bool]) -> None:
        self._weather = weather
        self._alive = alive

    async def carry(self, source: str, target: str, nbytes: int) -> Landing:
        PROCESS.set("")  # a one-sided copy goes on without the processes at its ends
        a, b = node_of(source), node_of(target)
        cut_s = self._weather.cut_s(a, b, clock.now_s())
        lost = self._weather.copy_lost() or cut_s > COPY_GIVES_UP_S
        flipped = self._weather.flipped_byte(nbytes)
        await asyncio.sleep(self._weather.copy_delay_s(a, b) + min(cut_s, COPY_GIVES_UP_S))
        if not self._alive(source) and not self._alive(target):
            await asyncio.get_running_loop().create_future()  # nobody is left to tell
        on_landing = _ON_LANDING.get()
        if on_landing is not None and not lost:
            on_landing()
        return Landing(lost=lost, flipped_byte=flipped)


class WatchedTransfer:
    """A node's :class:`LocalTransfer`, with every copy that touches a store's arena entered in that store's ledger."""

    def __init__(self, inner: LocalTransfer, address: str, ledgers: dict[str, SlotChecker]) -> None:
        self._inner = inner
        self._address = address
        self._ledgers = ledgers

    @property
    def kind(self) -> str:
        return self._inner.kind

    def register(self, memory: Memory) -> Region:
        return self._inner.register(memory)

    def reaches(self, remote: RegionDescriptor) -> bool:
        return self._inner.reaches(remote)

    async def read(self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float) -> None:
        ledger = self._ledgers.get(remote.owner)
        if ledger is not None:
            ledger.reading(self._address, [copy.remote_offset for copy in copies])
        await self._inner.read(remote, local, copies, timeout_s=timeout_s)

    async def write(self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float) -> None:
        ledger = self._ledgers.get(remote.owner)
        offsets = [copy.remote_offset for copy in copies]
        grants = ledger.grants(self._address, offsets) if ledger is not None else []

        def landing() -> None:
            if ledger is not None:
                ledger.written(self._address, offsets, grants)

        token = _ON_LANDING.set(landing)
        try:
            await self._inner.write(remote, local, copies, timeout_s=timeout_s)
        finally:
            _ON_LANDING.reset(token)

    async def broken(self) -> None:
        await self._inner.broken()

    async def close(self) -> None:
        await self._inner.close()


class SimMemory:
    """Plain bytes as :class:`tracehaul.transfer.base.Memory`."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = memoryview(bytearray(nbytes))

    @property
    def buffer(self) -> memoryview:
        return self._buffer

    @property
    def fd(self) -> int:
        """There is none: nothing in the simulator maps it."""
        raise AssertionError("simulated memory has no file")

    def close(self) -> None:
        pass

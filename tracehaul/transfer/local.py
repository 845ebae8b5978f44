"""Transfers inside one process: for tests and for the simulator. Asyncio only, no threads."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tracehaul.transfer.base import Copy, Memory, Region
from tracehaul.transfer.landing import check_copies, land
from tracehaul.transfer.region import Registered
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError, TransferLost


class Landing(msgspec.Struct, frozen=True):
    """How one transfer ended on the link."""

    lost: bool = False
    """The peer is gone: nothing landed, and nothing will."""
    flipped_byte: int | None = None
    """Bytes landed, with this one of them (counted over the whole transfer, modulo its size) wrong."""


class Link(Protocol):
    """What lies between two processes; the seam for faults."""

    async def carry(self, source: str, target: str, nbytes: int) -> Landing:
        """Return when the bytes of one transfer arrive, or are known lost.

        Called once per transfer that moves anything, from ``source`` (whose bytes are read) to ``target``, both
        ``node#generation``. Taking longer than the transfer's deadline is a late landing; never returning is a
        peer frozen for good. The bytes are copied at the moment it returns, as they are then.
        """
        ...


class PerfectLink:
    """Everything arrives at once."""

    async def carry(self, source: str, target: str, nbytes: int) -> Landing:
        await asyncio.sleep(0)
        return Landing()


class LocalHub:
    """All the memory that the transfers of one process can reach, and the link between them."""

    def __init__(self, link: Link | None = None) -> None:
        self.link: Link = link or PerfectLink()
        self._regions: dict[str, dict[bytes, Registered]] = {}
        self._gone: set[str] = set()

    def add(self, owner: str, memory: Memory) -> Registered:
        """Make memory reachable as ``owner``'s."""
        assert owner not in self._gone, f"{owner} is gone; a new life has a new generation"
        regions = self._regions.setdefault(owner, {})
        payload = len(regions).to_bytes(4, "little")
        descriptor = RegionDescriptor(kind="local", owner=owner, nbytes=memory.buffer.nbytes, payload=payload)
        regions[payload] = Registered(memory.buffer, descriptor)
        return regions[payload]

    def remove(self, owner: str) -> None:
        """``owner``'s process is gone: every transfer with it that has not landed is lost."""
        self._regions.pop(owner, None)
        self._gone.add(owner)

    def gone(self, owner: str) -> bool:
        """Whether ``owner`` lived in this process and does no more."""
        return owner in self._gone

    def knows(self, owner: str) -> bool:
        """Whether ``owner`` lives, or lived, in this process."""
        return owner in self._regions or owner in self._gone

    def find(self, remote: RegionDescriptor) -> Registered:
        """The region that a descriptor names.

        Raises:
            TransferLost: its owner is gone.
            TransferError: there never was one.
        """
        if remote.owner in self._gone:
            raise TransferLost(f"{remote.owner} is gone")
        region = self._regions.get(remote.owner, {}).get(remote.payload)
        if region is None or region.descriptor != remote:
            raise TransferError(f"unknown region of {remote.owner}")
        return region


class LocalTransfer:
    """The in-process transport of ``owner``; see :class:`tracehaul.transfer.base.Transfer`."""

    def __init__(self, owner: str, hub: LocalHub) -> None:
        self._owner = owner
        self._hub = hub
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def kind(self) -> str:
        return "local"

    def register(self, memory: Memory) -> Registered:
        return self._hub.add(self._owner, memory)

    def reaches(self, remote: RegionDescriptor) -> bool:
        return remote.kind == self.kind and self._hub.knows(remote.owner)

    async def read(self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float) -> None:
        await self._transfer(remote, local, copies, timeout_s, inward=True)

    async def write(self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float) -> None:
        await self._transfer(remote, local, copies, timeout_s, inward=False)

    async def _transfer(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], timeout_s: float, *, inward: bool
    ) -> None:
        if remote.kind != self.kind:
            raise TransferError(f"a {remote.kind} region is not reachable by {self.kind}")
        if self._hub.gone(self._owner):
            raise TransferLost("this side closed its transport")
        self._hub.find(remote)
        nbytes = check_copies(copies, local.buffer.nbytes, remote.nbytes)
        if nbytes == 0:
            return
        work = asyncio.create_task(self._carry(remote, local.buffer, tuple(copies), nbytes, inward))
        self._tasks.add(work)
        work.add_done_callback(self._tasks.discard)
        await land(work, timeout_s, f"{nbytes} bytes {'from' if inward else 'to'} {remote.owner}", lambda: None)

    async def _carry(
        self, remote: RegionDescriptor, ours: memoryview, copies: tuple[Copy, ...], nbytes: int, inward: bool
    ) -> None:
        source, target = (remote.owner, self._owner) if inward else (self._owner, remote.owner)
        landing = await self._hub.link.carry(source, target, nbytes)
        theirs = self._hub.find(remote).buffer
        if landing.lost:
            raise TransferLost(f"{remote.owner} is gone")
        flipped = None if landing.flipped_byte is None else landing.flipped_byte % nbytes
        for local_offset, remote_offset, size in copies:
            mine, other = ours[local_offset : local_offset + size], theirs[remote_offset : remote_offset + size]
            landed, sent = (mine, other) if inward else (other, mine)
            landed[:] = sent
            if flipped is not None:
                if 0 <= flipped < size:
                    landed[flipped] ^= 0xFF
                flipped -= size

    async def broken(self) -> None:
        await asyncio.get_running_loop().create_future()  # nothing here can end by itself

    async def close(self) -> None:
        """End all transfers: waiting callers get TransferLost. Peers see this owner's regions gone."""
        self._hub.remove(self._owner)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

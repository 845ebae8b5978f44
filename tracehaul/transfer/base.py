"""The data plane's interface: every implementation passes ``tests/contract/test_transfer.py``."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError
from tracehaul.wire.ids import Checksum


class Copy(NamedTuple):
    """One contiguous piece of a transfer, in bytes from the start of each region."""

    local_offset: int
    remote_offset: int
    nbytes: int


class TransferTimedOut(TransferError):
    """The deadline passed with bytes still under way: they may land later.

    Until ``settled`` is done, the local ranges of the transfer must not be reused for anything: a late read may
    still write into them, a late write may still read from them.
    """

    code = "transfer_timeout"

    def __init__(self, message: str, settled: asyncio.Future[None]) -> None:
        super().__init__(message)
        self.settled = settled


class Region(Protocol):
    """Memory of this process that a transport can read and write."""

    @property
    def buffer(self) -> memoryview:
        """The bytes: flat, writable, format ``B``."""
        ...

    @property
    def descriptor(self) -> RegionDescriptor:
        """What peers need to reach it."""
        ...


class Memory(Protocol):
    """Pre-faulted page-aligned memory that any transport can register; see :mod:`tracehaul.transfer.memory`."""

    @property
    def buffer(self) -> memoryview:
        """The bytes: flat, writable, format ``B``."""
        ...

    @property
    def fd(self) -> int:
        """Its memory file: another process of this host can map it."""
        ...

    def close(self) -> None:
        """Give it back. No region of it may be in use."""
        ...


class Transfer(Protocol):
    """One transport of one process.

    A cancelled transfer cannot call its bytes back: it ends, with CancelledError, once they have settled, or at its
    deadline with TransferTimedOut.
    """

    @property
    def kind(self) -> str:
        """``local``, ``shm``, ``tcp``, ``nixl`` or ``ucxx``."""
        ...

    def register(self, memory: Memory) -> Region:
        """Make memory reachable by peers."""
        ...

    def reaches(self, remote: RegionDescriptor) -> bool:
        """Whether the descriptor names a place this transport can get to, as far as that shows without trying."""
        ...

    async def read(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> Sequence[Checksum] | None:
        """Copy bytes of a peer's region into ours. On return they have landed.

        No copies at all make the way there, so that the next transfer pays for no handshake and no mapping.

        Returns the checksum of our bytes of each copy, of all bytes as they were stored there, from a transport that
        touches them anyway; None from one that does not: whoever needs checksums then computes them.

        Raises:
            TransferTimedOut: see there. The peer may be frozen or cut off.
            TransferLost: the peer's process is gone; nothing lands any more.
            TransferError: a range is outside a region, or the descriptor is unusable.
        """
        ...

    async def write(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> Sequence[Checksum] | None:
        """Copy our bytes into a peer's region. On return they have landed there.

        Returns the checksum of each copy's bytes as they were stored in the peer's region, from a transport that
        stores them itself or is told by who does; None from one that cannot: whoever takes the bytes then has to
        verify them.

        Raises:
            TransferError: also where what was stored is not what was sent. Otherwise as :meth:`read`.
        """
        ...

    async def broken(self) -> None:
        """Wait until this transport can transfer no more through a fault of its own, and raise it: a process that
        answers for its memory ends on that. Returns, if at all, only after :meth:`close`."""
        ...

    async def close(self) -> None:
        """End all transfers (waiting callers get TransferLost), forget all peers. Buffers stay valid here."""
        ...

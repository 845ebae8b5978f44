"""Transfers between processes of one host: map the peer's memory file, then copy.

A frozen peer does not matter here: its memory answers for it. A dead one does: what it promised about its bytes
(leases, publication) died with it, so a transfer with a dead owner is lost even though the pages are still there.
"""

import asyncio
import contextlib
import mmap
import os
import select
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Copy, Memory, Region
from tracehaul.transfer.copy_jobs import Bytes, CopyJob, job_of
from tracehaul.transfer.copying import compiled_here
from tracehaul.transfer.landing import land
from tracehaul.transfer.memory import is_memory_file, populate
from tracehaul.transfer.region import Registered
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError, TransferLost
from tracehaul.wire.ids import Checksum

DYING_MS = 200
"""How long a process whose memory file cannot be opened is given to turn out to be dying."""
MAPPINGS_MAX = 1024
"""Most regions of peers mapped at once."""


class ShmPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a memory file is, and enough to tell that it is still the same one."""

    host: str
    """Boot id and pid namespace: where ``pid`` means something."""
    pid: int
    started: int
    """The process's start in clock ticks since boot: a pid is used again, the pair is not."""
    fd: int
    link: str
    """The file's name, with its random part: a descriptor number is used again, this is not."""


class _Mapping:
    """A peer's region in our address space, and a watch on the process that answers for it."""

    def __init__(self, remote: RegionDescriptor, payload: ShmPayload) -> None:
        """Blocks for as long as the kernel needs to map the pages. Raises as :meth:`.base.Transfer.read`."""
        self.owner = remote.owner
        with contextlib.ExitStack() as undo:
            self._pidfd = _watch(remote.owner, payload)
            undo.callback(os.close, self._pidfd)
            try:
                self.array = _map(remote, payload)
            except TransferError as error:
                # A process that dies closes its files some time before its pidfd says that it is dead.
                if _readable(self._pidfd, wait_ms=DYING_MS):
                    raise TransferLost(f"{remote.owner} is gone") from error
                raise
            undo.pop_all()

    @property
    def pidfd(self) -> int:
        """Becomes readable when the owner exits."""
        return self._pidfd

    def check_alive(self) -> None:
        """Raise TransferLost from the moment the owner has exited."""
        if self._pidfd < 0 or _readable(self._pidfd):
            raise TransferLost(f"{self.owner} is gone")

    def close(self) -> None:
        """Unmap, once copies under way have ended, and stop watching."""
        self.array = np.zeros(0, dtype=np.uint8)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class ShmTransfer:
    """The shared-memory transport of ``owner``; copies run in ``offload``. See :class:`.base.Transfer`.

    Raises:
        TransferError: this process cannot tell which host it is on.
    """

    def __init__(self, owner: str, offload: Offload) -> None:
        self._owner = owner
        self._offload = offload
        try:
            self._host = host_identity()
        except OSError as error:
            raise TransferError(f"shared memory needs /proc: {error}") from error
        compiled_here()  # now, rather than while somebody waits for the first transfer
        self._mappings: dict[RegionDescriptor, asyncio.Future[_Mapping]] = {}
        self._jobs: dict[asyncio.Task[list[Checksum]], CopyJob] = {}
        self._closed = False

    @property
    def kind(self) -> str:
        return "shm"

    @property
    def mapped(self) -> int:
        """How many regions of peers are mapped now."""
        return len(self._mappings)

    def register(self, memory: Memory) -> Registered:
        """Raises TransferError where the memory has no file that a peer could map."""
        if memory.fd < 0:
            raise TransferError("this memory has no file to share")
        pid = os.getpid()
        started = _started(pid)
        assert started is not None
        link = os.readlink(f"/proc/self/fd/{memory.fd}")
        payload = ShmPayload(host=self._host, pid=pid, started=started, fd=memory.fd, link=link)
        descriptor = RegionDescriptor(
            kind=self.kind, owner=self._owner, nbytes=memory.buffer.nbytes, payload=msgspec.msgpack.encode(payload)
        )
        return Registered(memory.buffer, descriptor)

    def reaches(self, remote: RegionDescriptor) -> bool:
        """Whether the very file can be seen from here: hosts that were cloned look alike, and a peer on this one may be
        another user's."""
        if remote.kind != self.kind:
            return False
        try:
            payload = _unpack(remote)
            return payload.host == self._host and os.readlink(f"/proc/{payload.pid}/fd/{payload.fd}") == payload.link
        except (TransferError, OSError, ValueError):
            return False

    async def read(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> list[Checksum]:
        return await self._transfer(remote, local, copies, timeout_s, inward=True)

    async def write(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> list[Checksum]:
        return await self._transfer(remote, local, copies, timeout_s, inward=False)

    async def _transfer(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], timeout_s: float, *, inward: bool
    ) -> list[Checksum]:
        if self._closed:
            raise TransferLost("this side closed its transport")
        if remote.kind != self.kind:
            raise TransferError(f"a {remote.kind} region is not reachable by {self.kind}")
        job, nbytes = job_of(local, remote.nbytes, copies, inward=inward)
        work = asyncio.create_task(self._run(remote, job))
        self._jobs[work] = job
        work.add_done_callback(self._jobs.pop)
        return await land(work, timeout_s, f"{nbytes} bytes {'from' if inward else 'to'} {remote.owner}", job.stop)

    async def _run(self, remote: RegionDescriptor, job: CopyJob) -> list[Checksum]:
        mapping = await self._mapping(remote)
        mapping.check_alive()
        await self._offload.turns(*job.work(mapping.array))
        if job.stopped:
            raise TransferLost(f"transfer with {remote.owner} was given up")
        # A read that outlived its owner is not a read: nobody vouches for the bytes.
        mapping.check_alive()
        return job.sums()

    async def _mapping(self, remote: RegionDescriptor) -> _Mapping:
        """The mapping of a region, made by the first that asks and awaited by the others."""
        known = self._mappings.get(remote)
        if known is not None:
            return await asyncio.shield(known)
        payload = _unpack(remote)
        if payload.host != self._host:
            raise TransferError(f"{remote.owner} is on another host")
        if len(self._mappings) >= MAPPINGS_MAX:
            raise TransferError(f"{MAPPINGS_MAX} regions are mapped; no more")
        making = asyncio.ensure_future(self._offload.run(partial(_Mapping, remote, payload)))
        self._mappings[remote] = making
        making.add_done_callback(partial(self._mapped, remote))
        return await asyncio.shield(making)

    def _mapped(self, remote: RegionDescriptor, made: "asyncio.Future[_Mapping]") -> None:
        if made.cancelled() or made.exception() is not None:
            self._mappings.pop(remote, None)
        elif self._closed:
            made.result().close()
        else:
            asyncio.get_running_loop().add_reader(made.result().pidfd, self._forget, remote)

    def _forget(self, remote: RegionDescriptor) -> None:
        """Unmap a region: its owner exited, or we close."""
        made = self._mappings.pop(remote)
        if made.done():
            asyncio.get_running_loop().remove_reader(made.result().pidfd)
            made.result().close()

    async def broken(self) -> None:
        await asyncio.get_running_loop().create_future()  # nothing here can end by itself

    async def close(self) -> None:
        self._closed = True
        for job in self._jobs.values():
            job.stop()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        for remote in list(self._mappings):
            self._forget(remote)


def host_identity() -> str:
    """Equal in two processes if and only if a pid of one means the same process in the other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _unpack(remote: RegionDescriptor) -> ShmPayload:
    try:
        return msgspec.msgpack.decode(remote.payload, type=ShmPayload)
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: a key that is not UTF-8
        raise TransferError(f"unusable descriptor of {remote.owner}: {error}") from error


def _watch(owner: str, payload: ShmPayload) -> int:
    """A pidfd of the very process that made the payload."""
    try:
        pidfd = os.pidfd_open(payload.pid)
    except (OSError, ValueError, OverflowError) as error:
        raise TransferLost(f"{owner} is gone: no process {payload.pid}") from error
    # Asked only now that the pidfd holds the process, so the answer is about the process it holds.
    if _started(payload.pid) != payload.started or _readable(pidfd):
        os.close(pidfd)
        raise TransferLost(f"{owner} is gone: process {payload.pid} is another one")
    return pidfd


def _map(remote: RegionDescriptor, payload: ShmPayload) -> Bytes:
    try:
        fd = os.open(f"/proc/{payload.pid}/fd/{payload.fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransferError(f"memory of {remote.owner} cannot be opened: {error.strerror}") from error
    try:
        if os.readlink(f"/proc/self/fd/{fd}") != payload.link:
            raise TransferError(f"memory of {remote.owner} is not the file it was")
        if not is_memory_file(fd):  # a descriptor is a peer's word: it must not make us write to any file at all
            raise TransferError(f"what {remote.owner} offers is no memory file")
        if not 0 < remote.nbytes <= os.fstat(fd).st_size:
            raise TransferError(f"memory of {remote.owner} has not {remote.nbytes} bytes")
        mapped = mmap.mmap(fd, remote.nbytes)
        populate(memoryview(mapped))
        return np.frombuffer(mapped, dtype=np.uint8)
    except (OSError, ValueError, OverflowError) as error:
        raise TransferError(f"memory of {remote.owner} cannot be mapped: {error}") from error
    finally:
        os.close(fd)


def _readable(fd: int, wait_ms: int = 0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(wait_ms))


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may hold spaces; start time is the 22nd.
    return int(stat.rpartition(")")[2].split()[19])

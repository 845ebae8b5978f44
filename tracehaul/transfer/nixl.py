"""Transfers between hosts by NIXL over UCX. The only module that imports nixl, and the one that knows its errors.

What shapes this file, all of it observed: releasing a handle does not cancel it, so bytes may land long after a
deadline and their ranges stay quarantined until the handle ends; a frozen peer shows in nothing but a deadline; an
agent used from two threads crashes, so one thread (:mod:`.poller`) alone touches it; the library's own progress
thread, if given a delay, waits for events instead of burning a core, and also serves this side while Python is busy.

Which networks are used is the operator's choice by UCX's own variables (UCX_TLS, UCX_NET_DEVICES).
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from tracehaul.transfer.devices import rdma_devices, rdma_in_use
from tracehaul.transfer.exchange import NameTaken, Waking
from tracehaul.transfer.notes import Triples
from tracehaul.transfer.polled import PolledTransfer
from tracehaul.wire.errors import TransferError, TransferLost

PROGRESS_DELAY_US = 100_000
"""How long the library's progress thread waits for events at most; with 0 it would spin."""
NO = ("n", "no", "0", "off", "false")
METADATA_HEAD = b"nixlSerDes|Agent"
"""How an agent's metadata begins; then the length of its name in 8 bytes, then its name."""

Pull = Literal["read", "request"]
"""How to read from a peer: by a one-sided read, or by asking it to write, which over TCP is twice as fast."""


class NixlAgent:
    """:class:`.exchange.Agent` by NIXL's bindings; made, used and closed by one thread."""

    def __init__(self, name: str) -> None:
        self._nixl: Any = _bindings()
        self._errors: tuple[type[Exception], ...] = tuple(
            error
            for key, error in vars(self._nixl).items()
            if key.startswith("nixl") and key.endswith("Error") and isinstance(error, type)
        )
        self._disconnected: type[Exception] = self._nixl.nixlRemoteDisconnectError
        self._registered: list[Any] = []
        self._known: set[str] = set()
        # The library's own constructor fixes the delay at 0 (a core burnt) and the sync mode at none.
        self.config = self._nixl.nixlAgentConfig()
        self.config.useProgThread = True
        self.config.useListenThread = False
        self.config.pthrDelay = PROGRESS_DELAY_US
        self.config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        before = _event_fds()
        try:
            self._agent = self._nixl.nixlAgent(name, self.config)
            self._backends = [self._agent.createBackend("UCX", {})]
        except self._errors as error:
            raise TransferError(f"NIXL cannot start: {error}") from error
        # UCX waits for its events in descriptors of its own, which NIXL does not give out. They are only a hint:
        # one too many costs a look in vain, one too few a longer nap. Copies, so that closing stays its business.
        self._wake_fds = [os.dup(fd) for fd in sorted(_event_fds() - before)]

    @property
    def strict(self) -> bool:
        """Whether the library guards itself against its own progress thread."""
        return self.config.syncMode == self._nixl.NIXL_THREAD_SYNC_STRICT

    @property
    def wake_fds(self) -> Sequence[int]:
        return self._wake_fds

    def arm(self) -> Waking:
        return "unknown"  # its descriptors are nearly always readable while things happen

    def register(self, address: int, nbytes: int) -> bytes:
        regions = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, nbytes, 0, "")])
        self._translated("register", self._agent.registerMem, regions, self._backends)
        self._registered.append(regions)
        return self._translated("describe", self._agent.getLocalMD)

    def add_peer(self, name: str, metadata: bytes) -> None:
        claimed = named_in(metadata)
        if claimed is not None and claimed != name:
            raise TransferError(f"metadata of {claimed} under the name of {name}")
        loaded = self._load(metadata)  # NIXL itself refuses another connection for a name that it knows
        if loaded != name:
            if loaded not in self._known:
                self.remove_peer(loaded)
            raise TransferError(f"metadata of {loaded} under the name of {name}")
        self._known.add(name)

    def _load(self, metadata: bytes) -> str:
        try:
            name: bytes = self._translated("connect", self._agent.loadRemoteMD, metadata)
        except TransferError as error:
            if isinstance(error.__cause__, self._nixl.nixlBackendError):
                raise TransferLost("NIXL connect: nobody is there") from error
            if isinstance(error.__cause__, self._nixl.nixlNotAllowedError):
                raise NameTaken("NIXL connect: another peer has that name") from error
            raise
        return name.decode(errors="replace")

    def remove_peer(self, name: str) -> None:
        self._known.discard(name)
        with contextlib.suppress(*self._errors):
            self._agent.invalidateRemoteMD(name)

    def post(self, way: Literal["read", "write"], peer: str, ours: Triples, theirs: Triples, note: bytes) -> int:
        nixl = self._nixl
        op = nixl.NIXL_READ if way == "read" else nixl.NIXL_WRITE
        local, remote = nixl.nixlXferDList(nixl.DRAM_SEG, ours), nixl.nixlXferDList(nixl.DRAM_SEG, theirs)
        handle: int = self._translated(way, self._agent.createXferReq, op, local, remote, peer, note, self._backends)
        try:
            self._translated(way, self._agent.postXferReq, handle, note)
        except TransferError:
            self.release(handle)
            raise
        return handle

    def poll(self, handle: int) -> bool:
        status = self._translated("transfer", self._agent.getXferStatus, handle)
        if status == self._nixl.NIXL_IN_PROG:
            return False
        if status != self._nixl.NIXL_SUCCESS:
            raise TransferError(f"NIXL transfer ended with {status}")
        return True

    def release(self, handle: int) -> None:
        with contextlib.suppress(*self._errors):
            self._agent.releaseXferReq(handle)

    def notify(self, peer: str, note: bytes) -> None:
        self._translated("notify", self._agent.genNotif, peer, note, self._backends)

    def heard(self) -> list[tuple[str, bytes]]:
        heard: dict[str, list[bytes]] = self._translated("listen", self._agent.getNotifs, {}, self._backends)
        return [(peer, data) for peer, several in heard.items() for data in several]

    def close(self) -> None:
        for regions in self._registered:
            with contextlib.suppress(*self._errors):
                self._agent.deregisterMem(regions, self._backends)
        del self._agent
        for fd in self._wake_fds:
            os.close(fd)

    def _translated(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._disconnected as error:
            raise TransferLost(f"NIXL {what}: the peer is gone") from error
        except self._errors as error:
            raise TransferError(f"NIXL {what}: {error}") from error


class NixlTransfer(PolledTransfer):
    """The NIXL transport of ``owner`` (``node#generation``, the agent's name). See :class:`.base.Transfer`."""

    def __init__(self, owner: str, pull: Pull | None = None) -> None:
        """Blocks for about half a second while UCX looks at the machine.

        Args:
            owner: Never used twice in the life of the cluster.
            pull: How to read; by default what suits the networks that UCX may use.

        Raises:
            TransferError: NIXL is not installed or cannot start.
        """
        # UCX reads these variables itself: they are its configuration, not ours, and we must see what it sees.
        self.pull: Pull = pull or best_pull(os.environ, rdma_devices())
        harmful = harmful_setting(os.environ, self.pull)
        if harmful is not None:
            raise TransferError(f"NIXL cannot be used with {harmful}")
        super().__init__("nixl", owner, "pull" if self.pull == "request" else "read", partial(NixlAgent, owner))


def best_pull(environ: Mapping[str, str], devices: frozenset[str]) -> Pull:
    """One-sided reads where UCX may use RDMA on one of the machine's ``devices``, requests over anything else."""
    return "read" if rdma_in_use(environ, devices) else "request"


def harmful_setting(environ: Mapping[str, str], pull: Pull) -> str | None:
    """A variable of UCX that breaks NIXL, and how; None if there is none. Both were seen to."""
    if environ.get("UCX_PROTO_ENABLE", "y").lower() in NO:
        return "UCX_PROTO_ENABLE=n: every transfer fails"
    if pull == "request" and environ.get("UCX_TCP_PUT_ENABLE", "y").lower() in NO:
        return "UCX_TCP_PUT_ENABLE=n: UCX then aborts the process when a connection breaks"
    return None


def named_in(metadata: bytes) -> str | None:
    """Whose metadata it says it is, without loading it; None if this version of NIXL writes it in another way."""
    if not metadata.startswith(METADATA_HEAD):
        return None
    start = len(METADATA_HEAD) + 8
    nbytes = int.from_bytes(metadata[len(METADATA_HEAD) : start], "little")
    return metadata[start : start + nbytes].decode(errors="replace")


def _bindings() -> Any:
    """NIXL's native module.

    Only host memory goes through here, so any build of NIXL will do. Asking the ``nixl`` package for the one that
    suits this machine's CUDA imports all of torch, where torch is a CPU build: a second, and 190 MiB per process.
    """
    for package in ("nixl_cu13", "nixl_cu12", "nixl"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(package)._bindings
    raise TransferError("NIXL is not installed: pip install tracehaul-store[nixl]")


def _event_fds() -> set[int]:
    """This process's epoll descriptors."""
    fds: set[int] = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventpoll]":
                fds.add(int(fd))
    return fds

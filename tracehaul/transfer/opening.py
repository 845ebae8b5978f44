"""The transports that a config may name, opened and given a process's memory."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Memory
from tracehaul.transfer.network import Opened, open_best, open_nixl, open_tcp, open_ucxx
from tracehaul.transfer.place import Place
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.tcp_proof import Guard
from tracehaul.wire.errors import TransferError

log = Log(__name__)

Kind = Literal["auto", "shm", "tcp", "nixl", "ucxx"]
"""``auto`` is what suits this host's network; ``nixl`` is UCXX's where NIXL is not installed."""


class Planes(NamedTuple):
    """Ways between a process's memory and its peers'."""

    planes: tuple[Plane, ...]
    how: tuple[str, ...]
    """A line for each kind that was asked for: which transport, where, and why; or why there is none."""

    async def close(self) -> None:
        """End them all."""
        for plane in self.planes:
            await plane.transfer.close()


async def open_planes(
    kinds: Sequence[str],
    owner: str,
    place: Place,
    memory: Memory,
    offload: Offload,
    guard: Guard | None = None,
) -> Planes:
    """Transports of ``owner`` over ``memory``; each pair of processes takes the nearest that both have.

    One that cannot serve here is left out, aloud.

    Raises:
        TransferError: none can, or there is none of that kind.
        OSError: no peer could reach this process at ``place``, as its port is taken, say.
    """
    planes: list[Plane] = []
    how: list[str] = []
    for kind in kinds:
        opened: Opened | None = None
        try:
            opened = open_transport(kind, owner, place, offload, guard)
            planes.append(Plane(opened.transfer, opened.transfer.register(memory)))
        except TransferError as error:
            how.append(f"no {kind}: {error}")
            log.error("a transport cannot serve", kind=kind, why=str(error))
            if opened is not None:
                await opened.transfer.close()
        except OSError:
            await Planes(tuple(planes), ()).close()
            raise
        else:
            how.append(opened.how)
            log.info("transport", kind=kind, how=opened.how)
    if not planes:
        raise TransferError("; ".join(how))
    return Planes(tuple(planes), tuple(how))


def open_transport(kind: str, owner: str, place: Place, offload: Offload, guard: Guard | None = None) -> Opened:
    """The transport of ``owner`` at ``place``; imports only what it needs.

    ``guard``: of connections of ``tcp``; one that encrypts leaves no other transport between hosts.

    Raises:
        TransferError: it cannot start here, or there is none of that kind.
        OSError: no peer could reach this process at ``place``.
    """
    if guard is not None and guard.encrypted and kind in ("nixl", "ucxx"):
        raise TransferError(f'{kind} encrypts nothing: where [security] says data = "tls", take tcp or auto')
    match kind:
        case "auto" if guard is None or not guard.encrypted:
            return open_best(owner, place, guard)
        case "shm":
            from tracehaul.transfer.shm import ShmTransfer

            return Opened(ShmTransfer(owner, offload), "shm")
        case "tcp" | "auto":
            return open_tcp(owner, place, guard=guard)
        case "nixl":
            return open_nixl(owner, place)
        case "ucxx":
            return open_ucxx(owner, place)
        case _:
            raise TransferError(f"no transport is called {kind}")

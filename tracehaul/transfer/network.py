"""Which transport carries bytes between hosts, opened: the reason is kept with it."""

import importlib.util
import os
from typing import NamedTuple

from tracehaul.runtime.log import Log
from tracehaul.transfer.base import Transfer
from tracehaul.transfer.devices import (
    DEVICES,
    addresses_of,
    interfaces_here,
    rdma_devices,
    rdma_in_use,
    ucx_settings,
)
from tracehaul.transfer.place import Place
from tracehaul.transfer.tcp import TcpTransfer
from tracehaul.transfer.tcp_proof import Guard
from tracehaul.wire.errors import TransferError

log = Log(__name__)


class Opened(NamedTuple):
    """A transport that serves."""

    transfer: Transfer
    how: str
    """Which one, where, and why, for an operator: ``tcp 10.0.0.1:7101``."""


def open_best(owner: str, place: Place, guard: Guard | None = None) -> Opened:
    """NIXL's transport where UCX may use RDMA here, else that over TCP, which is faster without; ``guard`` is of that.

    Raises:
        OSError: nobody could reach this process at ``place``.
    """
    use_devices(place)
    rdma = rdma_in_use(os.environ, rdma_devices())
    if not rdma:
        return open_tcp(owner, place, "no RDMA device may be used", guard)
    if not installed("nixl_cu13", "nixl_cu12", "nixl"):
        return open_tcp(owner, place, f"NIXL, for RDMA by {', '.join(sorted(rdma))}, is not installed", guard)
    try:
        return open_nixl(owner, place)
    except TransferError as error:
        return open_tcp(owner, place, str(error), guard)


def open_tcp(owner: str, place: Place, why: str = "", guard: Guard | None = None) -> Opened:
    """The transport over TCP, plain or under that guard.

    Raises:
        OSError: nobody could reach this process at ``place``.
    """
    transfer = TcpTransfer(owner, place, guard)
    why = "; ".join(filter(None, (guard.word if guard is not None else "", why)))
    host = f"[{transfer.host}]" if ":" in transfer.host else transfer.host
    return Opened(transfer, f"tcp {host}:{transfer.port}" + (f" ({why})" if why else ""))


def open_nixl(owner: str, place: Place) -> Opened:
    """NIXL's transport of ``owner``, or UCXX's where NIXL is missing.

    Only a missing NIXL is replaced by it, not one that fails to start: by then its UCX is in this process, and a
    second one beside it crashes.

    Raises:
        TransferError: neither is installed, or the one that is cannot start.
    """
    if installed("nixl_cu13", "nixl_cu12", "nixl"):
        from tracehaul.transfer.nixl import NixlTransfer

        use_devices(place)
        nixl = NixlTransfer(owner)
        way = "by RDMA" if nixl.pull == "read" else "no RDMA device may be used"
        return Opened(nixl, f"nixl {_devices()} ({way})")
    if installed("ucxx"):
        return open_ucxx(owner, place, "NIXL is not installed")
    raise TransferError(
        "neither NIXL nor UCXX is installed: pip install tracehaul-store[nixl], or tracehaul-store[ucxx]"
    )


def open_ucxx(owner: str, place: Place, why: str = "") -> Opened:
    """UCXX's transport.

    Raises:
        TransferError: it is not installed, or cannot start.
    """
    from tracehaul.transfer.ucxx import UcxxTransfer

    use_devices(place)
    return Opened(UcxxTransfer(owner), f"ucxx {_devices()}" + (f" ({why})" if why else ""))


def use_devices(place: Place) -> None:
    """Tell UCX, in this process alone and before it is loaded, which devices it may use."""
    settings = ucx_settings(place, os.environ, interfaces_here(), addresses_of(place))
    if settings:
        os.environ.update(settings)
        log.info("UCX", **settings)


def installed(*packages: str) -> bool:
    """Whether one of them can be imported; imports none."""
    return any(importlib.util.find_spec(package) is not None for package in packages)


def _devices() -> str:
    """What UCX may use, as its variable has it."""
    listed = os.environ.get(DEVICES, "all")
    return f"on all but {listed.removeprefix('^')}" if listed.startswith("^") else f"on {listed}"

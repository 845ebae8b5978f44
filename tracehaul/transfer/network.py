"""Which transport carries bytes between hosts: NIXL where it is installed, else UCXX."""

import importlib.util

from tracehaul.runtime.log import Log
from tracehaul.transfer.base import Transfer
from tracehaul.wire.errors import TransferError

log = Log(__name__)


def open_network(owner: str) -> Transfer:
    """NIXL's transport of ``owner``, or UCXX's where NIXL is missing; the log says which, and why.

    Only a missing NIXL is replaced, not one that fails to start: by then its UCX is in this process, and a second
    one beside it crashes.

    Raises:
        TransferError: neither is installed, or the one that is cannot start.
    """
    if installed("nixl_cu13", "nixl_cu12", "nixl"):
        from tracehaul.transfer.nixl import NixlTransfer

        nixl = NixlTransfer(owner)
        how = "one-sided reads, by RDMA" if nixl.pull == "read" else "reads by request: no RDMA device may be used"
        log.info("transport", kind="nixl", why="installed", how=how)
        return nixl
    if installed("ucxx"):
        from tracehaul.transfer.ucxx import UcxxTransfer

        log.info("transport", kind="ucxx", why="NIXL is not installed")
        return UcxxTransfer(owner)
    raise TransferError(
        "neither NIXL nor UCXX is installed: pip install tracehaul-store[nixl], or tracehaul-store[ucxx]"
    )


def installed(*packages: str) -> bool:
    """Whether one of them can be imported; imports none."""
    return any(importlib.util.find_spec(package) is not None for package in packages)

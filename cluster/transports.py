"""The transports that a config may name, opened."""

from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Transfer
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.errors import TransferError

log = Log(__name__)

HOST = "127.0.0.1"
"""Every node listens on the loopback interface."""


def open_transport(kind: str, owner: str, offload: Offload) -> Transfer:
    """The transport of ``owner``; imports only what it needs.

    Raises:
        TransferError: it cannot start here, or there is none of that kind.
    """
    match kind:
        case "shm":
            log.info("transport", kind="shm", why="configured")
            return ShmTransfer(owner, offload)
        case "tcp":
            from tracehaul.transfer.tcp import TcpTransfer

            log.info("transport", kind="tcp", why="configured")
            return TcpTransfer(owner, HOST)
        case "nixl":
            from tracehaul.transfer.network import open_network

            return open_network(owner)
        case "ucxx":
            from tracehaul.transfer.ucxx import UcxxTransfer

            log.info("transport", kind="ucxx", why="configured")
            return UcxxTransfer(owner)
        case _:
            raise TransferError(f"no transport is called {kind}")

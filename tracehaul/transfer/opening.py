"""The transports that a config may name, opened."""

from typing import Literal

from tracehaul.runtime.credentials import Credentials
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Transfer
from tracehaul.wire.errors import TransferError

log = Log(__name__)

Kind = Literal["shm", "tcp", "nixl", "ucxx"]
"""``nixl`` is UCXX's where NIXL is not installed."""


def open_transport(
    kind: str, owner: str, host: str, offload: Offload, credentials: Credentials | None = None
) -> Transfer:
    """The transport of ``owner`` on ``host``; imports only what it needs. ``credentials`` are for ``tcp``, which then
    is under TLS; the others are for trusted networks.

    Raises:
        TransferError: it cannot start here, or there is none of that kind.
    """
    match kind:
        case "shm":
            from tracehaul.transfer.shm import ShmTransfer

            log.info("transport", kind="shm", why="configured")
            return ShmTransfer(owner, offload)
        case "tcp":
            from tracehaul.transfer.tcp import TcpTransfer

            log.info("transport", kind="tcp", why="configured", tls=credentials is not None)
            return TcpTransfer(owner, host, credentials)
        case "nixl":
            from tracehaul.transfer.network import open_network

            return open_network(owner)
        case "ucxx":
            from tracehaul.transfer.ucxx import UcxxTransfer

            log.info("transport", kind="ucxx", why="configured")
            return UcxxTransfer(owner)
        case _:
            raise TransferError(f"no transport is called {kind}")

"""Where a process's data plane is: what it binds, what it tells its peers, and which devices it may use."""

import msgspec

from tracehaul.runtime.addresses import announced


class Place(msgspec.Struct, frozen=True):
    """As a config has it; nothing is opened yet."""

    listen: str = "127.0.0.1"
    """The address that its sockets are bound to: one of this host's, or ``0.0.0.0`` or ``::`` for all."""
    address: str = ""
    """What peers are told: an address, or a name that they look up; empty: ``listen``."""
    port: int = 0
    """0: any that is free."""
    devices: tuple[str, ...] = ()
    """Those that UCX may use, as ``ucx_info -d`` names them (``mlx5_0:1``, ``eth0``); empty: see
    :mod:`tracehaul.transfer.devices`."""
    ucx_tls: str = ""
    """The transports that UCX may use, as in its own UCX_TLS; empty: what it takes."""

    @property
    def announced(self) -> str:
        """The host that peers connect to.

        Raises:
            BadAddress: none of them could.
        """
        return announced(self.listen, self.address)


LOOPBACK = Place()
"""For peers on this host alone."""

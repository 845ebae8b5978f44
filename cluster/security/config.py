"""What of a cluster's traffic is proven and hidden."""

from typing import Literal

import msgspec


class SecurityConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section ``[security]``. All plain: for one host, or a network on which nobody else is."""

    control: Literal["plain", "mtls"] = "plain"
    """``mtls``: every node shows a certificate of the cluster's CA, and all between them is encrypted."""
    data: Literal["plain", "tls"] = "plain"
    """Of the transport ``tcp``. ``tls``: with the same certificates, and encrypted. Others are for trusted networks."""
    token: bool = False
    """Whether who joins must know the cluster's join token: for ``control = "plain"``."""

    authority: str = ""
    """Where the side that launches a fleet keeps the CA; empty: ``~/.tracehaul/authority/NAME``."""

    def __post_init__(self) -> None:
        if self.data == "tls" and self.control == "plain":
            # The token that opens a region travels on the control plane.
            raise ValueError('data = "tls" needs control = "mtls"')

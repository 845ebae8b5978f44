"""What of a cluster's traffic is proven and hidden."""

from typing import Literal

import msgspec


class SecurityConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section ``[security]``. What is None was not said: :func:`decided` says what it is then."""

    control: Literal["plain", "mtls"] | None = None
    """``mtls``: every node shows a certificate of the cluster's CA, and all between them is encrypted."""
    data: Literal["plain", "auth", "tls"] | None = None
    """Of the transport ``tcp``. ``auth``: with the same certificates, then in clear; ``tls``: and encrypted. Others are
    for trusted networks."""
    token: bool | None = None
    """Whether who joins must know the cluster's join token."""

    authority: str = ""
    """Where the side that launches a fleet keeps the CA; empty: ``~/.tracehaul/authority/NAME``."""

    def __post_init__(self) -> None:
        if self.proves_data and self.control == "plain":
            # The token that opens a region travels on the control plane.
            raise ValueError(f'data = "{self.data}" needs control = "mtls"')

    @property
    def proves_data(self) -> bool:
        """Whether connections of the data plane show certificates."""
        return self.data in ("auth", "tls")

    @property
    def secrets(self) -> bool:
        """Whether nodes need something that others must not have."""
        return self.control == "mtls" or bool(self.token)


def decided(said: SecurityConfig, *, fleet: bool) -> SecurityConfig:
    """With nothing left open. Nodes of a ``fleet`` are reached over a network, on which others may be: they show
    certificates unless ``control = "plain"`` is said. On one machine all is plain unless something is said."""
    mtls = said.control == "mtls" or (said.control is None and fleet)
    return msgspec.structs.replace(
        said,
        control="mtls" if mtls else "plain",
        data=said.data or ("auth" if mtls and fleet else "plain"),
        token=said.token if said.token is not None else mtls and fleet,
    )


def clash(runs: SecurityConfig, wanted: SecurityConfig) -> str:
    """Why nodes that were started with ``runs`` cannot be in one cluster with those of ``wanted``; empty: they can."""
    before, after = decided(runs, fleet=False), decided(wanted, fleet=False)
    if (before.control, before.data, before.token) == (after.control, after.data, after.token):
        return ""
    token = "true" if before.token else "false"
    said = f'control = "{before.control}", data = "{before.data}", token = {token}'
    return f"what runs there has {said}: say that in [security], or `tracehaul stop` all and launch again"

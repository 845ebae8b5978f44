"""One table of ``[[webhooks]]``: an address that the operator allows to be told."""

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from jobs.webhooks.events import KINDS, Kind
from jobs.webhooks.outbox import Receiver


class WebhookConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is told, and of what."""

    url: Annotated[str, Meta(max_length=2048)]
    """``https://…``; ``http://…`` only into the networks below."""
    events: tuple[Kind, ...] = KINDS
    tenant: str | None = None
    """Whose events alone: a key's tenant, or a ``cache_salt``; None: everybody's."""
    networks: tuple[str, ...] = ()
    """Networks (``10.1.0.0/16``) that the address may be in beside public ones."""
    secret: Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{1,64}$")] = "secret"  # noqa: S105 - a name
    """The file of its secret, in the folder ``webhooks`` of the run directory."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            told = (parts.scheme, parts.hostname, parts.port)
        except ValueError as error:
            raise ValueError(f"{self.url!r} is no URL: {error}") from None
        if told[0] not in ("https", "http") or not told[1] or not self.url.isascii() or parts.fragment:
            raise ValueError(f"{self.url!r} is no URL of a receiver: write https://host/path")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a receiver knows us by the signature: leave user and password out of its url")
        for network in self.networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"{error}: write networks like 10.1.0.0/16") from None
        if parts.scheme == "http" and not self.networks:
            raise ValueError("plain http goes only into networks that are named: write https, or networks")

    @property
    def receiver(self) -> Receiver:
        """As the outbox has it."""
        return Receiver(self.url, self.events, self.tenant)

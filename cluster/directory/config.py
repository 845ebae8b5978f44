"""What a config says of where routers register."""

from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

ENDPOINTS_MAX = 16


class DirectoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section ``[directory]``. Empty: routers are where the plan says."""

    etcd: Annotated[tuple[str, ...], Meta(max_length=ENDPOINTS_MAX)] = ()
    """Its members, as ``http://10.0.0.1:2379``: routers register there, and nodes join those that they find, beside
    those of their plan. The first that answers is asked."""
    prefix: Annotated[str, Meta(pattern="^/[A-Za-z0-9._/-]{1,128}$")] = "/tracehaul"
    """Of its keys; below it each cluster has its name."""
    ttl_s: Annotated[int, Meta(ge=2, le=3600)] = 10
    """So long after a router's end its entry is there."""
    ca: str = ""
    """A file on each host, with the CA of etcd's certificates; empty: the system's."""
    cert: str = ""
    """A file on each host, with the certificate that etcd is shown; its key is in ``key``."""
    key: str = ""

    def __post_init__(self) -> None:
        for endpoint in self.etcd:
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
                raise ValueError(f"etcd is not at {endpoint!r}: write for example http://10.0.0.1:2379")
        if bool(self.cert) != bool(self.key):
            raise ValueError("cert and key belong together")
        if self.ca and not any(endpoint.startswith("https:") for endpoint in self.etcd):
            raise ValueError("ca is for https")

"""What a plugin is told by who starts its server: the object ``tracehaul`` in the engine's own extra configuration."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec


class EngineRefused(Exception):
    """This server cannot use the store as it is set up; one line says why. Only a start raises it."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one server; all its ranks are given the same."""

    name: str
    """The server's in the fleet; its ranks put theirs behind it. A later server of the name takes its place."""
    revision: str
    """Which weights these are: a commit, a digest. There is no default: the same name with other weights is another
    model, and nothing else would tell."""
    routers: tuple[str, ...] = ()
    """``host:port`` of each router's control plane."""
    routers_file: str = ""
    """Where they are told anew when they change: a JSON array of such addresses, read again when it is written. Until
    it is there, and where it cannot be read, they are those above, or those told last."""
    model: str = ""
    """Empty: as the engine calls it."""
    pool: str = ""
    """Servers that share KV. What it holds must be of one layout: see :mod:`.identity`."""
    cluster: str = ""
    """Its name, where it has one."""
    transports: tuple[str, ...] = ("shm", "auto")
    listen: str = "127.0.0.1"
    """The address of the data plane: one of this host's."""
    secrets: str = ""
    """A folder with ``ca.pem``, ``node.pem`` and ``node.key``: the control plane is under mTLS. Empty: it is plain."""
    data: Literal["plain", "auth", "tls"] = "plain"
    """Whether the data plane is proven, or under TLS, with the same files."""
    token_file: str = ""
    """The cluster's join token is its first line."""
    staging_bytes: int = 256 << 20
    """Memory between the engine's pages and the store's: half for what is read, half for what is written."""
    timeout_s: float = 5.0
    """The longest that one call of the engine may take, whatever the stores do."""
    attach_s: float = 10.0
    """The longest that a start waits for the stores; a server that has not found them starts, and misses."""
    layout_file: str = ""
    """Where the first rank says what its blocks are: a :class:`KVLayout` as JSON. Empty: where the environment variable
    ``TRACEHAUL_LAYOUT_FILE`` says, if it does."""
    backends: tuple[str, ...] = ()
    """Back ends or memory pools, beside those that this version has verified, that the operator has: their tokens were
    compared."""


def config_of(extra: Mapping[str, Any] | None) -> EngineConfig:
    """What an engine's extra configuration says.

    Raises:
        EngineRefused: it says nothing, or something that is not understood.
    """
    said = (extra or {}).get("tracehaul")
    if said is None:
        raise EngineRefused('tracehaul: the extra configuration has no object "tracehaul"')
    try:
        config = msgspec.convert(said, EngineConfig)
    except msgspec.ValidationError as error:
        raise EngineRefused(f"tracehaul: {error}") from None
    if not (config.routers or config.routers_file) or not config.revision or not config.name:
        raise EngineRefused("tracehaul: routers (or routers_file), name and revision must not be empty")
    return config

"""What ``cluster.toml`` says of hosts."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

NODES_MAX = 64
"""Of one role in one cluster on one machine, or on one host of a fleet."""
HOSTS_MAX = 256
LOCAL = "local"
"""In place of where ssh goes: the machine that launches, without ssh."""

HostName = Annotated[str, Meta(pattern="^[a-z0-9]([a-z0-9.-]{0,30}[a-z0-9])?$")]
PoolName = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9_.]{0,31}$")]
NodeCount = Annotated[int, Meta(ge=0, le=NODES_MAX)] | Literal["per-gpu"]
WorkerCount = NodeCount | dict[PoolName, NodeCount]
"""Where the config has pools: of each pool, by its name."""
Port = Annotated[int, Meta(ge=1024, le=65535)]
UcxTransport = Annotated[str, Meta(pattern="^\\^?[a-z][a-z0-9_]*(:aux)?$")]
Bytes = Annotated[int, Meta(ge=0)]


class HostNodes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many nodes of each role run on a host."""

    router: Annotated[int, Meta(ge=0, le=1)] = 0
    store: Annotated[int, Meta(ge=0, le=NODES_MAX)] = 0
    prefill: WorkerCount = 0
    decode: WorkerCount = 0


class HostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[hosts]]``. What of its nodes is not said here is as for the whole cluster."""

    name: HostName
    """Nodes are called after it, as ``decode-NAME-0``: they keep their names when other hosts come and go."""
    nodes: HostNodes = HostNodes()
    ssh: str = ""
    """What the system's ssh is given: ``user@host``, or a ``Host`` of its config. Empty: the name; ``local``: this is
    the machine that launches, without ssh."""
    address: str = ""
    """How the other hosts reach it: an address or a name. Empty: where ssh goes."""
    data_address: str = ""
    """The same for KV, where that has an interface of its own. Empty: the address."""
    listen: str = ""
    """What its nodes' sockets are bound to, where that is not the address (``0.0.0.0``, ``::``)."""
    ucx_devices: tuple[str, ...] = ()
    """Devices that UCX may use, as ``ucx_info -d`` names them (``mlx5_0:1``). Empty: it chooses."""
    ucx_tls: tuple[UcxTransport, ...] = ()
    """Its transports that UCX may use, as in UCX_TLS (``rc``, ``tcp``; ``^rc``: all but that). Empty: it chooses."""
    gpus: Annotated[int, Meta(ge=0, le=64)] = 0
    """Its workers get one each, in turn; 0: they compute on the CPU."""
    kind: str = ""
    """Of machine; its price is in ``[prices]``."""
    home: str = "~/.tracehaul"
    """Where releases, models and the run directory are there."""
    environment: str = ""
    """A Python environment there that has this version of tracehaul already. Empty: one is made from a bundle."""
    python: str = "python3"
    """What makes the environment."""
    model: str | dict[PoolName, str] = ""
    """Where the model is there, of each pool where there are pools. Empty: as for the whole cluster."""
    supervisor: Literal["auto", "systemd", "systemd-user", "own"] = "auto"
    """Who starts its nodes again when they die."""
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    kv_tokens: Annotated[int, Meta(ge=32)] | None = None
    store_bytes: Annotated[int, Meta(ge=1 << 20)] | None = None
    disk_bytes: Bytes | None = None
    disk_dir: str | None = None

    @property
    def target(self) -> str:
        """What ssh is given."""
        return self.ssh or self.name


class NetworkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ports of a fleet's nodes: fixed, so that a firewall can know them."""

    ports: Annotated[int, Meta(ge=1024, le=64000)] = 7000
    """The first. Routers listen from there on, stores 200 above it, prefill workers 400, decode workers 600; each node
    has three in a row: control plane, data plane, metrics."""

"""One config for a whole cluster, whether it is this machine or many hosts (:mod:`cluster.config_file` reads it).

What an operator asks for is a :class:`ClusterConfig`. What the nodes read is a :class:`cluster.plan.Plan`: the same,
with everything that was decided at launch (the model's place on disk, addresses, sizes that follow from the model).
"""

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cluster.directory.config import DirectoryConfig
from cluster.fleet.config import HOSTS_MAX, NODES_MAX, HostConfig, NetworkConfig, PoolName
from cluster.rundir import ClusterFault, RunDir
from cluster.security.config import SecurityConfig
from cluster.webhooks.config import WebhookConfig
from engines.adapter.config import AdapterConfig
from kvstore.config import PAGE_BYTES, StoreConfig
from kvstore.copies.config import ReplicationConfig
from kvstore.tiers.objects import parse_url
from kvstore.tiers.records import Layout
from kvstore.tiers.tiering import TieringConfig
from router.dispatch.config import DispatchConfig
from router.http.config import ApiConfig
from tracehaul.model.source import DEFAULT_MODEL
from tracehaul.transfer.opening import Kind
from tracehaul.wire.hashing import KVLayout
from worker.config import WorkerConfig

Role = Literal["router", "store", "prefill", "decode"]

OBJECTS_MAX = 4_000_000
"""Blocks of one store node in its bucket: its index is in memory, about half a KiB each."""

ROUTER = "router-0"

POOLS_MAX = 16
WEBHOOKS_MAX = 16

Count = Annotated[int, Meta(ge=1, le=NODES_MAX)]
KVTokens = Annotated[int, Meta(ge=32)]
Dtype = Literal["bfloat16", "float16", "float32"]
Seconds = Annotated[float, Meta(gt=0)]


class NodeCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many nodes of each role; there is one router."""

    prefill: Annotated[int, Meta(ge=0, le=NODES_MAX)] = 1
    """0: decode workers compute whole prompts themselves."""
    decode: Count = 1
    store: Count = 1


class PoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Workers of one model. What is not said here is as for the whole cluster."""

    model: str = DEFAULT_MODEL
    """As :attr:`ClusterConfig.model`."""
    serves: str = ""
    """What clients call the model by; empty: the pool's name."""
    prefill: Annotated[int, Meta(ge=0, le=NODES_MAX)] = 1
    """0: decode workers compute whole prompts themselves."""
    decode: Count = 1
    dtype: Dtype | None = None
    weights: Literal["int8"] | None = None
    kv_tokens: KVTokens | None = None
    worker: WorkerConfig | None = None
    engine: Literal["native", "sglang", "vllm"] = "native"
    """What computes: our own, or a stock server of another, one for each worker."""
    engine_python: str = ""
    """The interpreter of the environment that the server is installed in; empty: this one."""
    engine_args: tuple[str, ...] = ()
    """Options of the server, beside those that it is started with in any case."""
    attach: dict[str, str] = {}
    """Where servers that run already answer (``http://host:port``), by the names of the workers that use them; such a
    worker starts none."""
    adapter: AdapterConfig = AdapterConfig()
    """Bounds of the waits for the servers."""

    def __post_init__(self) -> None:
        said = self.engine_python or self.engine_args or self.attach
        if self.engine == "native" and said:
            raise ValueError("engine_python, engine_args and attach are of other engines: say engine")


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator may set. Every field has a default that suits a small machine."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{0,64}$")] = ""
    """What tells this cluster from others: nodes of another one are refused. Empty: one is made up."""
    model: str = DEFAULT_MODEL
    """The default's name, a folder in the hub's layout, a GGUF file, or a hub name like ``org/model``."""
    dtype: Dtype = "bfloat16"
    weights: Literal["int8"] | None = None
    """Matrices rounded to int8, on the CPU; None: of ``dtype``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    transport: Kind = "shm"
    host: str = "127.0.0.1"
    """Where the HTTP API listens; what nodes say to each other stays on the loopback interface."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 8000
    metrics_host: str = "127.0.0.1"
    """Where each node but the router, whose page is the API's, answers ``/metrics``, on a free port."""
    nodes: NodeCounts = NodeCounts()
    pools: Annotated[dict[PoolName, PoolConfig], Meta(max_length=POOLS_MAX)] = {}
    """Several models, each with workers of its own (``[pools.NAME]``); then ``model``, ``nodes.prefill`` and
    ``nodes.decode`` are not said. Empty: one pool, of the model above."""
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Compute threads of each worker; None: the cores, divided."""
    kv_tokens: KVTokens = 32768
    """KV memory of each worker, in tokens."""
    store_bytes: Annotated[int, Meta(ge=1 << 20)] = 1 << 30
    """Block memory of each store node."""
    disk_bytes: Annotated[int, Meta(ge=0)] = 0
    """Disk of each store node for blocks that leave memory, taken at once; 0: none, and a restart forgets all."""
    disk_dir: str = ""
    """Where the store nodes' files are; empty: in the run directory."""
    quota_bytes: dict[str, int] = {}
    """Of each store node's block memory, what each tenant (a request's ``cache_salt``) is sure of. Tenants without an
    entry share what is left."""
    s3_url: str = ""
    """``s3://bucket/prefix``: a tier below memory and disk, each store node under its own name there; empty: none.
    Endpoint and credentials come from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...)."""
    s3_bytes: Annotated[int, Meta(ge=0)] = 0
    """The most that each store node keeps there."""
    hosts: Annotated[tuple[HostConfig, ...], Meta(max_length=HOSTS_MAX)] = ()
    """The hosts of a fleet (``[[hosts]]``), each with its nodes; then ``[nodes]`` and the pools' numbers of workers are
    not said. Empty: this machine."""
    network: NetworkConfig = NetworkConfig()
    security: SecurityConfig = SecurityConfig()
    database: str = ""
    """Where what outlives processes is kept: ``postgresql://user:password@host:port/name``, then ``name`` is said;
    empty: a file of SQLite's for each router, in the run directory."""
    traces_keep_s: Annotated[float, Meta(ge=0)] = 7 * 86400.0
    """For how long a trace that rests is known to a router's next life; 0: nothing is written down of traces."""
    bills_keep_s: Annotated[float, Meta(gt=0)] = 90 * 86400.0
    """For how long what traces were billed is written down."""
    directory: DirectoryConfig = DirectoryConfig()
    """Where routers register and are found, beside those of the plan; then ``name`` is said."""
    webhooks: Annotated[tuple[WebhookConfig, ...], Meta(max_length=WEBHOOKS_MAX)] = ()
    """Who is told of batches and responses in the background that have ended (``[[webhooks]]``)."""
    prices: dict[str, Annotated[float, Meta(ge=0)]] = {}
    """Of an hour of a machine, by the hosts' kinds, and of ``local`` where there are no hosts; in the unit of
    ``dispatch.tariff``. Workers on one machine share it."""
    tiering: TieringConfig = TieringConfig()
    replication: ReplicationConfig = ReplicationConfig()
    worker: WorkerConfig = WorkerConfig()
    dispatch: DispatchConfig = DispatchConfig()
    api: ApiConfig = ApiConfig()
    connections_max: Annotated[int, Meta(ge=16)] = 1024
    """Of each node's control plane; further ones are closed at once."""
    start_timeout_s: Seconds = 300.0
    """From the first process to the last one ready."""
    drain_timeout_s: Seconds = 10.0
    """What a node may take to end its work when it is told to stop."""
    restart: Literal["always", "never"] = "always"
    """Whether a node that ended by itself is started again: to look at a dead one, never."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def pools_of(config: ClusterConfig) -> dict[str, PoolConfig]:
    """The pools by name, with nothing left open but what clients call the one that has no name."""
    unnamed = PoolConfig(
        model=config.model, prefill=config.nodes.prefill, decode=config.nodes.decode, weights=config.weights
    )
    pools = config.pools or {"": unnamed}
    return {
        name: msgspec.structs.replace(
            pool,
            serves=pool.serves or name,
            dtype=pool.dtype or config.dtype,
            weights=pool.weights or config.weights,
            kv_tokens=pool.kv_tokens or config.kv_tokens,
            worker=pool.worker or config.worker,
        )
        for name, pool in pools.items()
    }


def base_url(config: ClusterConfig) -> str:
    """Where a client on this machine reaches the API."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104 - compared, not bound
    return f"{'https' if config.api.tls_cert else 'http'}://{authority(host, config.port)}"


def authority(host: str, port: int) -> str:
    """``host:port`` as URLs have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def store_config(config: ClusterConfig, layouts: Sequence[KVLayout]) -> StoreConfig:
    """A store node's config: slots of one full block of any of these layouts.

    Raises:
        ClusterFault: the arena, or a tier, is smaller than one block, the quotas are larger than the arena, or what is
            said of a tier makes no sense.
    """
    slot_bytes = -(-max(layout.block_bytes for layout in layouts) // PAGE_BYTES) * PAGE_BYTES
    if config.store_bytes < slot_bytes:
        raise ClusterFault(f"--store-bytes {config.store_bytes} holds no block of this model ({slot_bytes} bytes)")
    if config.disk_bytes and Layout.within(config.disk_bytes, slot_bytes) is None:
        raise ClusterFault(f"--disk-bytes {config.disk_bytes} holds no block of this model ({slot_bytes} bytes)")
    _check_s3(config, slot_bytes)
    try:
        return StoreConfig(arena_bytes=config.store_bytes, slot_bytes=slot_bytes, quota_bytes=config.quota_bytes)
    except ValueError as error:
        raise ClusterFault(f"the store nodes' config is wrong: {error}") from error


def _check_s3(config: ClusterConfig, slot_bytes: int) -> None:
    if not config.s3_url and not config.s3_bytes:
        return
    if not config.s3_url or not config.s3_bytes:
        raise ClusterFault("an S3 tier needs both: where it is (--s3-url) and how much it may keep there (--s3-bytes)")
    try:
        parse_url(config.s3_url)
    except ValueError as error:
        raise ClusterFault(f"--s3-url is {error}") from error
    if not 1 <= config.s3_bytes // slot_bytes <= OBJECTS_MAX:
        raise ClusterFault(
            f"--s3-bytes {config.s3_bytes} must hold from 1 to {OBJECTS_MAX} blocks of this model ({slot_bytes} bytes)"
        )


def disk_path(config: ClusterConfig, run: RunDir, name: str) -> Path:
    """A store node's disk tier."""
    folder = Path(config.disk_dir) if config.disk_dir else run.path / "disk"
    return folder / f"{name}.blocks"


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_quota(text: str) -> tuple[str, int]:
    """Tenant and bytes of ``acme=512MiB``.

    Raises:
        ValueError: it is no such thing.
    """
    tenant, equals, size = text.rpartition("=")
    if not equals:
        raise ValueError(f"not a quota: {text!r}; write for example acme=512MiB")
    return tenant, parse_bytes(size)


def parse_bytes(text: str) -> int:
    """Bytes of ``1073741824``, ``512MiB``, ``2 GB`` or ``4G`` (decimal without the ``i``).

    Raises:
        ValueError: it is none of these.
    """
    compact = text.replace(" ", "").lower().removesuffix("b")
    digits = compact.rstrip("kmgti")
    unit = compact[len(digits) :]
    if unit not in _UNITS:
        raise ValueError(f"not a size: {text!r}; write for example 512MiB or 2GiB")
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise ValueError(f"not a size: {text!r}; write for example 512MiB or 2GiB") from None

"""What a host is told to run, and what it tells of it. Pure."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from cluster.config import Role
from cluster.hosts.restarts import RestartPolicy
from cluster.plan import NodeSpec, Plan

Supervisor = Literal["systemd", "systemd-user", "own"]
Asked = Literal["auto", "systemd", "systemd-user", "own"]
NodeCondition = Literal["running", "starting", "backoff", "given up", "stopped", "fenced", "faulty"]

DIGEST_VARIABLE = "TRACEHAUL_ORDER"
"""In the environment of a node that is supervised: the digest of what it was started with."""

_NEVER = ()
_STORES = ("store",)
_WORKERS = ("prefill", "decode")
_ROUTERS = ("router",)
_MOVERS = (*_STORES, *_WORKERS)
READ_BY: dict[str, tuple[str, ...]] = {
    # What of these a node needs is in its pool, its spec, or the plan of its host.
    "model": _NEVER,
    "nodes": _NEVER,
    "pools": _NEVER,
    "hosts": _NEVER,
    "network": _NEVER,
    "prices": _NEVER,
    "start_timeout_s": _NEVER,
    "restart": _NEVER,
    "transport": _MOVERS,
    "dtype": _WORKERS,
    "weights": _WORKERS,
    "device": _WORKERS,
    "threads": _WORKERS,
    "kv_tokens": _WORKERS,
    "worker": _WORKERS,
    "store_bytes": _STORES,
    "disk_bytes": _STORES,
    "disk_dir": _STORES,
    "quota_bytes": _STORES,
    "s3_url": _STORES,
    "s3_bytes": _STORES,
    "tiering": _STORES,
    "replication": _STORES,
    "dispatch": _ROUTERS,
    "api": _ROUTERS,
    "host": _ROUTERS,
    "port": _ROUTERS,
}
"""Who reads which field of the config; those that are not here all do. A node that does not read it is not restarted
when it changes."""


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one host shall run."""

    plan: Plan
    host: str = ""
    """Whose nodes; empty: those of the machine that launched."""
    supervisor: Asked = "auto"
    restarts: RestartPolicy = RestartPolicy()

    @property
    def nodes(self) -> tuple[NodeSpec, ...]:
        """Of this host, in the order to start them."""
        return self.plan.nodes_on(self.host)


def order_of(plan: Plan, host: str = "", supervisor: Asked = "own") -> Order:
    """What the plan says of that host."""
    return Order(plan, host, supervisor, RestartPolicy(again=plan.config.restart == "always"))


class NodeReport(msgspec.Struct, frozen=True):
    """One node of a host."""

    name: str
    role: Role
    state: NodeCondition
    """``faulty``: it says in :attr:`last_line` what an operator must mend, and is tried again all the same; ``given
    up``: it died too often, and is left alone, as is one that is ``fenced``: another has its name now."""
    pid: int | None = None
    restarts: int = 0
    """How often it was started again by itself."""
    since_s: float = 0.0
    """How long it has been so."""
    exit_code: int | None = None
    """Of its last life that ended; negative: the signal. None: it has not ended, or nobody saw it."""
    phase: str = ""
    """How far it says that it is; empty where it does not run."""
    last_line: str = ""
    """Of its output, where it does not run."""
    digest: str = ""
    """Of what it was started with, or would be."""


class HostReport(msgspec.Struct, frozen=True):
    """What runs on a host, and who supervises it."""

    host: str
    supervisor: Supervisor | Literal["none"]
    """``none``: nobody; nodes that run are named all the same."""
    nodes: tuple[NodeReport, ...]
    version: str
    release: str = ""
    """Of the supervisor: what it starts nodes from."""
    faults: tuple[str, ...] = ()
    """What the supervisor could not do, in a line each."""


def digest(order: Order, spec: NodeSpec, release: str) -> str:
    """Names everything that a node reads when it starts: one that was started with another must be restarted. Where
    the routers are it reads whenever that changes."""
    plan = order.plan
    config: dict[str, Any] = msgspec.to_builtins(plan.config, enc_hook=str)
    parts: list[Any] = [
        release,
        plan.name,
        msgspec.to_builtins(spec),
        {name: value for name, value in config.items() if spec.role in READ_BY.get(name, (spec.role,))},
    ]
    match spec.role:
        case "store":
            parts += [msgspec.to_builtins(plan.store), plan.transports]
        case "prefill" | "decode":
            pool = msgspec.to_builtins(plan.pool(spec.pool), enc_hook=str)
            parts += [plan.store.slot_bytes, plan.transports, pool, plan.workers_on(spec.host)]
        case "router":
            parts += [[(pool.name, msgspec.to_builtins(pool.model, enc_hook=str)) for pool in plan.pools]]
    return blake2b(msgspec.json.encode(parts, order="deterministic"), digest_size=8).hexdigest()


def digests(order: Order, release: str) -> dict[str, str]:
    """Of every node of this host, by name."""
    return {spec.name: digest(order, spec, release) for spec in order.nodes}


def environment(order: Order, spec: NodeSpec, release: str, visible_gpus: str = "") -> dict[str, str]:
    """What a node's environment has beside its supervisor's.

    ``visible_gpus``: ``CUDA_VISIBLE_DEVICES`` of the supervisor, of which a node's GPUs are some; empty: all.
    """
    said = {DIGEST_VARIABLE: digest(order, spec, release)}
    if spec.gpus:
        there = visible_gpus.split(",") if visible_gpus else []
        said["CUDA_VISIBLE_DEVICES"] = ",".join(there[gpu] if gpu < len(there) else str(gpu) for gpu in spec.gpus)
    return said


def role_of(name: str) -> Role | None:
    """Of a node that no order describes, as its name says; None: it is none."""
    roles: tuple[Role, ...] = ("router", "store", "prefill", "decode")
    return next((role for role in roles if name.startswith(f"{role}-")), None)


def stages(names: Mapping[str, Role]) -> list[list[str]]:
    """These nodes in the order to stop them: those that let work in, those that compute, those that keep."""
    order: tuple[tuple[Role, ...], ...] = (("router",), ("prefill", "decode"), ("store",))
    return [found for roles in order if (found := [name for name, role in names.items() if role in roles])]


def variables(text: str) -> dict[str, str]:
    """Variables of an environment file: ``NAME=VALUE`` a line, ``#`` before what is no variable."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs}

"""Which nodes run on which host, at which ports."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from cluster.config import ClusterConfig, Role, pools_of
from cluster.fleet.config import HostConfig, NodeCount, WorkerCount
from cluster.hosts.orders import Order, order_of
from cluster.plan import NodeSpec, Plan

_FIRST: dict[Role, int] = {"router": 0, "store": 200, "prefill": 400, "decode": 600}
"""Of a role's ports, from the config's first."""
_DIGEST_CHARS = 16
API_FILES = ("keys_file", "tls_cert", "tls_key")
"""What of the API's config are files: they travel to the routers' hosts."""
_EACH = 3
"""Ports of a node: control plane, data plane, metrics."""


def place(config: ClusterConfig, addresses: Mapping[str, str]) -> tuple[NodeSpec, ...]:
    """Every process of a fleet, in the order to start them. ``addresses``: of those hosts that do not say one."""
    nodes = [spec for host in config.hosts for spec in _nodes_on(host, config, host.address or addresses[host.name])]
    order = list(_FIRST)
    return tuple(sorted(nodes, key=lambda spec: order.index(spec.role)))


def _nodes_on(host: HostConfig, config: ClusterConfig, address: str) -> list[NodeSpec]:
    workers = 0  # of all roles: they take the host's GPUs in turn
    specs: list[NodeSpec] = []

    def add(role: Role, pool: str, count: int) -> None:
        nonlocal workers
        kind = f"{role}-{pool}" if pool else role
        before = sum(spec.role == role for spec in specs)
        for number in range(count):
            gpus = (workers % host.gpus,) if host.gpus and role in ("prefill", "decode") else ()
            workers += bool(gpus)
            port = config.network.ports + _FIRST[role] + _EACH * (before + number)
            specs.append(
                NodeSpec(
                    name=f"{kind}-{host.name}-{number}",
                    role=role,
                    pool=pool,
                    host=host.name,
                    listen=host.listen or address,
                    address=address,
                    data_address=host.data_address,
                    control_port=port,
                    data_port=port + 1,
                    metrics_port=port + 2,
                    ucx_devices=host.ucx_devices,
                    ucx_tls=host.ucx_tls,
                    gpus=gpus,
                )
            )

    add("router", "", host.nodes.router)
    add("store", "", host.nodes.store)
    counts: tuple[tuple[Role, WorkerCount], ...] = (("prefill", host.nodes.prefill), ("decode", host.nodes.decode))
    for role, count in counts:
        for pool in pools_of(config):
            add(role, pool, _count(count.get(pool, 0) if isinstance(count, dict) else count, host))
    return specs


def _count(count: NodeCount, host: HostConfig) -> int:
    return host.gpus if count == "per-gpu" else count


def plan_on(host: HostConfig, plan: Plan) -> Plan:
    """The plan with what the config says of this host alone."""
    said = {
        name: value
        for name in ("threads", "kv_tokens", "store_bytes", "disk_bytes", "disk_dir")
        if (value := getattr(host, name)) is not None
    }
    store = plan.store
    if host.store_bytes is not None:
        store = msgspec.structs.replace(store, arena_bytes=host.store_bytes)
    pools = plan.pools
    if host.kv_tokens is not None:
        pools = tuple(
            msgspec.structs.replace(pool, config=msgspec.structs.replace(pool.config, kv_tokens=host.kv_tokens))
            for pool in pools
        )
    config = msgspec.structs.replace(plan.config, **said)
    return msgspec.structs.replace(plan, config=config, store=store, pools=pools)


def order_for(host: HostConfig, plan: Plan, home: str, digests: Mapping[str, str]) -> Order:
    """What that host is told to run: the plan with what is said of it alone, and with paths there.

    ``home``: whole. ``digests``: of the pools' models, which name those that travel.
    """
    there = plan_on(host, plan)
    api = plan.config.api
    files = {name: f"{home}/run/secrets/{name}" for name in API_FILES if getattr(api, name)}
    config = msgspec.structs.replace(there.config, api=msgspec.structs.replace(api, **files))
    paths = model_paths(host, plan, home, digests)
    pools = tuple(
        msgspec.structs.replace(
            pool,
            model=msgspec.structs.replace(pool.model, path=Path(paths[pool.name])),
            config=msgspec.structs.replace(pool.config, model=paths[pool.name]),
        )
        for pool in there.pools
    )
    return order_of(msgspec.structs.replace(there, config=config, pools=pools), host.name, host.supervisor)


def pools_on(plan: Plan, host: str) -> list[str]:
    """Those whose models a host's nodes read: workers their own, routers all."""
    nodes = plan.nodes_on(host)
    every = any(spec.role == "router" for spec in nodes)
    return [
        pool.name
        for pool in plan.pools
        if every or any(spec.pool == pool.name for spec in nodes if spec.role != "store")
    ]


def model_paths(host: HostConfig, plan: Plan, home: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Where each pool's model is or would be on that host."""
    paths: dict[str, str] = {}
    for pool in plan.pools:
        said = host.model.get(pool.name, "") if isinstance(host.model, dict) else host.model
        name = pool.model.path.name
        paths[pool.name] = said or f"{home}/models/{digests[pool.name][:_DIGEST_CHARS]}/{name}"
    return paths

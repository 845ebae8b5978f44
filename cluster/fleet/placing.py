"""Which nodes run on which host, at which ports. Pure."""

import ipaddress
from collections.abc import Mapping

import msgspec

from cluster.config import ClusterConfig, Role, pools_of
from cluster.fleet.config import HostConfig, NodeCount, WorkerCount
from cluster.plan import NodeSpec, Plan

_FIRST: dict[Role, int] = {"router": 0, "store": 200, "prefill": 400, "decode": 600}
"""Of a role's ports, from the config's first."""
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


def is_address(text: str) -> bool:
    """Whether it is an address of IPv4 or IPv6, and not a name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def plan_for(plan: Plan, host: HostConfig) -> Plan:
    """The plan as that host's nodes read it: with what the config says of this host alone."""
    said = {
        name: value
        for name in ("threads", "kv_tokens", "store_bytes", "disk_bytes", "disk_dir")
        if (value := getattr(host, name)) is not None
    }
    config = msgspec.structs.replace(plan.config, **said)
    store = plan.store
    if host.store_bytes is not None:
        store = msgspec.structs.replace(store, arena_bytes=host.store_bytes)
    pools = plan.pools
    if host.kv_tokens is not None:
        pools = tuple(
            msgspec.structs.replace(pool, config=msgspec.structs.replace(pool.config, kv_tokens=host.kv_tokens))
            for pool in pools
        )
    return msgspec.structs.replace(plan, config=config, store=store, pools=pools)

"""Plans for tests of what a host runs: no model is needed to read them."""

from pathlib import Path

from cluster.config import ClusterConfig, PoolConfig
from cluster.hosts.orders import Order
from cluster.plan import NodeSpec, Plan, PoolPlan
from kvstore.config import StoreConfig
from tracehaul.model.source import ModelSource

MIB = 1 << 20


def plan(config: ClusterConfig | None = None) -> Plan:
    """Two hosts: a router, a store and workers on ``a``, a store and a decode worker with GPUs 2 and 3 on ``b``."""
    pool = PoolPlan("", ModelSource("m", Path("/srv/models/m"), "hf", "llama"), PoolConfig(serves="m"))
    return Plan(
        config or ClusterConfig(),
        (pool,),
        StoreConfig(arena_bytes=64 * MIB, slot_bytes=MIB),
        (
            NodeSpec("router-a-0", "router", host="a", listen="10.0.0.1", address="10.0.0.1", control_port=7000),
            NodeSpec("store-a-0", "store", host="a", listen="0.0.0.0", address="10.0.0.1", control_port=7200),
            NodeSpec("store-b-0", "store", host="b", listen="10.0.0.2", address="10.0.0.2", control_port=7200),
            NodeSpec("prefill-a-0", "prefill", host="a", address="10.0.0.1", control_port=7400),
            NodeSpec("decode-a-0", "decode", host="a", address="10.0.0.1", control_port=7600),
            NodeSpec("decode-b-0", "decode", host="b", address="10.0.0.2", control_port=7600, gpus=(2, 3)),
        ),
    )


def order(host: str = "a", config: ClusterConfig | None = None) -> Order:
    return Order(plan(config), host)

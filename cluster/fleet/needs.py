"""What the nodes of a host take of its memory."""

from cluster.fleet.config import HostConfig
from cluster.model import kv_layout
from cluster.plan import NodeSpec, Plan


def needs_of(node: NodeSpec, host: HostConfig, plan: Plan) -> int:
    """Bytes of memory of the host that this node takes: its arena, or its KV where that is not on a GPU."""
    config = plan.config
    if node.role == "store":
        return host.store_bytes or config.store_bytes
    if node.role == "router" or node.gpus or config.device == "cuda":
        return 0
    pool = plan.pool(node.pool)
    layout = kv_layout(pool.model, pool.config.dtype or config.dtype)
    return layout.token_bytes * (host.kv_tokens or pool.config.kv_tokens or config.kv_tokens)

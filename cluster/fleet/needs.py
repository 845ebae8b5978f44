"""What the nodes of a host take of its memory."""

from cluster.fleet.config import HostConfig
from cluster.fleet.placing import plan_on
from cluster.memory import Need, needs
from cluster.model import model_size
from cluster.plan import Plan


def needs_on(host: HostConfig, plan: Plan) -> list[Need]:
    """The largest first; see :func:`cluster.memory.needs`.

    Raises:
        ClusterFault: a model's files do not say how large it is.
    """
    there = plan_on(host, plan)
    sizes = {pool.name: model_size(pool.model, pool.config, there.config.dtype) for pool in there.pools}
    on_gpu = bool(host.gpus) or there.config.device == "cuda"
    return needs(
        there.config, plan.nodes_on(host.name), there.pools, sizes, staging_bytes=there.store.slot_bytes, on_gpu=on_gpu
    )

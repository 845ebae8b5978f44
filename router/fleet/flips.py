"""Whether a worker may have another role now. Pure.

Each router decides by what it sees, and a worker asks every router that lists it: so two routers that order different
flips at once each refuse the other's. A worker that is about to have another role counts as having none.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from router.fleet.pools import in_pool
from tracehaul.wire.cluster import NodeInfo, WorkerRole
from tracehaul.wire.ids import NodeId


class FlipConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator may set on changes of workers' roles."""

    drain_s: Annotated[float, Meta(ge=0)] = 3.0
    """For so long what a worker runs may go on to its end there; then it goes on elsewhere."""
    cooldown_s: Annotated[float, Meta(ge=0)] = 5.0
    """In a pool no role changes for so long after one has."""


class Worker(NamedTuple):
    """A member that has a worker's role."""

    info: NodeInfo
    turning: bool
    """It is about to have another one."""
    live: bool
    """It is heard, can serve, and is not about to leave."""


class View(NamedTuple):
    """The fleet, as one router sees it."""

    workers: Sequence[Worker]
    stores: int
    """Store nodes that can serve."""
    settled: bool
    """Whoever lives has had the time to join this router."""
    turned_s: Mapping[str, float]
    """When a role changed last, by pool, by the router's clock."""


def may_flip(view: View, node: NodeId, role: str, now_s: float, cooldown_s: float) -> str | None:
    """Why that worker may not have that role now; None if it may."""
    found = next((worker for worker in view.workers if worker.info.node == node), None)
    if found is None:
        return f"there is no worker {node}"
    info, where = found.info, in_pool(found.info.pool)
    others = [worker for worker in view.workers if worker is not found and worker.info.pool == info.pool]
    turning = next((worker.info.node for worker in others if worker.turning), None)
    missing = not any(worker.info.role == role for worker in others)
    pause_s = view.turned_s[info.pool] + cooldown_s - now_s if info.pool in view.turned_s else 0.0
    if info.role == role:
        return f"{node} is a {role} worker already"
    if role not in info.roles:
        return f"{node} keeps its role: workers of {info.engine or 'its version'} cannot change it to {role}"
    if not view.settled:
        return "this router does not know yet who is there"
    if found.turning:
        return f"the role of {node} is being changed"
    if not found.live:
        return f"{node} does not serve now"
    if turning is not None:
        return f"the role of {turning} is being changed, and one changes at a time{where}"
    last = not any(worker.live and worker.info.role == info.role for worker in others)
    if last and not (missing and role == "decode"):  # nobody is served where nobody decodes
        return f"{node} is the last {info.role} worker that serves{where}"
    if role == "prefill" and not view.stores:
        return "no store node serves: what a prefill worker computes would reach nobody"
    if pause_s > 0 and not missing:
        return f"a role has changed{where}: the next one may in {pause_s:.0f} s"
    return None


def goes_back(view: View) -> tuple[NodeId, WorkerRole] | None:
    """A worker that is to have the role again with which its life began, and that role: nobody else in its pool has it.

    A worker that is started anew begins with the role of its config, whatever it had. So a pool may be left without one
    kind, although one of each stayed at every change.
    """
    if not view.settled:
        return None
    roles = {(worker.info.pool, worker.info.role) for worker in view.workers}
    for worker in view.workers:
        first: WorkerRole = "decode" if worker.info.role == "prefill" else "prefill"
        if worker.info.role_epoch % 2 and worker.live and (worker.info.pool, first) not in roles:
            return worker.info.node, first
    return None

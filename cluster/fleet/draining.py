"""What stores hold is given to others before they stop."""

from collections.abc import Awaitable, Callable, Sequence

from cluster.fleet.connection import HostFault
from cluster.fleet.install import Told
from cluster.fleet.opened import Opened
from cluster.fleet.progress import Progress
from cluster.fleet.survey import Hand
from cluster.hosts.orders import HostReport
from cluster.rundir import ClusterFault

DRAIN_S = 3600.0
"""A store of terabytes is given away over a network."""


async def drain(stores: Sequence[str], fleet: Opened, leaving: Sequence[Hand]) -> None:
    """Have these stores' blocks on others, for good.

    Raises:
        ClusterFault: no router can be asked, or a store has nobody to give its blocks to.
    """
    for store in stores:
        try:
            await fleet.router(list(leaving)).tell(["store", "drain", store], timeout_s=DRAIN_S)
        except HostFault as fault:
            raise ClusterFault(
                f"the blocks of {store} stay where they are: {fault}; without them: tracehaul stop "
                + " ".join(hand.host.name for hand in leaving)
            ) from fault


async def give_away(fleet: Opened, stores: Sequence[str], told: Told) -> None:
    """Have the blocks of stores that are about to be started anew on others, unless they are on their own disks or
    there are no others: then they are computed again.

    Raises:
        HostFault: it was begun, and does not end.
    """
    if fleet.config.disk_bytes or sum(hand.host.nodes.store for hand in fleet.hands) <= len(stores):
        return
    for store in stores:
        told(f"draining {store}")
        await fleet.router([]).tell(["store", "drain", store], timeout_s=DRAIN_S)


async def kept_blocks(
    fleet: Opened, hand: Hand, change: Callable[[Hand], Awaitable[HostReport]], shown: Progress
) -> HostReport:
    """Change what runs on a host, with its stores' blocks on others meanwhile."""
    before = await hand.report()
    pids = {node.name: node.pid for node in before.nodes if node.role == "store" and node.pid} if before else {}
    await give_away(fleet, list(pids), shown.of(hand.host.name))
    after = await change(hand)
    for node in after.nodes:
        if pids.get(node.name) == node.pid and node.pid is not None:  # nothing about it had changed: it serves on
            await fleet.router([]).tell(["store", "drain", node.name, "--cancel"])
    return after

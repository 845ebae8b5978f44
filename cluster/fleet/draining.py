"""What stores hold is given to others before they stop."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from cluster.fleet.connection import HostFault
from cluster.fleet.install import Told
from cluster.fleet.opened import Opened
from cluster.fleet.survey import Hand
from cluster.rundir import ClusterFault

DRAIN_S = 3600.0
"""A store of terabytes is given away over a network."""


async def drain(stores: Sequence[str], fleet: Opened, leaving: Sequence[Hand]) -> None:
    """Have these stores' blocks on others, for good.

    Raises:
        ClusterFault: no router can be asked, or a store has nobody to give its blocks to; all of them serve on.
    """
    asked = fleet.router(leaving)
    try:
        await _drained(asked, stores)
    except HostFault as fault:
        hosts = " ".join(hand.host.name for hand in leaving)
        raise ClusterFault(f"blocks stay where they are: {fault}; without them: tracehaul stop {hosts}") from fault


@asynccontextmanager
async def given_away(fleet: Opened, stores: Mapping[str, Hand], told: Told) -> AsyncGenerator[None]:
    """Inside, others have the blocks of these stores, by the hosts that they run on: they may be started anew. Those
    that were not serve on afterwards.

    Where stores have their own disks, or there are no others, blocks stay: they come back, or are computed again.

    Raises:
        HostFault: a store has nobody to give its blocks to, or does not end.
    """
    if not stores or fleet.config.disk_bytes or sum(hand.host.nodes.store for hand in fleet.hands) <= len(stores):
        yield
        return
    before = await _pids(stores)
    told(f"draining {', '.join(stores)}")
    asked = fleet.router(list(stores.values()))
    await _drained(asked, list(stores))
    try:
        yield
    finally:
        after = await _pids(stores)
        await _serve_on(asked, [name for name, pid in after.items() if pid is not None and pid == before[name]])


async def _drained(asked: Hand, stores: Sequence[str]) -> None:
    try:
        for store in stores:
            await asked.tell(["store", "drain", store], timeout_s=DRAIN_S)
    except (HostFault, asyncio.CancelledError):
        await _serve_on(asked, stores)
        raise


async def _serve_on(asked: Hand, stores: Sequence[str]) -> None:
    """They take blocks again. One that cannot be told is draining, which `tracehaul store drain NAME --cancel` ends."""
    for store in stores:
        with suppress(HostFault):
            await asked.tell(["store", "drain", store, "--cancel"])


async def _pids(stores: Mapping[str, Hand]) -> dict[str, int | None]:
    """Of those whose hosts answer."""
    pids: dict[str, int | None] = dict.fromkeys(stores)
    for hand in {hand.host.name: hand for hand in stores.values()}.values():
        with suppress(HostFault):
            report = await hand.report()
            pids |= {node.name: node.pid for node in report.nodes if node.name in stores} if report else {}
    return pids

"""Keeps the index equal to what the store nodes hold: one subscription per node."""

import asyncio
from contextlib import aclosing

from router.fleet.index import Index
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.log import Log
from tracehaul.wire.blocks import Events, Snapshot, Subscribe
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError, ProtocolError
from tracehaul.wire.ids import NodeId

log = Log(__name__)

RETRY_S = 0.5
SWEEP_BLOCKS = 2048
"""Entries of a lost node that are dropped at a time: about a millisecond."""
IDLE_TIMEOUT_S = 10.0


class StoreWatch:
    """Follows the store nodes' events; a hole, an overflow or a lost connection leads to a new snapshot."""

    def __init__(self, peers: Peers, index: Index) -> None:
        self._peers = peers
        self._index = index
        self._tasks: dict[NodeId, tuple[NodeInfo, asyncio.Task[None]]] = {}
        self._sweeping: asyncio.Task[None] | None = None

    def set_nodes(self, nodes: tuple[NodeInfo, ...]) -> None:
        """Membership changed: follow the new ones, forget those that left or were replaced."""
        stores = {info.node: info for info in nodes if info.role == "store"}
        for node, (info, task) in list(self._tasks.items()):
            if stores.get(node) != info:
                task.cancel()
                self._forget(node)
                del self._tasks[node]
        for node, info in stores.items():
            if node not in self._tasks:
                self._tasks[node] = (info, asyncio.create_task(self._follow(info), name=f"watch {node}"))

    async def close(self) -> None:
        """Follow nobody any more."""
        tasks = [task for _, task in self._tasks.values()]
        if self._sweeping is not None:
            tasks.append(self._sweeping)
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, info: NodeInfo) -> None:
        while True:
            try:
                await self._subscribe(info)
            except ClusterError as error:
                log.info("a store's events broke off: subscribing again", node=info.node, why=error)
            except Exception as error:
                log.error("a store's events could not be taken in: subscribing again", node=info.node, error=error)
            self._forget(info.node)
            await asyncio.sleep(RETRY_S)

    def _forget(self, node: NodeId) -> None:
        self._index.forget(node)
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweep(), name="sweep the index")

    async def _sweep(self) -> None:
        while self._index.sweep(SWEEP_BLOCKS):  # noqa: ASYNC110 - a turn for the others, not a wait
            await asyncio.sleep(0)

    async def _subscribe(self, info: NodeInfo) -> None:
        """Returns when the node's numbers do not add up."""
        stream = self._peers.stream(info.address, Subscribe(), idle_timeout_s=IDLE_TIMEOUT_S)
        async with aclosing(stream) as replies:
            async for reply in replies:
                match reply:
                    case Snapshot():
                        self._index.snapshot(info.node, reply)
                    case Events():
                        if not self._index.events(info.node, reply):
                            return
                    case _:
                        raise ProtocolError(f"{info.node} answered a subscription with {type(reply).__name__}")

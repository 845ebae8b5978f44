"""The way to a store node, made before anybody needs it: connections, the arena's place, handshakes, mappings."""

import asyncio

from kvstore.client.nodes import StoreNodes, StoreNodeView
from tracehaul.wire.errors import ClusterError, TimedOut

WARM_TIMEOUT_S = 5.0
"""Nobody waits for an attempt, so a peer or a machine that stalls for a moment is no failure."""
PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 2.0
"""Between attempts, each pause twice the one before."""
WARMING_MAX = 32
"""Nodes at a time: joining a large fleet is no storm."""


class Warming:
    """Attaches to each node that comes and sends nothing over its data plane, once, in the background.

    Tried again for as long as the node is a member.
    """

    def __init__(self, nodes: StoreNodes) -> None:
        self._nodes = nodes
        self._tasks: dict[StoreNodeView, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(WARMING_MAX)
        self._why: dict[StoreNodeView, str] = {}

    def follow(self) -> None:
        """The membership changed."""
        views = self._nodes.views()
        for view in [view for view in self._tasks if view not in views]:
            self._tasks.pop(view).cancel()
            self._why.pop(view, None)
        for view in views:
            if view not in self._tasks:
                self._tasks[view] = asyncio.get_running_loop().create_task(self._warm(view), name=f"warm {view.node}")

    async def done(self, timeout_s: float) -> None:
        """Wait until the way to every member is made.

        Raises:
            TimedOut: it is not within ``timeout_s``; says to whom, and why.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while pending := [task for task in self._tasks.values() if not task.done()]:
                    await asyncio.wait(pending)
        except TimeoutError:
            cold = [view for view, task in self._tasks.items() if not task.done()]
            why = "; ".join(f"{view.node}: {self._why.get(view, 'no answer yet')}" for view in cold)
            raise TimedOut(f"no way to the stores within {timeout_s:g} s: {why}") from None

    async def aclose(self) -> None:
        """Make no more."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _warm(self, view: StoreNodeView) -> None:
        pause_s = PAUSE_MIN_S
        while True:
            try:
                async with self._turns:
                    await self._nodes.warm(view, WARM_TIMEOUT_S)
            except ClusterError as error:
                self._why[view] = str(error)
            else:
                self._why.pop(view, None)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

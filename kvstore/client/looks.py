"""Asking all store nodes at once what they hold."""

import asyncio
from collections.abc import Collection, Sequence

from kvstore.client.nodes import StoreNodes, StoreNodeView
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Existing, Exists
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.ids import BlockHash, NodeId

LOOK_TIMEOUT_S = 0.5
"""What is not known to be there by then is not waited for."""
REST_S = 0.05
"""How long the slower nodes are still waited for once every block is known to be somewhere: a node that is frozen
costs no more where the others have everything."""


class Looks:
    """One client's looks. A node that does not answer in :data:`LOOK_TIMEOUT_S` is left alone for a moment after."""

    def __init__(self, nodes: StoreNodes) -> None:
        self._nodes = nodes
        self.reading: dict[NodeId, int] = {}
        """Reads under way on each node, as it said last."""
        self._late: set[asyncio.Task[bytes]] = set()

    async def look(self, hashes: Sequence[BlockHash], but: Collection[NodeId], timeout_s: float) -> dict[NodeId, bytes]:
        """What each live node, but for some, holds of these: a byte per block; empty where it did not say in time."""
        request = Exists(tuple(hashes))
        views = [view for view in self._nodes.live() if view.node not in but]
        loop = asyncio.get_running_loop()
        timeout_s = min(timeout_s, LOOK_TIMEOUT_S)
        asked = {view.node: loop.create_task(self._ask(view, request, timeout_s)) for view in views}
        try:
            await self._wait(list(asked.values()), len(hashes))
        except asyncio.CancelledError:
            for task in asked.values():
                task.cancel()
            raise
        for task in asked.values():
            if not task.done():  # it goes on: that it is late must be noticed
                self._late.add(task)
                task.add_done_callback(self._late.discard)
        return {node: task.result() if task.done() else b"" for node, task in asked.items()}

    async def aclose(self) -> None:
        """Stop waiting for those that are late."""
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)

    @staticmethod
    async def _wait(tasks: Sequence[asyncio.Task[bytes]], count: int) -> None:
        pending = dict.fromkeys(tasks)
        until_s: float | None = None
        while pending:
            left_s = None if until_s is None else until_s - clock.now_s()
            done, _ = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return
            for task in done:
                del pending[task]
            if until_s is None and _all_held([task.result() for task in tasks if task.done()], count):
                until_s = clock.now_s() + REST_S

    async def _ask(self, view: StoreNodeView, request: Exists, timeout_s: float) -> bytes:
        try:
            answer = await self._nodes.call(view, request, Existing, timeout_s)
        except ClusterError:
            self.reading.pop(view.node, None)
            return b""
        held = answer.held
        self.reading[view.node] = answer.reading
        return held if len(held) == len(request.hashes) else b""


def _all_held(answers: Sequence[bytes], count: int) -> bool:
    """Whether somebody has each block."""
    together = 0
    for answer in answers:
        together |= int.from_bytes(answer, "big")
    return together == int.from_bytes(b"\1" * count, "big")

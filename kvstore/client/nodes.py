"""A client's view of the store nodes: who lives, how to reach each arena, whom to leave alone for a moment."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.transfer.plane import Plane, choose
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import Attach, Attached, RegionDescriptor
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError, Overloaded, ProtocolError, TimedOut, TransferError, WrongNode
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash, Generation, NodeId
from tracehaul.wire.messages import Reply, Request

R = TypeVar("R", bound=Reply)

seldom = Seldom(Log(__name__))

ANSWER_S = 0.1
"""A node that does not answer a call with less time than this may be healthy: the caller was late."""
ATTACH_TIMEOUT_S = 0.5
"""The first thing that a node is asked, and the first after a failure: one that is frozen costs each call no more."""
NOTICE_TIMEOUT_S = 1.0
"""For what nobody waits for, and without which the store recovers by itself."""
LATE_REPLY_S = 5.0
"""How long the reply that grants something is still listened for, to give it back. What is granted later than that
ends by itself: a lease with its time, at most what the call had; a reservation passes on to the next who asks after
``reservation_quiet_s``, as nobody renews it, and its slot is freed ``reservation_ttl_s + late_write_s`` after."""


class StoreNodeView:
    """One life of one store node, as this process sees it."""

    __slots__ = ("attached", "broken_until_s", "info", "stuck")

    def __init__(self, info: NodeInfo) -> None:
        self.info = info
        self.attached: tuple[Plane, RegionDescriptor] | None = None
        self.broken_until_s = 0.0
        self.stuck: asyncio.Future[None] | None = None
        """A transfer that missed its deadline: each more would hold buffers until this one settles."""

    def is_live(self, now_s: float) -> bool:
        """Whether it may be asked for blocks or be given some."""
        return self.broken_until_s <= now_s and (self.stuck is None or self.stuck.done())

    @property
    def node(self) -> NodeId:
        """Its name."""
        return self.info.node


class StoreNodes:
    """The live store nodes. A node that just failed is left alone for ``break_s``, or while a transfer is stuck."""

    def __init__(self, peers: Peers, planes: Sequence[Plane], break_s: float) -> None:
        self._peers = peers
        self._planes = tuple(planes)
        self._break_s = break_s
        self._nodes: dict[NodeId, StoreNodeView] = {}
        self._draining: frozenset[NodeId] = frozenset()
        self._notices: set[asyncio.Task[None]] = set()

    def set(self, nodes: Sequence[NodeInfo], draining: Collection[NodeId] = ()) -> None:
        """Replace the membership; other roles are ignored. What is known of a node's former life is forgotten."""
        self._draining = frozenset(draining)
        views: dict[NodeId, StoreNodeView] = {}
        for info in sorted((info for info in nodes if info.role == "store"), key=lambda info: info.node):
            known = self._nodes.get(info.node)
            views[info.node] = known if known is not None and known.info == info else StoreNodeView(info)
        self._nodes = views

    def views(self) -> list[StoreNodeView]:
        """All members, by name."""
        return list(self._nodes.values())

    def life(self, node: NodeId, generation: Generation) -> StoreNodeView | None:
        """That life of a member, if it is the one that the membership says."""
        view = self._nodes.get(node)
        return view if view is not None and view.info.generation == generation else None

    def live(self) -> list[StoreNodeView]:
        """Members that have not just failed, by name."""
        now_s = clock.now_s()
        return [view for view in self._nodes.values() if view.is_live(now_s)]

    def kinds(self) -> frozenset[str]:
        """The transports by which members are reached; empty for one that is not known, or not any more. From any
        thread."""
        ways = [view.attached for view in self._nodes.values()]
        return frozenset("" if way is None else way[0].transfer.kind for way in ways)

    def find(self, node: NodeId) -> StoreNodeView | None:
        """The node, if it is live."""
        view = self._nodes.get(node)
        return view if view is not None and view.is_live(clock.now_s()) else None

    def find_home(self, node: NodeId) -> StoreNodeView | None:
        """The node, if it is live and takes new blocks."""
        return self.find(node) if node not in self._draining else None

    def home_of(self, block_hash: BlockHash, but: Sequence[NodeId]) -> StoreNodeView | None:
        """The live node, other than ``but``, that every process would choose for this hash (rendezvous hashing)."""
        candidates = [view for view in self.live() if view.node not in but and view.node not in self._draining]
        return max(candidates, key=lambda v: (checksum(v.node.encode() + block_hash), v.node), default=None)

    def failed(self, view: StoreNodeView, stuck: asyncio.Future[None] | None = None) -> None:
        """Leave a node alone for a moment, and until ``stuck`` has settled; find the way to it anew."""
        seldom.warning(
            "a store node failed: left alone for a moment",
            about=view.node,
            node=view.node,
            for_s=self._break_s,
            transfer_stuck=stuck is not None,
        )
        view.broken_until_s = clock.now_s() + self._break_s
        view.attached = None
        view.stuck = stuck or view.stuck

    async def call(self, view: StoreNodeView, request: Request, reply_type: type[R], timeout_s: float) -> R:
        """One call. Loss, silence and nonsense break the circuit; a refusal does not.

        Raises:
            ClusterError: no usable reply came.
        """
        _check_time(view, timeout_s)
        calling = self._peers.call(view.info.address, request, timeout_s=timeout_s)
        return await self._judged(view, calling, reply_type, timeout_s)

    async def _judged(self, view: StoreNodeView, calling: Awaitable[Reply], reply_type: type[R], timeout_s: float) -> R:
        try:
            reply = await calling
            if not isinstance(reply, reply_type):
                raise ProtocolError(f"{view.node} answered with {type(reply).__name__}, not {reply_type.__name__}")
        except Overloaded:
            raise
        except TimedOut:
            if timeout_s >= ANSWER_S:
                self.failed(view)
            raise
        except ClusterError:
            self.failed(view)
            raise
        return reply

    async def acquire(
        self,
        view: StoreNodeView,
        request: Request,
        reply_type: type[R],
        timeout_s: float,
        undo: Callable[[R], Request],
    ) -> R:
        """As :meth:`call`, for what must be given back: if nobody waits for the reply any more when it comes, since
        the caller was cancelled or its time was up, ``undo`` follows at once."""
        _check_time(view, timeout_s)
        calling = asyncio.get_running_loop().create_task(
            self._peers.call(view.info.address, request, timeout_s=timeout_s + LATE_REPLY_S)
        )

        def give_back(done: asyncio.Task[Reply]) -> None:
            if not done.cancelled() and done.exception() is None and isinstance(reply := done.result(), reply_type):
                self._send(view, undo(reply))  # it lives, whatever is thought of it

        try:
            return await self._judged(view, _within(calling, timeout_s), reply_type, timeout_s)
        except (asyncio.CancelledError, TimedOut):
            calling.add_done_callback(give_back)
            raise

    async def attach(self, view: StoreNodeView, timeout_s: float) -> tuple[Plane, RegionDescriptor]:
        """How to copy to and from a node's arena; asked once per life, and again after each failure.

        Raises:
            ClusterError: it cannot be reached, or is another life than the membership says.
        """
        if view.attached is None:
            view.attached = await self._attach(view, min(timeout_s, ATTACH_TIMEOUT_S))
        return view.attached

    async def warm(self, view: StoreNodeView, timeout_s: float) -> None:
        """Attach with patience, as nobody waits for it, and make the data plane's way there.

        Raises:
            ClusterError: it cannot be done now.
        """
        if view.attached is None:
            attached = await self._attach(view, timeout_s)
            view.attached = view.attached or attached
        plane, remote = view.attached
        try:
            await plane.transfer.read(remote, plane.region, (), timeout_s=timeout_s)
        except TransferError:  # one that is still under way holds no buffer
            self.failed(view)
            raise

    async def _attach(self, view: StoreNodeView, timeout_s: float) -> tuple[Plane, RegionDescriptor]:
        attached = await self.call(view, Attach(), Attached, timeout_s)
        if attached.generation != view.info.generation:
            self.failed(view)
            raise WrongNode(f"{view.node} is in life {attached.generation}, not {view.info.generation}")
        owner = f"{view.node}#{view.info.generation}"
        if any(region.owner != owner for region in attached.regions):
            # A transport takes our word for whose memory it is, and drops whom it took for that one before.
            self.failed(view)
            raise ProtocolError(f"{view.node} offers memory in the name of another")
        try:
            return choose(self._planes, attached.regions)
        except ClusterError:
            self.failed(view)
            raise

    def notify(self, view: StoreNodeView, request: Request) -> None:
        """Tell a node something in the background; silently lost if the node is."""
        if view.broken_until_s <= clock.now_s():
            self._send(view, request)

    def _send(self, view: StoreNodeView, request: Request) -> None:
        task = asyncio.get_running_loop().create_task(self._notify(view, request))
        self._notices.add(task)
        task.add_done_callback(self._notices.discard)

    async def _notify(self, view: StoreNodeView, request: Request) -> None:
        with contextlib.suppress(ClusterError):
            await self.call(view, request, Ok, NOTICE_TIMEOUT_S)

    async def aclose(self) -> None:
        """Wait for the notices under way, at most their timeout."""
        await asyncio.gather(*self._notices)


def _check_time(view: StoreNodeView, timeout_s: float) -> None:
    if timeout_s <= 0:
        raise TimedOut(f"no time left to ask {view.node}")


async def _within(calling: asyncio.Task[Reply], timeout_s: float) -> Reply:
    """The result of a task that goes on when this wait ends, by time or cancellation."""
    done, _ = await asyncio.wait((calling,), timeout=timeout_s)
    if not done:
        raise TimedOut(f"no reply within {timeout_s:.3f} s")
    return calling.result()

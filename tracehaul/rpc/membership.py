"""The node's side of membership: who else is there, as the router says."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from tracehaul.rpc.peers import Peers
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.cluster import Heartbeat, Join, Members, NodeInfo, NodeLoad
from tracehaul.wire.errors import ClusterError, PeerLost, ProtocolError, Untrusted, WrongPool

log = Log(__name__)
_seldom = Seldom(log)

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 3.0
"""A router that does not answer a heartbeat in this time is joined anew."""
IDLE_TIMEOUT_S = 5.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0


class Membership:
    """Keeps this node a member of the router's fleet while :meth:`run` runs.

    ``load`` is asked before each heartbeat; ``on_change`` is told of each list that differs from the one before.
    """

    def __init__(
        self,
        peers: Peers,
        router_address: str,
        info: NodeInfo,
        load: Callable[[], NodeLoad],
        on_change: Callable[[Members], None],
        heartbeat_s: float = HEARTBEAT_S,
        token: str = "",
    ) -> None:
        self._peers = peers
        self._router_address = router_address
        self._info = info
        self._load = load
        self._on_change = on_change
        self._heartbeat_s = heartbeat_s
        self._token = token
        self._members = Members(version=0, nodes=())
        self._joined = asyncio.Event()

    @property
    def members(self) -> Members:
        """The last list received; it outlives the connection to the router. Empty before the first."""
        return self._members

    @property
    def joined(self) -> asyncio.Event:
        """Set while the router lists us: for start-up and for health checks."""
        return self._joined

    async def run(self) -> None:
        """Join, and join again whenever the router is lost. Ends by cancellation, or by a bug's exception.

        Raises:
            WrongPool: the router will never take this node as it is.
            Untrusted: nor one with this certificate, or token. Of a node that was a member once, that may pass: new
                certificates are on their way.
        """
        backoff_s = BACKOFF_MIN_S
        was_member = False
        while True:
            error = await self._session()
            was_member = was_member or self._joined.is_set()
            if isinstance(error, WrongPool) or (isinstance(error, Untrusted) and not was_member):
                raise error
            if self._joined.is_set():
                self._joined.clear()
                backoff_s = BACKOFF_MIN_S
                log.warning("router lost", router=self._router_address, reason=error)
            elif isinstance(error, Untrusted):
                _seldom.warning("the router refuses this node", router=self._router_address, reason=error)
            else:
                log.info("router not reached", router=self._router_address, reason=error)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _session(self) -> ClusterError:
        """One membership, from joining to its loss; returns why it ended."""
        losses: list[ClusterError] = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow())
                group.create_task(self._beat())
        except* ClusterError as group_error:
            losses = _leaves(group_error)
        return losses[0]  # neither task ends without an error

    async def _follow(self) -> None:
        stream = self._peers.stream(self._router_address, Join(self._info, self._token), idle_timeout_s=IDLE_TIMEOUT_S)
        async with aclosing(stream) as replies:
            async for reply in replies:
                if not isinstance(reply, Members):
                    raise ProtocolError(f"the router answered Join with {type(reply).__name__}")
                self._take(reply)
        raise PeerLost("the router ended the membership")

    def _take(self, members: Members) -> None:
        if not self._joined.is_set():
            log.info("joined", router=self._router_address, nodes=len(members.nodes))
            self._joined.set()
        last = self._members
        changed = (members.nodes, members.draining) != (last.nodes, last.draining)
        self._members = members
        if changed:
            self._on_change(members)

    async def _beat(self) -> None:
        await self._joined.wait()  # a heartbeat before the join names an unknown node
        while True:
            beat = Heartbeat(self._info.node, self._info.generation, self._load())
            await self._peers.call(self._router_address, beat, timeout_s=HEARTBEAT_TIMEOUT_S)
            await asyncio.sleep(self._heartbeat_s)


def _leaves(group: BaseExceptionGroup[ClusterError]) -> list[ClusterError]:
    leaves: list[ClusterError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves

"""The node's side of membership: it joins every router, and who else is there is what they say together."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

import msgspec

from tracehaul.rpc.base import Replies
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.views import Views
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.cluster import Heartbeat, Join, Members, MembersChanged, NodeInfo, NodeLoad, Objection
from tracehaul.wire.errors import ClusterError, Fenced, JoinRefused, NameTaken, PeerLost, ProtocolError, Untrusted
from tracehaul.wire.ids import Epoch
from tracehaul.wire.messages import Reply
from tracehaul.wire.spent import Charge
from tracehaul.wire.version import WIRE

log = Log(__name__)
seldom = Seldom(log)

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 3.0
"""A router that does not answer a heartbeat in this time is joined anew."""
IDLE_TIMEOUT_S = 5.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
GRACE_S = 10.0
"""For so long what a lost router said counts beside what another says."""
TAKEN_S = 10.0
"""For so long a new life asks for the name of one that is heard: it may be frozen, and is silent soon."""
TAKEN_RETRY_S = 0.5


class _Link:
    """One session with one router."""

    def __init__(self, replies: Replies, role_epoch: int) -> None:
        self.replies = replies
        """Of the last Join; a router ends the stream of the one before."""
        self.role_epoch = role_epoch
        """As it said."""
        self.listed = asyncio.Event()
        self.joining = asyncio.Lock()


class Membership:
    """Keeps this node a member of the fleet while :meth:`run` runs: by a session with each router, none of which waits
    for another.

    ``load`` is asked before each join and heartbeat; ``on_change`` is told of each list that differs from the one
    before.
    """

    def __init__(
        self,
        peers: Peers,
        routers: Sequence[str],
        info: NodeInfo,
        load: Callable[[], NodeLoad],
        on_change: Callable[[Members], None],
        *,
        cluster: str = "",
        heartbeat_s: float = HEARTBEAT_S,
        token: str = "",
        history: Callable[[], tuple[Charge, ...]] | None = None,
    ) -> None:
        """``routers``: ``host:port`` of each one's control plane, until others are set. ``token``: the cluster's, for
        joining. ``history``: as :attr:`tracehaul.rpc.member.Member.history`."""
        self._peers = peers
        self._routers = tuple(dict.fromkeys(routers))
        self._turned = asyncio.Event()
        """Other routers were set."""
        self._info = info
        self._load = load
        self._on_change = on_change
        self._cluster = cluster
        self._heartbeat_s = heartbeat_s
        self._token = token
        self._history = history
        self._views = Views(GRACE_S)
        self._members = Members(version=0)
        self._in: set[str] = set()
        """Routers that list us."""
        self._epochs: dict[str, Epoch] = {}
        """What each of them said last that ours is."""
        self._joined = asyncio.Event()
        self._was_member = False
        self._ends = False
        """It is not to join again."""
        self._asking = asyncio.Lock()
        self._told = asyncio.Event()
        self._states = self._said = 0
        """How many states of this node were to be said at once, and the last of them that some router knows."""
        self._answers: dict[str, tuple[int, str]] = {}
        """Of each router that lists us: the last state that it knows, and why it objects to that."""
        self._hurry, self._heard = asyncio.Event(), asyncio.Event()

    @property
    def info(self) -> NodeInfo:
        """As others know it: with the epoch that it was issued."""
        return self._info

    @property
    def members(self) -> Members:
        """Who is there as far as this node has heard; it outlives the connections to routers. Empty at first."""
        return self._members

    @property
    def joined(self) -> asyncio.Event:
        """Set while at least one router lists us: for start-up and for health checks."""
        return self._joined

    def set_routers(self, routers: Sequence[str]) -> None:
        """These are the routers now. A new one is joined; another is left once it is not heard any more: that somebody
        does not know it is no reason to leave one that answers, nor that nobody knows any."""
        if routers:
            self._routers = tuple(dict.fromkeys(routers))
            self._turned.set()

    async def say(self) -> None:
        """Tell routers the node's load now, not with the next heartbeat; returns once one of them knows it."""
        state = self.hasten()
        while self._said < state:
            await self._heard.wait()

    async def ask(self) -> str:
        """As :meth:`say`, but returns once each router that lists us has answered, or is lost: why one of them objects
        to what was said; empty: none does."""
        state = self.hasten()
        while any(self._answers[router][0] < state for router in self._in):
            await self._heard.wait()
        if not self._in:
            return "no router lists this node"
        return next((why for router in sorted(self._in) if (why := self._answers[router][1])), "")

    def hasten(self) -> int:
        """Tell routers the node's load now, and do not wait for that; returns the number of what they are told."""
        self._states += 1
        self._hurry.set()
        self._hurry = asyncio.Event()
        return self._states

    def announce(self, info: NodeInfo) -> None:
        """It is another one from now on: its role has changed. Every router is told before any is told its load."""
        assert info.role_epoch > self._info.role_epoch
        self._info = info
        self.hasten()

    async def run(self) -> None:
        """Join each router, and join again whenever one is lost. Ends by cancellation, or by a bug's exception.

        Raises:
            Fenced: another life has our name.
            JoinRefused, Untrusted: no router has taken this node, and one says that it never will as it is.
        """
        keeping: dict[str, asyncio.Task[None]] = {}
        settling = asyncio.create_task(self._settle())
        turned = asyncio.create_task(self._turned.wait())
        try:
            while True:
                for router in self._routers:
                    if router not in keeping:
                        self._views.add(router)
                        keeping[router] = asyncio.create_task(self._keep(router), name=f"router {router}")
                tasks: list[asyncio.Task[Any]] = [settling, turned, *keeping.values()]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                keeping = {router: task for router, task in keeping.items() if task not in done}
                if turned in done:
                    self._turned.clear()
                    turned = asyncio.create_task(self._turned.wait())
        finally:
            self._ends = True
            tasks = [settling, turned, *keeping.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._in.clear()
            self._joined.clear()

    async def _keep(self, router: str) -> None:
        """One router, until it is none any more."""
        backoff_s = BACKOFF_MIN_S
        while True:
            error = await self._session(router)
            refused = isinstance(error, JoinRefused | Untrusted)
            # Of a node that was a member once, that may pass: new certificates are on their way, say.
            if isinstance(error, Fenced) or (refused and not self._was_member):
                raise error
            if router in self._in:
                self._leave(router)
                backoff_s = BACKOFF_MIN_S
                log.warning("router lost", router=router, reason=error)
            elif refused:
                seldom.warning("a router refuses this node", about=router, router=router, reason=error)
            else:
                log.info("router not reached", router=router, reason=error)
            if router not in self._routers:
                log.info("left a router that is none any more", router=router)
                self._epochs.pop(router, None)
                self._views.end(router, clock.now_s())
                return
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _session(self, router: str) -> ClusterError:
        """One membership, from joining to its loss; returns why it ended."""
        losses: list[ClusterError] = []
        try:
            link = await self._joining(router)
        except ClusterError as error:
            return error
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(router, link))
                group.create_task(self._beat(router, link))
        except* ClusterError as group_error:
            losses = _leaves(group_error)
        if self._ends:
            raise asyncio.CancelledError  # a group lets its tasks' errors go before it
        return losses[0]  # neither task ends without an error

    async def _joining(self, router: str) -> _Link:
        role_epoch = self._info.role_epoch
        return _Link(self._join(router) if self._info.epoch else await self._first(router), role_epoch)

    async def _follow(self, router: str, link: _Link) -> None:
        if router in self._in:
            link.listed.set()
        while True:
            replies = link.replies
            error: ClusterError = PeerLost("the router ended the membership")
            try:
                async with aclosing(replies):
                    async for reply in replies:
                        if link.replies is not replies:
                            break
                        self._take(router, reply)
                        link.listed.set()
            except ClusterError as lost:
                error = lost
            async with link.joining:
                if link.replies is replies:
                    raise error

    async def _first(self, router: str) -> Replies:
        """The stream of a life that has no epoch yet, after its first reply has brought one: one router is asked at a
        time, so that there is one epoch."""
        async with self._asking:
            until_s = clock.now_s() + TAKEN_S
            while True:
                replies = self._join(router)
                try:
                    self._take(router, await anext(replies))
                except StopAsyncIteration:
                    raise PeerLost("the router ended the membership") from None
                except NameTaken as taken:
                    if clock.now_s() >= until_s:
                        raise
                    seldom.warning("waiting for the name", about=router, router=router, reason=taken)
                else:
                    return replies
                await asyncio.sleep(TAKEN_RETRY_S)

    def _join(self, router: str) -> Replies:
        load = self._load()
        if self._history is not None:
            load = msgspec.structs.replace(load, charges=self._history())
        join = Join(self._info, load, self._cluster, WIRE, self._token)
        return self._peers.stream(router, join, idle_timeout_s=IDLE_TIMEOUT_S)

    async def _again(self, router: str, link: _Link) -> None:
        """Join as what the node is now, while it is a member as what it was."""
        async with link.joining:
            role_epoch, replies = self._info.role_epoch, self._join(router)
            try:
                first = await anext(replies)
            except StopAsyncIteration:
                raise PeerLost("the router ended the membership") from None
            link.replies, link.role_epoch = replies, role_epoch
            self._take(router, first)

    async def _beat(self, router: str, link: _Link) -> None:
        await link.listed.wait()  # a heartbeat before the join names an unknown node
        while self._epochs[router] == self._info.epoch:
            state, hurry, reply = self._states, self._hurry, None
            if link.role_epoch != self._info.role_epoch:
                await self._again(router, link)
            else:
                beat = Heartbeat(self._info.node, self._info.generation, self._load(), link.role_epoch)
                reply = await self._peers.call(router, beat, timeout_s=HEARTBEAT_TIMEOUT_S)
            self._knows(router, state, reply.why if isinstance(reply, Objection) else "")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await hurry.wait()
        raise PeerLost("another router has issued a higher epoch, which this one must know")

    def _knows(self, router: str, state: int, objection: str) -> None:
        if router in self._in:
            self._answers[router] = state, objection
        self._said = max(state, self._said)
        self._wake()

    def _wake(self) -> None:
        self._heard.set()
        self._heard = asyncio.Event()

    # --- what is known ------------------------------------------------------------------------------------

    def _take(self, router: str, reply: Reply) -> None:
        now_s = clock.now_s()
        match reply:
            case Members(epoch=epoch):
                self._views.listed(router, reply, now_s)
                self._epochs[router] = epoch
                if epoch > self._info.epoch:
                    self._info = msgspec.structs.replace(self._info, epoch=epoch)
                if router not in self._in:
                    log.info("joined", router=router, epoch=epoch, nodes=len(reply.nodes))
                    self._in.add(router)
                    self._answers[router] = 0, ""
                    self._joined.set()
                    self._was_member = True
            case MembersChanged():
                if not self._views.changed(router, reply, now_s):
                    raise ProtocolError(f"change {reply.version} of the member list follows none that we have")
            case _:
                raise ProtocolError(f"the router answered Join with {type(reply).__name__}")
        self._tell()

    def _leave(self, router: str) -> None:
        self._in.discard(router)
        self._answers.pop(router, None)
        self._wake()
        self._views.lost(router, clock.now_s())
        if not self._in:
            self._joined.clear()
        self._tell()

    def _tell(self) -> None:
        nodes, draining = self._views.merged(clock.now_s())
        self._told.set()
        if (nodes, draining) != (self._members.nodes, self._members.draining):
            self._members = Members(self._members.version + 1, nodes, draining)
            self._on_change(self._members)

    async def _settle(self) -> None:
        """Tell of what changes by time alone."""
        while True:
            self._told.clear()
            try:
                async with asyncio.timeout_at(self._views.deadline_s(clock.now_s())):
                    await self._told.wait()
            except TimeoutError:
                self._tell()


def _leaves(group: BaseExceptionGroup[ClusterError]) -> list[ClusterError]:
    leaves: list[ClusterError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves

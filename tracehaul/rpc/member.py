"""One node of the fleet, whatever its role: what it brings, and its life from listening to leaving."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

import msgspec

from tracehaul.rpc.base import Network, Server, Service
from tracehaul.rpc.membership import HEARTBEAT_S, Membership
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.log import Log
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad
from tracehaul.wire.errors import Fenced, JoinRefused, Untrusted
from tracehaul.wire.ids import Generation
from tracehaul.wire.spent import Charge

log = Log(__name__)

DRAIN_POLL_S = 0.05

Phase = Literal["ready", "stopping"]

_GENERATION_BITS = 53
"""What a number of JSON holds everywhere."""


def new_generation() -> Generation:
    """For a life that begins."""
    return Generation(secrets.randbits(_GENERATION_BITS))


class Member(NamedTuple):
    """What a node brings into the fleet."""

    info: NodeInfo
    """Its address is where it wants to listen; a port 0 is any free one."""
    service: Service
    load: Callable[[], NodeLoad]
    """What is so now: for each heartbeat, for metrics, and to know when nothing runs any more."""
    on_members: Callable[[Members], None]
    background: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = ()
    """Runs for as long as the node serves; its failure is the node's."""
    stats: Mapping[str, msgspec.Struct] = {}
    """Counts of its life, by the part of the node that counts."""
    announce: str = ""
    """The host that the others reach it by; empty: where it listens."""
    served: Callable[[], Coroutine[Any, Any, None]] | None = None
    """Waits until it can do what it is there for; None: as soon as it is a member. Its load says so, too."""
    joins: Callable[[Membership], None] | None = None
    """Given its membership, by which routers are told, before anybody asks it for anything."""
    news: Callable[[], Coroutine[Any, Any, None]] | None = None
    """Waits until its load says something that does not wait for the next heartbeat; None: it never does."""
    history: Callable[[], tuple[Charge, ...]] | None = None
    """In place of its load's charges, for a router that is joined; None: it has none."""


class Serving:
    """A node that listens; :meth:`run` makes it a member."""

    def __init__(
        self,
        member: Member,
        server: Server,
        peers: Peers,
        routers: Sequence[str],
        *,
        cluster: str = "",
        heartbeat_s: float = HEARTBEAT_S,
        token: str = "",
    ) -> None:
        info = msgspec.structs.replace(member.info, address=server.address)
        self.membership = Membership(
            peers,
            routers,
            info,
            member.load,
            member.on_members,
            cluster=cluster,
            heartbeat_s=heartbeat_s,
            token=token,
            history=member.history,
        )
        self._member = member
        if member.joins is not None:
            member.joins(self.membership)

    @property
    def info(self) -> NodeInfo:
        """As others know it."""
        return self.membership.info

    async def run(self, stopping: asyncio.Event, *, drain_timeout_s: float, told: Callable[[Phase], None]) -> None:
        """Join, serve until ``stopping`` is set; then leave, so that no work comes, and let what runs end.

        Raises:
            Fenced: another life has this node's name.
            JoinRefused, Untrusted: no router takes this node as it is.
            ExceptionGroup: what runs in the background failed.
        """
        try:
            await self._serve(stopping, drain_timeout_s, told)
        except ExceptionGroup as failed:
            if ended := failed.subgroup((Fenced, JoinRefused, Untrusted)):
                raise ended.exceptions[0] from None
            raise

    async def _serve(self, stopping: asyncio.Event, drain_timeout_s: float, told: Callable[[Phase], None]) -> None:
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(work()) for work in self._member.background]
            member = group.create_task(self.membership.run(), name="membership")
            stop = group.create_task(stopping.wait())
            ready = group.create_task(self._ready())
            background.append(group.create_task(self._tell()))
            await asyncio.wait([stop, ready], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if not stop.done():
                told("ready")
            await stop
            told("stopping")
            member.cancel()
            await self._drain(drain_timeout_s)
            for task in background:
                task.cancel()

    async def _ready(self) -> None:
        await self.membership.joined.wait()
        if self._member.served is not None:
            await self._member.served()
            await self.membership.say()

    async def _tell(self) -> None:
        while self._member.news is not None:
            await self._member.news()
            await self.membership.say()

    async def _drain(self, timeout_s: float) -> None:
        load = self._member.load
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (now := load()).running or now.waiting:  # noqa: ASYNC110 - once in a life, not worth an event
                    await asyncio.sleep(DRAIN_POLL_S)
            return
        log.warning("steps were cut off", running=load().running, waiting=load().waiting)


@asynccontextmanager
async def serving(
    member: Member,
    network: Network,
    peers: Peers,
    routers: Sequence[str],
    *,
    cluster: str = "",
    heartbeat_s: float = HEARTBEAT_S,
    token: str = "",
) -> AsyncGenerator[Serving]:
    """Listen where ``member`` wants to, for as long as the context is open; see :class:`Membership` for the rest.

    Raises:
        OSError: the address cannot be bound.
    """
    server = await network.listen(member.info.address, member.service, member.announce)
    try:
        yield Serving(member, server, peers, routers, cluster=cluster, heartbeat_s=heartbeat_s, token=token)
    finally:
        await server.close()

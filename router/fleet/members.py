"""Who is in the cluster: nodes join over a stream and prove every second that they live."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from router.fleet.pools import Pool, pools_of, refusal
from tracehaul.rpc.base import CallContext
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import Heartbeat, Join, Members, NodeInfo, NodeLoad
from tracehaul.wire.errors import WrongNode, WrongPool
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request

log = Log(__name__)

SUSPECT_AFTER_S = 3.5
"""Silence after which a node gets no new work: three heartbeats and some slack."""
LOST_AFTER_S = 10.0
"""Silence after which a node is no member any more: one that is frozen, or cut off. If it goes on it joins again."""


class NodeStatus(msgspec.Struct, frozen=True):
    """One line of ``tracehaul status``."""

    info: NodeInfo
    load: NodeLoad
    health: str
    """``ready``; ``draining``; or ``suspect`` when heartbeats are late."""
    heartbeat_age_s: float


@dataclass
class _Member:
    info: NodeInfo
    load: NodeLoad
    heard_s: float
    silent: bool = False
    """Whether its silence has been told."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class MemberRegistry:
    """The router's rpc service. ``on_change`` is called with the full list after each join and leave.

    ``models``: what each pool serves, by the pool's name; empty: whatever its first worker says.
    """

    def __init__(
        self, on_change: Callable[[tuple[NodeInfo, ...]], None], models: Mapping[str, str] | None = None
    ) -> None:
        self._members: dict[NodeId, _Member] = {}
        self._version = 0
        self._on_change = on_change
        self._models = dict(models or {})

    async def call(self, request: Request, context: CallContext) -> Reply:
        match request:
            case Ping():
                return Ok()
            case Heartbeat(node, generation, load):
                member = self._members.get(node)
                if member is None or member.info.generation != generation:
                    raise WrongNode(f"{node}#{generation} is not a member: join first")
                was_draining = member.load.draining
                member.load = load
                if member.silent:
                    member.silent = False
                    log.info("a node is heard again", node=node, silent_s=clock.now_s() - member.heard_s)
                member.heard_s = clock.now_s()
                if load.draining != was_draining:
                    log.info("a node is draining" if load.draining else "a node takes new blocks again", node=node)
                    self._changed()
                return Ok()
            case _:
                raise WrongNode(f"the router does not serve {type(request).__name__}")

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, Join):
            raise WrongNode(f"the router does not serve {type(request).__name__}")
        info = request.info
        before = self._members.get(info.node)
        if before is not None and before.info.generation > info.generation:
            raise WrongNode(f"{info.node} lives on as generation {before.info.generation}: this one is fenced")
        why = refusal(info, self.infos(), self._models)
        if why is not None:
            log.error("refused a node", node=info.node, why=why)
            raise WrongPool(why)
        member = _Member(info, NodeLoad(), clock.now_s())
        self._members[info.node] = member
        if before is not None:
            before.changed.set()  # its stream sees that it was replaced, and ends
        log.info("a node joined", node=info.node, role=info.role, pool=info.pool, address=info.address)
        self._changed()
        try:
            while self._members.get(info.node) is member:
                member.changed.clear()
                yield Members(self._version, self.infos(), self.draining())
                await self._change_or_silence(member)
        finally:
            if self._members.get(info.node) is member:
                del self._members[info.node]
                log.info("a node left", node=info.node)
                self._changed()

    def disconnected(self, peer: str) -> None:
        """A member leaves with its Join stream."""

    def infos(self) -> tuple[NodeInfo, ...]:
        """Every member, by name."""
        return tuple(self._members[node].info for node in sorted(self._members))

    def draining(self) -> tuple[NodeId, ...]:
        """Members that are about to leave, by name."""
        return tuple(node for node in sorted(self._members) if self._members[node].load.draining)

    def pools(self) -> dict[str, Pool]:
        """Those with a decode worker that may get new work, by the name that clients call their models by."""
        return pools_of(self.live("decode"))

    def live(self, role: str, pool: str | None = None) -> list[NodeInfo]:
        """Members of a role, and of a pool if one is named, that may get new work, by name."""
        now_s = clock.now_s()
        members = [self._members[node] for node in sorted(self._members)]
        for member in members:
            if now_s - member.heard_s >= SUSPECT_AFTER_S and not member.silent:
                member.silent = True
                silent_s = now_s - member.heard_s
                log.warning("a node is silent: no new work for it", node=member.info.node, silent_s=silent_s)
        return [
            member.info
            for member in members
            if member.info.role == role
            and pool in (None, member.info.pool)
            and now_s - member.heard_s < SUSPECT_AFTER_S
            and not member.load.draining
        ]

    def load(self, node: NodeId) -> NodeLoad:
        """What a member last said of itself."""
        member = self._members.get(node)
        return member.load if member is not None else NodeLoad()

    def has_tiers(self, node: NodeId) -> bool:
        """Whether a store node has anything below its memory."""
        load = self.load(node)
        return load.disk_bytes_max > 0 or load.s3_bytes_max > 0

    def loads(self, infos: Sequence[NodeInfo]) -> list[NodeLoad]:
        """What each of these members said last."""
        return [self._members[info.node].load for info in infos]

    def statuses(self) -> list[NodeStatus]:
        """Every member with its load and health, by name."""
        now_s = clock.now_s()
        statuses: list[NodeStatus] = []
        for node in sorted(self._members):
            member = self._members[node]
            age_s = now_s - member.heard_s
            health = "draining" if member.load.draining else "ready"
            if age_s >= SUSPECT_AFTER_S:
                health = "suspect"
            statuses.append(NodeStatus(member.info, member.load, health, age_s))
        return statuses

    async def _change_or_silence(self, member: _Member) -> None:
        """Returns when the list changed; a member that is silent for too long is taken off it."""
        node = member.info.node
        while not member.changed.is_set():
            try:
                async with asyncio.timeout_at(member.heard_s + LOST_AFTER_S):
                    await member.changed.wait()
            except TimeoutError:
                if member.heard_s + LOST_AFTER_S <= clock.now_s() and self._members.get(node) is member:
                    log.warning("a node is no member any more", node=node, silent_s=LOST_AFTER_S)
                    del self._members[node]
                    self._changed()
                    return

    def _changed(self) -> None:
        self._version += 1
        for member in self._members.values():
            member.changed.set()
        self._on_change(self.infos())

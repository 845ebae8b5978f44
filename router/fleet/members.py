"""Who is in the cluster: nodes join over a stream and prove every second that they live."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from router.fleet.epochs import Epochs
from router.fleet.flips import FlipConfig, View, Worker, may_flip
from router.fleet.listening import Listener, Nobody
from router.fleet.lists import MemberList
from router.fleet.pools import WORKERS, Pool, pools_of, refusal
from tracehaul.rpc.base import CallContext
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import Heartbeat, Join, NodeInfo, NodeLoad, Objection, Viewer
from tracehaul.wire.errors import ClusterError, Fenced, NameTaken, WrongCluster, WrongNode, WrongPool, WrongVersion
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.version import WIRE, understands

log = Log(__name__)

SUSPECT_AFTER_S = 3.5
"""Silence after which a node gets no new work: three heartbeats and some slack."""
LOST_AFTER_S = 10.0
"""Silence after which a node is no member any more: one that is frozen, or cut off. If it goes on it joins again."""
TICK_S = 0.5
"""How often that is looked at."""
STOOD_STILL_S = 1.0
"""A router that looks so much later than it meant to has not run, and heard nobody."""
BURST_S = 0.05
BURST_NODE_S = 0.0005
"""Changes are told together, at most so long after they happened: the second for each member, as all are told."""


class NodeStatus(msgspec.Struct, frozen=True):
    """One line of ``tracehaul status``."""

    info: NodeInfo
    load: NodeLoad
    health: str
    """``ready``; ``joining`` while it cannot serve; ``turning`` while its role is changed; ``draining``; or
    ``suspect`` when heartbeats are late."""
    heartbeat_age_s: float


@dataclass
class Terms:
    """What a node must fit to be a member."""

    models: Mapping[str, str] = field(default_factory=dict[str, str])
    """What each pool serves, by the pool's name; empty: whatever its first worker says."""
    cluster: str = ""
    """The name of the cluster; empty: it has none, and takes nodes of any."""
    epochs: Epochs = field(default_factory=Epochs)
    on_epoch: Callable[[], None] = lambda: None
    """Called when there is something new in ``epochs``."""
    wall_s: Callable[[], float] = clock.wall_s


@dataclass
class _Member:
    info: NodeInfo
    load: NodeLoad
    heard_s: float
    list: MemberList
    silent: bool = False
    """Whether its silence has been told."""
    ended: ClusterError | None = None
    """Why it is none any more, if not by its own will."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class MemberRegistry:
    """The router's rpc service. ``on_stores`` is called with all store nodes after one of them joined or left."""

    def __init__(
        self,
        on_stores: Callable[[tuple[NodeInfo, ...]], None],
        terms: Terms | None = None,
        flips: FlipConfig | None = None,
    ) -> None:
        self._members: dict[NodeId, _Member] = {}
        self._on_stores = on_stores
        self._terms = terms or Terms()
        self._flips = flips or FlipConfig()
        self._turned_s: dict[str, float] = {}
        """When a role changed last, by pool."""
        self._lists: dict[Viewer, MemberList] = {}
        self._touched: dict[NodeId, None] = {}
        """Whom nobody was told of yet."""
        self._telling: asyncio.TimerHandle | None = None
        self.looked: Callable[[], None] = lambda: None
        """Called after the members were looked after, now and then."""
        self._ticking: asyncio.TimerHandle | None = None
        self._tick_at_s = 0.0
        self._whole_at_s: float | None = None
        """When everybody who lives has had the time to join this router; None before the first has."""
        self.listener: Listener = Nobody()
        self._given_up_until_s = 0.0
        """Until then nodes may leave since the router stood still."""

    async def call(self, request: Request, context: CallContext) -> Reply:
        match request:
            case Ping():
                return Ok()
            case Heartbeat():
                return self._heard(request)
            case _:
                raise WrongNode(f"the router does not serve {type(request).__name__}")

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, Join):
            raise WrongNode(f"the router does not serve {type(request).__name__}")
        member = self._admit(request)
        node = member.info.node
        try:
            async with aclosing(self._tell(member)) as replies:
                async for reply in replies:
                    yield reply
        finally:
            if self._members.get(node) is member:
                self._remove(node)
                log.info("a node left", node=node)
        if member.ended is not None:
            raise member.ended

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
            and member.load.serving
            and not member.load.draining
            and not member.load.turning
        ]

    def view(self) -> View:
        """The fleet, for who wants to change roles in it."""
        now_s = clock.now_s()
        members = [member for _, member in sorted(self._members.items()) if member.info.role in WORKERS]
        workers = [
            Worker(
                member.info,
                turning=bool(member.load.turning),
                live=now_s - member.heard_s < SUSPECT_AFTER_S and member.load.serving and not member.load.draining,
            )
            for member in members
        ]
        settled = self._whole_at_s is not None and now_s >= self._whole_at_s
        return View(workers, len(self.live("store")), settled, dict(self._turned_s))

    def may_flip(self, node: NodeId, role: str, view: View | None = None) -> str | None:
        """Why that worker may not have that role now, by what this router knows; None if it may."""
        return may_flip(view or self.view(), node, role, clock.now_s(), self._flips.cooldown_s)

    def known(self, node: NodeId) -> NodeInfo | None:
        """What the member of that name says of itself."""
        member = self._members.get(node)
        return member.info if member is not None else None

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
            health = "draining" if member.load.draining else "ready" if member.load.serving else "joining"
            if member.load.turning:
                health = "turning"
            if age_s >= SUSPECT_AFTER_S:
                health = "suspect"
            statuses.append(NodeStatus(member.info, member.load, health, age_s))
        return statuses

    # --- joining and leaving ------------------------------------------------------------------------------

    def _admit(self, join: Join) -> _Member:
        """A new member, instead of the one of its name if there is one.

        Raises:
            ClusterError: it is none.
        """
        info, terms, now_s = join.info, self._terms, clock.now_s()
        node = info.node
        if not understands(WIRE, join.wire):
            raise self._refused(WrongVersion(f"{node} speaks wire version {join.wire}, and this cluster {WIRE}"))
        if terms.cluster and join.cluster and join.cluster != terms.cluster:
            raise self._refused(WrongCluster(f"{node} belongs to cluster {join.cluster!r}, not to {terms.cluster!r}"))
        before = self._members.get(node)
        if info.epoch == 0 and before is not None and before.info.generation != info.generation:
            silent_s = now_s - before.heard_s
            if silent_s < SUSPECT_AFTER_S:
                where = " on ".join(filter(None, (before.info.address, before.info.host)))
                raise NameTaken(f"another {node} is alive at {where}, heard {silent_s:.1f} s ago")
        said = before.info if before is not None and before.info.generation == info.generation else info
        if info.role_epoch < said.role_epoch:
            raise WrongNode(f"{node} has said since then that it is a {said.role} worker")
        why = refusal(info, self.infos(), terms.models)
        if why is not None:
            raise self._refused(WrongPool(why))
        if info.epoch == 0:
            epoch = terms.epochs.issue(node, info.generation, terms.wall_s())
        else:
            epoch = terms.epochs.shown(node, info.epoch, info.generation)
        if epoch is None:
            log.warning("fenced a node: a later life has its name", node=node, generation=info.generation)
            raise Fenced(f"another {node} has taken the place of this one")
        terms.on_epoch()
        info = msgspec.structs.replace(info, epoch=epoch)
        if before is not None:
            self._end(before, info)
            if before.info.generation != info.generation:
                self.listener.gone(before.info, now_s - before.heard_s)
        member = _Member(info, join.load, now_s, self._list(Viewer(info.role, info.pool)))
        self._members[node] = member
        self._tell_of(member, join.load, new=join.info.epoch == 0)
        log.info("a node joined", node=node, role=info.role, pool=info.pool, address=info.address, epoch=epoch)
        if info.role_epoch > said.role_epoch:
            log.info("a node has another role", node=node, was=said.role, role=info.role, role_epoch=info.role_epoch)
            self._turned_s[info.pool] = now_s
        self._changed(info)
        self._look(now_s)
        return member

    def _refused(self, why: ClusterError) -> ClusterError:
        log.error("refused a node", why=why)
        return why

    def _end(self, before: _Member, info: NodeInfo) -> None:
        if before.info.generation != info.generation:
            log.warning("a node was replaced", node=info.node, address=before.info.address, by=info.address)
            before.ended = Fenced(f"another {info.node} has taken the place of this one")
        before.wake.set()

    def _list(self, viewer: Viewer) -> MemberList:
        found = self._lists.get(viewer)
        if found is None:
            found = self._lists[viewer] = MemberList(viewer, self.infos(), self.draining())
        return found

    def _remove(self, node: NodeId) -> None:
        member = self._members.pop(node)
        self._changed(member.info)
        self.listener.gone(member.info, clock.now_s() - member.heard_s)

    def _tell_of(self, member: _Member, load: NodeLoad, *, new: bool) -> None:
        """It says this of itself: whom it worked for is the listener's business alone."""
        self.listener.heard(member.info, load, clock.now_s(), new=new)
        member.load = msgspec.structs.replace(load, charges=()) if load.charges else load

    def _heard(self, beat: Heartbeat) -> Reply:
        node, load = beat.node, beat.load
        member = self._members.get(node)
        if member is None or (member.info.generation, member.info.role_epoch) != (beat.generation, beat.role_epoch):
            raise WrongNode(f"{node}#{beat.generation} is not a member: join first")
        objection = None
        if load.turning and not member.load.turning:
            objection = self.may_flip(node, load.turning)
            load = msgspec.structs.replace(load, turning="" if objection else load.turning)
            log.info("a node wants another role", node=node, role=load.turning, objection=objection)
        before, now_s = member.load, clock.now_s()
        self._tell_of(member, load, new=False)
        if member.silent:
            member.silent = False
            log.info("a node is heard again", node=node, silent_s=now_s - member.heard_s)
        member.heard_s = now_s
        if load.serving != before.serving or load.fault != before.fault:
            log.info("a node serves" if load.serving else "a node cannot serve", node=node, fault=load.fault)
        if load.draining != before.draining:
            log.info("a node is draining" if load.draining else "a node takes new blocks again", node=node)
            self._touch(node)
        return Ok() if objection is None else Objection(objection)

    # --- silence ------------------------------------------------------------------------------------------

    def _look(self, now_s: float) -> None:
        """Begin to look after the members, if nobody does."""
        if self._whole_at_s is None:
            self._whole_at_s = now_s + LOST_AFTER_S
        if self._ticking is None:
            self._tick_at_s = now_s + TICK_S
            self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        now_s = clock.now_s()
        late_s = now_s - self._tick_at_s
        if late_s > STOOD_STILL_S:
            log.warning("this router stood still: nodes may have given it up, and join again", for_s=late_s)
            self._whole_at_s = self._given_up_until_s = now_s + LOST_AFTER_S
            for member in self._members.values():
                member.heard_s = min(now_s, member.heard_s + late_s)
        for node, member in list(self._members.items()):
            if member.heard_s + LOST_AFTER_S <= now_s:
                log.warning("a node is no member any more", node=node, silent_s=now_s - member.heard_s)
                member.ended = WrongNode(f"{node} was silent for {LOST_AFTER_S:g} s: join again")
                self._remove(node)
                member.wake.set()
        self.looked()
        if self._members:
            self._look(now_s)

    # --- telling ------------------------------------------------------------------------------------------

    async def _tell(self, member: _Member) -> AsyncGenerator[Reply, None]:
        """The list that the member needs, and what becomes of it, for as long as it is one."""
        told: int | None = None
        while self._members.get(member.info.node) is member:
            member.wake.clear()
            changes = member.list.since(told) if told is not None else None
            if changes is None:
                told = member.list.version
                yield member.list.whole(member.info.epoch, self._settles_s())
            for change in changes or ():
                told = change.version
                yield change
            if told == member.list.version:
                await member.wake.wait()

    def _settles_s(self) -> float:
        return max(0.0, (self._whole_at_s or 0.0) - clock.now_s())

    def _changed(self, info: NodeInfo) -> None:
        if info.role == "store":
            self._on_stores(tuple(member.info for member in self._members.values() if member.info.role == "store"))
        self._touch(info.node)

    def _touch(self, node: NodeId) -> None:
        self._touched[node] = None
        if self._telling is None:
            burst_s = BURST_S + BURST_NODE_S * len(self._members)
            self._telling = asyncio.get_running_loop().call_later(burst_s, self._publish)

    def _publish(self) -> None:
        self._telling = None
        touched = {node: m.info if (m := self._members.get(node)) is not None else None for node in self._touched}
        self._touched.clear()
        draining = self.draining()
        settles_s = max(0.0, self._given_up_until_s - clock.now_s())
        changed = {id(found) for found in self._lists.values() if found.publish(touched, draining, settles_s)}
        for member in self._members.values():
            if id(member.list) in changed:
                member.wake.set()

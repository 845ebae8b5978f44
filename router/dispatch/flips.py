"""Changes workers' roles, one at a time, and says whether it has come to that.

The order goes to the worker, with the epochs of its life and of its role; the worker asks every router that lists it,
lets what it runs end, and says by its announcement that it has the new role: that, and no answer, counts here.
"""

import asyncio
from contextlib import aclosing

import msgspec

from router.fleet.flips import FlipConfig, goes_back
from router.fleet.members import LOST_AFTER_S, MemberRegistry
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.cluster import FLIP_MARGIN_S, Flip, Flipped, NodeInfo, WorkerRole
from tracehaul.wire.errors import ClusterError, TimedOut
from tracehaul.wire.ids import NodeId

log = Log(__name__)

IDLE_TIMEOUT_S = 5.0
"""Longest silence of a worker: a living one proves itself every second."""
VERIFY_S = LOST_AFTER_S + 2.0
"""By then a worker has been heard, or is no member any more."""
VERIFY_POLL_S = 0.02
BACK_PAUSE_S = 5.0
"""Between two attempts to send a worker back to the role that nobody has."""


class FlipStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    flipped: int = 0
    refused: int = 0
    """By what this router knows: nobody was asked."""
    failed: int = 0
    """Ordered, and not come to pass."""


class FlipOutcome(msgspec.Struct, frozen=True):
    """What came of it."""

    node: NodeId
    role: str
    """What it has now, as far as is known; empty: it is no member any more."""
    flipped: bool
    why: str
    """Why it is not; empty if it is."""
    seconds: float


class Flips:
    """One router's."""

    def __init__(self, peers: Peers, members: MemberRegistry, config: FlipConfig) -> None:
        self.stats = FlipStats()
        self.config = config
        self._peers = peers
        self._members = members
        self._under_way: set[str] = set()
        """Pools."""
        self._tasks = Tasks("flips")
        self._back_s = 0.0
        """When a worker may be sent back next."""
        members.looked = self._look

    async def close(self) -> None:
        """Change nothing more; what is under way is called off."""
        self._members.looked = lambda: None
        await self._tasks.close()

    def _look(self) -> None:
        now_s, back = clock.now_s(), goes_back(self._members.view())
        if back is None or now_s < self._back_s or self._under_way:
            return
        node, role = back
        if self._members.may_flip(node, role) is None:
            self._back_s = now_s + BACK_PAUSE_S
            log.warning("nobody has this role: a worker that had it goes back to it", role=role, node=node)
            self._tasks.start(self.flip(node, role), "back")

    async def flip(self, node: NodeId, role: WorkerRole) -> FlipOutcome:
        """Let that worker have that role. Cancelled, it is called off."""
        began_s = clock.now_s()
        why, info = self._members.may_flip(node, role), self._members.known(node)
        if why is None and info is not None and info.pool in self._under_way:
            why = "this router changes another worker's role"
        if why is not None or info is None:
            self.stats.refused += 1
            return self._outcome(node, why or "it is no member", began_s)
        self._under_way.add(info.pool)
        try:
            failure = await self._order(info, role)
            why = await self._verified(info, role, failure)
        finally:
            self._under_way.discard(info.pool)
        outcome = self._outcome(node, why, began_s)
        if outcome.flipped:
            self.stats.flipped += 1
            log.info("a role was changed", node=node, role=role, seconds=outcome.seconds)
        else:
            self.stats.failed += 1
            log.warning("a role was not changed", node=node, wanted=role, why=why, seconds=outcome.seconds)
        return outcome

    def _outcome(self, node: NodeId, why: str, began_s: float) -> FlipOutcome:
        info = self._members.known(node)
        return FlipOutcome(node, "" if info is None else info.role, not why, why, clock.now_s() - began_s)

    async def _order(self, info: NodeInfo, role: WorkerRole) -> str:
        """What the worker had against it, or what became of the order; empty: it says that it is done."""
        order = Flip(info.generation, info.epoch, info.role_epoch, role, self.config.drain_s)
        log.info("a role is to be changed", node=info.node, role=role, role_epoch=info.role_epoch)
        try:
            async with (
                asyncio.timeout(self.config.drain_s + FLIP_MARGIN_S),
                aclosing(self._peers.stream(info.address, order, idle_timeout_s=IDLE_TIMEOUT_S)) as replies,
            ):
                reply = await anext(replies, None)
        except TimeoutError:
            return str(TimedOut("the worker did not get there in time"))
        except ClusterError as error:
            return str(error) or error.code
        return "" if isinstance(reply, Flipped) else f"the worker answered with {type(reply).__name__}"

    async def _verified(self, before: NodeInfo, role: WorkerRole, failure: str) -> str:
        """Why it does not have that role now; empty: it does. Waits until the worker has told one or the other."""
        until_s = clock.now_s() + VERIFY_S
        said = failure or "it said that it is done"
        while True:
            info = self._members.known(before.node)
            if info is None:
                return f"{said}; it is no member any more"
            if info.generation != before.generation:
                return f"{said}; it has begun a new life, as a {info.role} worker"
            if info.role_epoch > before.role_epoch:
                return "" if info.role == role else "it was told to have another role since then"
            if failure and not self._members.load(before.node).turning:
                return failure  # it goes on as what it was
            if clock.now_s() >= until_s:
                return f"{said}; nothing was heard of it since"
            await asyncio.sleep(VERIFY_POLL_S)

"""Which service a worker has now: that of its role, and the change of it while its engine and its memory stay.

All services are over one host, so what was resident for the one is resident for the other, and a step that has begun
under the one can end under it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

import msgspec

from tracehaul.rpc.base import CallContext, Service
from tracehaul.rpc.membership import Membership
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.cluster import FLIP_MARGIN_S, Flip, Flipped, Members, NodeInfo, NodeLoad, WorkerRole
from tracehaul.wire.errors import ClusterError, InvalidRequest, TimedOut, Unavailable, WrongNode
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import ForgetContext, KeepContext
from worker.announce import announced
from worker.host import WorkerHost
from worker.pressure import LEAVING_MAX_S
from worker.taking_over import TakingOver

log = Log(__name__)

POLL_S = 0.02
SAY_S = 1.0
"""What is left of a flip's time once everything has left."""


class StepService(Service, Protocol):
    """What a role makes of a host."""

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        ...

    @property
    def taking_over(self) -> TakingOver | None:
        """What it remembers of lost routers' steps; None: nothing."""
        ...


class Roles:
    """A worker's service. ``node`` is who it is at first, ``services`` what each role makes of ``host``."""

    def __init__(self, node: NodeInfo, host: WorkerHost, services: Mapping[WorkerRole, StepService]) -> None:
        self.node = node
        """With its role as it is now."""
        self._host = host
        self._services = services
        self._membership: Membership | None = None
        self._turning: WorkerRole | None = None
        self.closed = False
        """No step begins here now."""

    def joins(self, membership: Membership) -> None:
        """By it routers are told."""
        self._membership = membership

    @property
    def taking_over(self) -> TakingOver | None:
        """What is remembered of lost routers' steps, by whatever role."""
        found = (service.taking_over for service in self._services.values())
        return next((each for each in found if each is not None), None)

    def load(self, load: NodeLoad) -> NodeLoad:
        """With what it is about to be."""
        return msgspec.structs.replace(load, turning=self._turning or "")

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        for service in self._services.values():
            service.set_members(members)

    async def call(self, request: Request, context: CallContext) -> Reply:
        # Contexts outlive the role in which they came.
        role = "decode" if isinstance(request, KeepContext | ForgetContext) else self._role
        return await self._services[role].call(request, context)

    def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if isinstance(request, Flip):
            return self._flip(request)
        if self.closed:
            raise Unavailable(f"{self.node.node} changes its role")
        return self._services[self._role].stream(request, context)

    def disconnected(self, peer: str) -> None:
        for service in self._services.values():
            service.disconnected(peer)

    @property
    def _role(self) -> WorkerRole:
        assert self.node.role in ("prefill", "decode")
        return self.node.role

    # --- flips --------------------------------------------------------------------------------------------

    async def _flip(self, order: Flip) -> AsyncGenerator[Reply, None]:
        """Ends with the new role, or with all as it was."""
        membership = self._checked(order)
        due_s = clock.now_s() + order.drain_s + FLIP_MARGIN_S
        self._turning = order.role
        try:
            async with asyncio.timeout_at(due_s - LEAVING_MAX_S - SAY_S - order.drain_s):
                if objection := await membership.ask():
                    raise Unavailable(objection)
            self.closed = True
            await self._drain(order)
            if clock.now_s() > due_s:
                raise TimedOut("this worker stood still meanwhile: it keeps its role")
            self._swap(membership, order.role)
        except TimeoutError:
            raise TimedOut("not every router that lists this worker has answered: it keeps its role") from None
        except ClusterError as error:
            log.warning("keeps its role", role=self.node.role, wanted=order.role, why=error)
            raise
        finally:
            self._turning, self.closed = None, False
            membership.hasten()
        yield Flipped(self.node.role_epoch)

    def _checked(self, order: Flip) -> Membership:
        """Raises WrongNode for an order that is not for what this worker is now."""
        membership = self._membership
        if membership is None:
            raise Unavailable("this worker has joined nobody yet")
        info = membership.info
        is_now = info.generation, info.epoch, info.role_epoch
        if (order.generation, order.epoch, order.role_epoch) != is_now:
            raise WrongNode(f"{info.node} is another than the one that is to be a {order.role} worker")
        if self._turning is not None:
            raise Unavailable(f"{info.node} is about to be a {self._turning} worker")
        if order.role == info.role or order.role not in self._services:
            raise InvalidRequest(f"{info.node} is a {info.role} worker, and cannot become a {order.role} worker")
        return membership

    def _swap(self, membership: Membership, role: WorkerRole) -> None:
        before = membership.info
        turned = msgspec.structs.replace(before, role=role, role_epoch=before.role_epoch + 1)
        self.node = msgspec.structs.replace(self.node, role=role, role_epoch=turned.role_epoch)
        membership.announce(announced(turned, self._host))
        log.info("has another role", role=role, was=before.role, role_epoch=turned.role_epoch)

    async def _drain(self, order: Flip) -> None:
        """Nothing runs here any more, but for what waits for others: that leaves once it is its turn."""
        try:
            async with asyncio.timeout(order.drain_s):
                if order.role == "prefill":
                    await self._write_back()
                await self._ended()
        except TimeoutError:
            self._host.leave()
            load = self._host.load()
            log.info("steps go on elsewhere", running=load.running, waiting=load.waiting)
            try:
                async with asyncio.timeout(LEAVING_MAX_S):
                    await self._ended()
            except TimeoutError:
                log.warning("steps that wait for others are still here", running=self._host.load().running)

    async def _ended(self) -> None:
        while (now := self._host.load()).running or now.waiting:  # noqa: ASYNC110 - once in a flip, not worth an event
            await asyncio.sleep(POLL_S)

    async def _write_back(self) -> None:
        """What is idle here is where others find it: the store has lost some of it, perhaps, since it was written."""
        host = self._host
        for resident in host.residency.all():
            holders = await host.client.exists(resident.hashes)
            if None in holders and host.residency.take_this(resident):
                home = next((holder for holder in holders if holder is not None), None)
                async with host.taken(resident) as here:
                    here.holders = holders
                    async with host.writer(here, home) as writer:
                        writer.computed(here.length)
                        await writer.finish()

"""Traces go from router to router: a call of one that another has is served here, with all that is known of it.

The router that has it is asked to write it down and let go; one that does not answer is not waited for, as what it
still writes is fenced. While a step of it runs there, it stays there: here it is known as it was written last, and
nothing of what happens to it here is written down.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from records.base import Claim, Holder, Records, RecordsLost, TraceName
from router.dispatch.journal import Journal
from router.dispatch.ledger import names
from router.dispatch.rereading import reread
from router.traces.trace import TraceKey
from tracehaul.rpc.base import CallContext, Service
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.cluster import AskRouter, GiveTrace, RouterAnswered, TraceGiven
from tracehaul.wire.errors import ClusterError, Unavailable
from tracehaul.wire.ids import TraceId
from tracehaul.wire.messages import Reply, Request

log = Log(__name__)
seldom = Seldom(log)

FETCH_S = 2.0
"""A call waits so long for its trace to come; then it is served without."""
PATIENT_AGAIN_S = 5.0
"""After one that waited in vain no other does for so long, unless the database answers."""
GIVE_S = 0.7
"""For so long a router is asked to let one go, and may take to write it."""
STILL_S = 2 * GIVE_S
"""Who stood still for so long did not answer others in time: traces may have been taken over, or deleted."""
LIVES_S = 10.0
"""A router that was not heard of for so long is dead to the others, which adopt its traces."""
BEAT_S = 2.5
TIPS_MAX = 64
"""Beginnings of a conversation that are looked for, the longest ones."""


class HandoverStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    fetched: int = 0
    given: int = 0
    busy: int = 0
    """Traces that stayed with another router, as steps of them ran."""
    adopted: int = 0
    unfetched: int = 0
    """Calls served without what another router may know of their traces: it could not be asked for in time."""


class Handover:
    """One router's, beside its ``journal`` over shared ``records``."""

    def __init__(self, router: str, records: Records, journal: Journal, peers: Peers, offload: Offload) -> None:
        self.stats = HandoverStats()
        self._router = router
        self._records = records
        self._journal = journal
        self._peers = peers
        self._offload = offload
        self._coming: dict[tuple[str, str | bytes], asyncio.Task[None]] = {}
        self._tasks = Tasks("handover")
        self._well_since_s: float | None = None
        """Since when this router has said without a break that it lives: others have had that time, too."""
        self._beat_s = 0.0
        """When it last did."""
        self._adopting: asyncio.Task[None] | None = None
        self._stirred = asyncio.Event()
        self._stood_still = 0
        """How often it did."""
        self._made_sure = 0
        """After which of these times it is known which traces are this router's still."""
        self.others: Mapping[str, str] | None = None
        """Routers that lived beside this one when that was asked last, with their addresses; None: it was not."""
        self._impatient_s = 0.0
        """Until then nobody waits for the database."""
        self._unsure = False
        """What was adopted last is not known, or a trace was claimed and could not be read."""
        self._given: dict[TraceKey, float] = {}
        """Since when the others may have them, the first first."""
        self._taking: set[TraceKey] = set()
        """Claimed, and not known yet."""

    async def start(self) -> None:
        """Say that this router lives, from now on, and look for traces of those that do not."""
        self._tasks.start(self._beating(), "beat")
        self._tasks.start(self._watching(), "watch")

    async def close(self) -> None:
        """It ends: others may have its traces. The journal has written what it had to."""
        await self._tasks.close()
        try:
            async with asyncio.timeout(BEAT_S):
                await self._records.live(0.0)
        except (TimeoutError, RecordsLost) as error:
            log.warning("the other routers believe for a while that this one lives", why=error)

    def leads(self) -> bool:
        """Whether it is the first of the routers that live, as far as is known: for what only one is to do."""
        well = self._well_since_s is not None and clock.now_s() - self._beat_s < LIVES_S
        return well and all(self._router < other for other in self.others or ())

    async def arrive(self, tenant: str, name: str, tips: Sequence[bytes] = (), answer: str = "") -> None:
        """The trace that a call is of is known here, if any router knows it and lets go of it in time: the one of that
        name, else the one whose last conversation is the longest of ``tips``, or whose last answer that is."""
        sure = self._made_sure == self._stood_still
        if name and sure and self._journal.writes((tenant, TraceId(name))):
            return
        failing = self._journal.failing and sure  # else what failed may be what stood still
        if failing or not self._journal.loaded or clock.now_s() < self._impatient_s:
            self.stats.unfetched += 1
            return
        tips = tips[-TIPS_MAX:]
        asked = tenant, name or (tips[-1] if tips else answer)
        coming = self._coming.get(asked)
        if coming is None:
            coming = self._coming[asked] = self._start(self._fetch(tenant, name, tips, answer))
            coming.add_done_callback(lambda _: self._coming.pop(asked, None))
        done, _ = await asyncio.wait([coming], timeout=FETCH_S)
        if not done:
            self.stats.unfetched += 1
            self._impatient_s = clock.now_s() + PATIENT_AGAIN_S
            seldom.warning("a trace does not come from the other routers in time", trace=name)

    async def give(self, key: TraceKey) -> bool:
        """Let another router have a trace; False: a step of it runs here, or it is still on its way here."""
        here = False
        try:
            async with asyncio.timeout(GIVE_S):
                while key in self._taking or not self._journal.loaded:  # noqa: ASYNC110
                    await asyncio.sleep(GIVE_S / 50)
                here = True
                given = await self._journal.give(key)
        except TimeoutError:
            return here  # it cannot be written now: the other one has what was written
        self.stats.given += given
        if given:
            self._given.pop(key, None)
            self._given[key] = clock.now_s()
        return given

    async def _fetch(self, tenant: str, name: str, tips: Sequence[bytes], answer: str) -> None:
        try:
            fence = self._journal.ledger.under((tenant, TraceId(name)))
            holder = await self._records.holder(tenant, name, tips, answer)
            self._impatient_s = 0.0
            if name and (holder is None or (fence and holder.router != self._router)):
                self._journal.refused((tenant, TraceId(name)), fence)
            if holder is None or self._journal.writes((tenant, TraceId(holder.trace))):
                return
            of = TraceName(tenant, holder.trace)
            if not await self._let_go(holder):
                self.stats.busy += 1
                await self._journal.take(await reread(self._records.rows([of]), self._offload), [])
            elif claim := await self._records.claim(of):  # else it was erased meanwhile
                self.stats.fetched += 1
                await self._take([claim])
        except RecordsLost as error:
            self._unsure = True  # it may have been claimed, which nobody was told
            self.stats.unfetched += 1
            seldom.warning("what other routers know of a trace cannot be asked for", why=error)

    async def _let_go(self, holder: Holder) -> bool:
        """The router that has it gives it, or is not there to."""
        if holder.router == self._router or not holder.lives:
            return True
        asked = GiveTrace(holder.tenant, TraceId(holder.trace))
        try:
            reply = await self._peers.call(holder.address, asked, timeout_s=2 * GIVE_S)
        except ClusterError as error:
            seldom.warning("a router does not let go of a trace: it is taken over", router=holder.router, why=error)
            return True
        return not isinstance(reply, TraceGiven) or reply.given

    # --- who lives --------------------------------------------------------------------------------------------------

    async def _watching(self) -> None:
        while True:
            before_s = clock.now_s()
            await asyncio.sleep(STILL_S / 4)
            if clock.now_s() - before_s > STILL_S:
                self._stood_still += 1
                self._stirred.set()

    async def _make_sure(self) -> None:
        """What is another router's by now, or was deleted, is let go. Raises RecordsLost."""
        until, known = self._stood_still, self._journal.ledger.known()
        claims = await self._records.adopt(others=False, all_mine=True)
        mine = {(one.tenant, TraceId(one.trace)): one.fence for one in claims}
        for key, fence in known.items():
            if mine.get(key, 0) < fence:
                self._journal.refused(key, fence)
        self._unsure = self._unsure or any(not self._journal.writes(*each) for each in mine.items())
        self._made_sure = until

    async def _beating(self) -> None:
        while True:
            self._stirred.clear()
            try:
                await self._beat()
            except Exception as error:  # who says no more that it lives loses its traces
                self._well_since_s = None
                if not isinstance(error, RecordsLost):
                    seldom.warning("this router cannot say that it lives", why=error)
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._stirred.wait()
            except TimeoutError:
                pass

    async def _beat(self) -> None:
        self.others = await self._records.live(LIVES_S)
        before_s, self._beat_s = self._beat_s, clock.now_s()
        if self._well_since_s is None or self._beat_s - before_s > LIVES_S - BEAT_S:
            self._well_since_s = self._beat_s  # what held this one up may have held up the others
        if self._made_sure < self._stood_still and self._journal.loaded:
            await self._make_sure()
        well = self._beat_s - self._well_since_s >= LIVES_S
        if self._journal.loaded and well and (self._adopting is None or self._adopting.done()):
            self._adopting = self._tasks.start(
                self._adopt(), "adopt"
            )  # may take longer than others believe in this one

    async def _adopt(self) -> None:
        unsure, self._unsure = self._unsure, False
        new: list[Claim] = []
        try:
            claims = await self._records.adopt(others=True, all_mine=unsure)
            new = [one for one in claims if not self._journal.writes((one.tenant, TraceId(one.trace)), one.fence)]
            if new:
                await self._take(new)
        except Exception as error:
            self._unsure = True
            if isinstance(error, RecordsLost):
                return
            raise
        await self._take_back()
        if new:
            self.stats.adopted += len(new)
            log.info("traces of a router that is gone are this one's", traces=len(new))

    async def _take_back(self) -> None:
        """What another router was given and did not take, as the database or that one failed, is this one's still."""
        for key, given_s in list(self._given.items()):
            if clock.now_s() - given_s < LIVES_S:
                return
            try:
                holder = await self._records.holder(*key)
                if holder is not None and holder.router == self._router and not self._journal.writes(key):
                    claim = await self._records.claim(TraceName(*key))
                    await self._take([] if claim is None else [claim])
            except RecordsLost:
                self._unsure = True
                return
            del self._given[key]

    async def _take(self, claims: Sequence[Claim]) -> None:
        """Know what was claimed; no other router is given it before."""
        keys = {(claim.tenant, TraceId(claim.trace)) for claim in claims} - self._taking
        self._taking |= keys
        try:
            await self._journal.take(await reread(self._records.rows(names(claims)), self._offload), claims)
        except BaseException:
            self._unsure = True
            raise
        finally:
            self._taking -= keys

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.start(work, "fetch")


class Doorway:
    """The router's rpc service: nodes that join, and other routers that want traces."""

    def __init__(self, members: Service) -> None:
        self.handover: Handover | None = None
        """None: nothing is shared."""
        self.answer: Callable[[AskRouter], Awaitable[RouterAnswered]] | None = None
        """What clients of other routers ask; None: not yet."""
        self._members = members

    async def call(self, request: Request, context: CallContext) -> Reply:
        if isinstance(request, GiveTrace):
            handover = self.handover
            return TraceGiven(handover is None or await handover.give((request.tenant, request.trace)))
        if isinstance(request, AskRouter):
            if self.answer is None:
                raise Unavailable("it does not serve yet")
            return await self.answer(request)
        return await self._members.call(request, context)

    def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        return self._members.stream(request, context)

    def disconnected(self, peer: str) -> None:
        self._members.disconnected(peer)

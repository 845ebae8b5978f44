"""The traces as their clients see and steer them, and as the calls use them."""

from collections.abc import Sequence
from typing import Protocol

from router.policy.prices import FREE, Bill, Tariff
from router.traces.asks import Ask
from router.traces.events import (
    Answered,
    CallOver,
    Deleted,
    Event,
    PinAsked,
    Recognised,
    Resumed,
    Suspended,
)
from router.traces.kept import Answers, NoAnswers, worth
from router.traces.machine import Traces
from router.traces.prefixes import Heard, Place, Sought, own
from router.traces.texts import Said, Text
from router.traces.trace import PinWish, Trace, TraceKey
from router.traces.views import TraceList, TraceView, trace_list, view
from tracehaul.wire.blocks import PinKind, Pinned
from tracehaul.wire.ids import StepId, TraceId


class TraceBusy(Exception):
    """What is asked makes no sense in the trace's state."""


class Keeper(Protocol):
    """Who tells the traces what happens, and does what follows: see :class:`router.dispatch.retainer.Retainer`."""

    def now_s(self) -> float:
        """Its time."""
        ...

    def send(self, event: Event) -> None:
        """Let something happen to a trace."""
        ...

    async def pin(self, trace: Trace, wish: PinWish) -> Pinned:
        """Keep its contexts in a store. Raises ClusterError."""
        ...

    async def unpin(self, trace: Trace) -> None:
        """No longer. Raises ClusterError."""
        ...


class Written(Protocol):
    """What is written down of traces: see :class:`router.dispatch.journal.Journal`."""

    def holds(self, key: TraceKey) -> bool:
        """There may be something of a trace."""
        ...

    async def erased(self, key: TraceKey, *, here: bool) -> None:
        """Nothing is left of it; ``here``: of what this router wrote. Raises Unavailable."""
        ...

    async def erased_all(self, tenant: str) -> int:
        """Nothing is left of a tenant's; returns of how many traces there was. Raises Unavailable."""
        ...


class NothingWritten:
    """Implements :class:`Written` where nobody writes."""

    def holds(self, key: TraceKey) -> bool:
        return False

    async def erased(self, key: TraceKey, *, here: bool) -> None:
        pass

    async def erased_all(self, tenant: str) -> int:
        return 0


class Billed(Protocol):
    """What traces cost: see :class:`router.dispatch.bills.Bills`."""

    @property
    def unit(self) -> str:
        """Of amounts."""
        ...

    def total(self, key: TraceKey) -> Bill:
        """Of a trace, with what runs."""
        ...


class OfEnded:
    """Implements :class:`Billed` where nobody knows what runs."""

    unit = Tariff().unit

    def __init__(self, traces: Traces) -> None:
        self._traces = traces

    def total(self, key: TraceKey) -> Bill:
        trace = self._traces.get(key)
        return FREE if trace is None else trace.bill


class Elsewhere(Protocol):
    """Other routers that have traces: see :class:`router.dispatch.handover.Handover`."""

    async def arrive(self, tenant: str, name: str, tips: Sequence[bytes] = (), answer: str = "") -> None:
        """A trace is known here, if any router knows it and lets go of it in time."""
        ...


class Book:
    """What ``/v1/traces`` asks and tells. Of a trace that is not known, and of another tenant's, the answer is None."""

    def __init__(self, traces: Traces, keeper: Keeper) -> None:
        self._traces = traces
        self._keeper = keeper
        self.answers: Answers = NoAnswers()
        """What outlives the router."""
        self.written: Written = NothingWritten()
        """Likewise."""
        self.bills: Billed = OfEnded(traces)
        """What they cost."""
        self.elsewhere: Elsewhere | None = None
        """None: no other router has any."""

    # --- for calls ----------------------------------------------------------------------------------------------

    def find(self, salt: str, sought: Sought, fresh: TraceId) -> Place:
        """The trace that a tenant's call belongs to, ``fresh`` if it is a new one; nothing is remembered of it."""
        digests, heard = own(sought.conversation, sought.opening), sought.heard
        if heard is not None:
            heard = Heard(heard.at - (len(sought.conversation) - len(digests)), heard.name)
        place = self._traces.place(salt, digests, fresh, first=sought.first, heard=heard)
        if heard is not None and place == Place(fresh):
            trace = self.answers.heard(salt, heard.name)
            # Of one that is remembered, what is remembered counts.
            place = Place(trace) if trace is not None and self._traces.get((salt, trace)) is None else place
        return place

    def place(self, salt: str, sought: Sought, fresh: TraceId) -> Place:
        """As :meth:`find`, and it is remembered. :meth:`over` must follow."""
        place = self.find(salt, sought, fresh)
        self._keeper.send(Recognised((salt, place.trace), own(sought.conversation, sought.opening), place.shared))
        return place

    def over(self, salt: str, trace: TraceId) -> None:
        """The call that was given that place is over. Where it began no step, nothing stays of it."""
        self._keeper.send(CallOver((salt, trace)))

    def texts(self, traces: Sequence[TraceKey]) -> list[Text]:
        """What was said in these traces, of each the newest first."""
        return self._traces.texts(traces)

    def asks(self, trace: TraceKey) -> Sequence[Ask]:
        """What may be asked again in it."""
        known = self._traces.get(trace)
        return () if known is None else known.asks

    def now_s(self) -> float:
        """The traces' time."""
        return self._keeper.now_s()

    def response(self, salt: str, response: str) -> TraceId | None:
        """The trace in which a tenant was given a response."""
        return self._traces.response(salt, response)

    def answered(
        self,
        salt: str,
        trace: TraceId,
        step: StepId,
        *,
        response: str | None,
        tools: tuple[str, ...] | None = None,
        said: Said | None = None,
        heard: str | None = None,
        final: bool = False,
        done: bool = False,
    ) -> None:
        """A step is over for its caller, whatever way: once for each step. See
        :class:`router.traces.events.Answered`. ``final``: nothing follows it."""
        key = (salt, trace)
        known = self._traces.get(key)
        if known is not None and step in known.unanswered and said is not None and worth(said):
            self.answers.keep(key, said, heard)
        self._keeper.send(Answered(key, step, response, tools, said, heard, done))
        if final:
            self.answers.drop(key)

    async def arrive(self, salt: str, trace: TraceId | None, sought: Sought | None = None, answer: str = "") -> None:
        """A tenant's trace that another router has comes here, if it can: the one of that name, else the one that gave
        an answer, or had that conversation, unless nobody can have gone on from it."""
        if self.elsewhere is None:
            return
        if trace is None and answer:
            trace = self._traces.response(salt, answer)
        elif trace is None and sought is not None and not sought.first:
            fresh = TraceId("")
            place = self.find(salt, sought, fresh)
            if place.trace == fresh or place.parent is not None:
                heard = sought.heard.name if sought.heard is not None else ""
                await self.elsewhere.arrive(salt, "", own(sought.conversation, sought.opening), heard)
                return
            trace = place.trace
        if trace is not None or answer:  # also one that is known here: it may be another router's by now
            await self.elsewhere.arrive(salt, trace or TraceId(""), (), answer)

    # --- for clients --------------------------------------------------------------------------------------------

    def page(self, salt: str, limit: int, after: TraceId | None) -> TraceList | None:
        """A tenant's traces, the last used first, from the one after ``after`` on; None if that one is not known."""
        found = self._traces.page(salt, limit, after)
        return None if found is None else trace_list(*found, self._keeper.now_s())

    def view(self, salt: str, trace: TraceId) -> TraceView | None:
        """All that is known of one."""
        known = self._traces.get((salt, trace))
        if known is None:
            return None
        return view(known, self._keeper.now_s(), self.bills.total(known.key), self.bills.unit)

    async def delete(self, salt: str, trace: TraceId, *, here: bool = False) -> bool:
        """Forget one, and end what runs of it; False if it is not known. What is kept of it is gone on return;
        ``here``: what this router keeps.

        Raises:
            Unavailable: what was written down is still there; it goes as soon as it can.
        """
        key = (salt, trace)
        known = self._traces.get(key)
        held = self.written.holds(key)
        if known is not None:
            self._keeper.send(Deleted(key))
        dropped = self.answers.drop(key)
        if dropped:
            await self.answers.dropped()
        await self.written.erased(key, here=here)
        return known is not None or dropped or held

    def names(self, salt: str, age_s: float = 0.0) -> list[TraceId]:
        """Of a tenant's traces that began so long ago, or longer."""
        found = self._traces.of(salt)
        return [each.trace for each in found if not age_s or each.began_s <= self._keeper.now_s() - age_s]

    async def erase(self, salt: str) -> int:
        """Forget all of a tenant's traces, and end what runs of them; returns how many there were. What is kept of them
        is gone on return.

        Raises:
            Unavailable: what was written down is still there: ask again.
        """
        known = self.names(salt)
        for name in known:
            self._keeper.send(Deleted((salt, name)))
        self.answers.drop_all(salt)
        await self.answers.dropped()
        return max(len(known), await self.written.erased_all(salt))

    def suspend(
        self, salt: str, trace: TraceId, expected_s: float, deadline_s: float | None, tool: str | None
    ) -> TraceView | None:
        """Its client says that it is idle.

        Raises:
            TraceBusy: a step of it runs, or it has ended.
        """
        return self._say(salt, trace, Suspended((salt, trace), expected_s, deadline_s, tool))

    def resume(self, salt: str, trace: TraceId) -> TraceView | None:
        """Its client says that its next step comes soon.

        Raises:
            TraceBusy: a step of it runs, or it has ended.
        """
        return self._say(salt, trace, Resumed((salt, trace)))

    async def pin(
        self, salt: str, trace: TraceId, kind: PinKind, ttl_s: float, priority: float, replicas: int
    ) -> Pinned | None:
        """Keep its contexts in a store for so long; 0: no longer.

        Raises:
            ClusterError: the store refuses, or cannot be asked.
        """
        known = self._traces.get((salt, trace))
        if known is None:
            return None
        wish = PinWish(kind, self._keeper.now_s() + ttl_s, priority, replicas)
        self._keeper.send(PinAsked(known.key, ttl_s, wish))
        if ttl_s == 0:
            await self._keeper.unpin(known)
            return Pinned(0, 0, 0.0)
        return await self._keeper.pin(known, wish)

    def _say(self, salt: str, trace: TraceId, event: Suspended | Resumed) -> TraceView | None:
        known = self._traces.get((salt, trace))
        if known is not None and known.state in ("running", "ended"):
            raise TraceBusy(f"a step of trace {trace} runs" if known.running else f"trace {trace} has ended")
        self._keeper.send(event)
        return self.view(salt, trace)

"""The traces as their clients see and steer them, and as the calls use them."""

from collections.abc import Sequence
from typing import Protocol

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

    async def erased(self, key: TraceKey) -> None:
        """Nothing is left of it. Raises Unavailable."""
        ...


class NothingWritten:
    """Implements :class:`Written` where nobody writes."""

    def holds(self, key: TraceKey) -> bool:
        return False

    async def erased(self, key: TraceKey) -> None:
        pass


class Book:
    """What ``/v1/traces`` asks and tells. Of a trace that is not known, and of another tenant's, the answer is None."""

    def __init__(self, traces: Traces, keeper: Keeper) -> None:
        self._traces = traces
        self._keeper = keeper
        self.answers: Answers = NoAnswers()
        """What outlives the router."""
        self.written: Written = NothingWritten()
        """Likewise."""

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
    ) -> None:
        """A step is over for its caller, whatever way: once for each step. See
        :class:`router.traces.events.Answered`. ``final``: nothing follows it."""
        key = (salt, trace)
        known = self._traces.get(key)
        if known is not None and step in known.unanswered and said is not None and worth(said):
            self.answers.keep(key, said, heard)
        self._keeper.send(Answered(key, step, response, tools, said, heard))
        if final:
            self.answers.drop(key)

    # --- for clients --------------------------------------------------------------------------------------------

    def page(self, salt: str, limit: int, after: TraceId | None) -> TraceList | None:
        """A tenant's traces, the last used first, from the one after ``after`` on; None if that one is not known."""
        found = self._traces.page(salt, limit, after)
        return None if found is None else trace_list(*found, self._keeper.now_s())

    def view(self, salt: str, trace: TraceId) -> TraceView | None:
        """All that is known of one."""
        known = self._traces.get((salt, trace))
        return None if known is None else view(known, self._keeper.now_s())

    async def delete(self, salt: str, trace: TraceId) -> bool:
        """Forget one, and end what runs of it; False if it is not known. What is kept of it is gone on return.

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
        await self.written.erased(key)
        return known is not None or dropped or held

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

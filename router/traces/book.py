"""The traces as their clients see and steer them."""

from collections.abc import Callable
from typing import Protocol

from router.traces.decisions import Asked, Decisions
from router.traces.registry import PinWish, Trace, Traces
from router.traces.views import TraceList, TraceView, trace_list, view
from tracehaul.runtime import clock
from tracehaul.wire.blocks import PinKind, Pinned
from tracehaul.wire.ids import TraceId


class TraceBusy(Exception):
    """What is asked makes no sense in the trace's state."""


class Keeper(Protocol):
    """Who acts on what clients say: see :class:`router.dispatch.retainer.Retainer`."""

    def suspend(self, trace: Trace, expected_s: float, deadline_s: float | None, tool: str | None) -> None:
        """It is idle for so long, and after ``deadline_s`` for ever."""
        ...

    def resume(self, trace: Trace) -> None:
        """Its next step comes soon."""
        ...

    def called(self, trace: Trace, tools: tuple[str, ...]) -> None:
        """What its last step called turned out."""
        ...

    async def pin(self, trace: Trace, wish: PinWish) -> Pinned:
        """Keep its contexts in a store. Raises ClusterError."""
        ...

    async def unpin(self, trace: Trace) -> None:
        """No longer. Raises ClusterError."""
        ...


class Book:
    """What ``/v1/traces`` asks and tells. Of a trace that is not known, and of another tenant's, the answer is None."""

    def __init__(self, traces: Traces, decisions: Decisions, keeper: Keeper, delete: Callable[[Trace], None]) -> None:
        self._traces = traces
        self._decisions = decisions
        self._keeper = keeper
        self._delete = delete

    def page(self, salt: str, limit: int, after: TraceId | None) -> TraceList | None:
        """A tenant's traces, the last used first, from the one after ``after`` on; None if that one is not known."""
        found = self._traces.page(salt, limit, after)
        return None if found is None else trace_list(*found, clock.now_s())

    def view(self, salt: str, trace: TraceId) -> TraceView | None:
        """All that is known of one."""
        known = self._traces.get((salt, trace))
        return None if known is None else view(known, self._decisions.of(known.key), clock.now_s())

    def delete(self, salt: str, trace: TraceId) -> bool:
        """Forget one, and end what runs of it; False if it is not known."""
        known = self._traces.get((salt, trace))
        if known is None:
            return False
        self._delete(known)
        return True

    def suspend(
        self, salt: str, trace: TraceId, expected_s: float, deadline_s: float | None, tool: str | None
    ) -> TraceView | None:
        """Its client says that it is idle.

        Raises:
            TraceBusy: a step of it runs, or it has ended.
        """
        known = self._idle(salt, trace)
        if known is not None:
            inputs: dict[str, float | str | None] = {"expected_s": expected_s, "deadline_s": deadline_s, "tool": tool}
            self._decisions.add(known.key, clock.now_s(), Asked("suspend", inputs))
            self._keeper.suspend(known, expected_s, deadline_s, tool)
        return self.view(salt, trace)

    def resume(self, salt: str, trace: TraceId) -> TraceView | None:
        """Its client says that its next step comes soon.

        Raises:
            TraceBusy: a step of it runs, or it has ended.
        """
        known = self._idle(salt, trace)
        if known is not None:
            self._decisions.add(known.key, clock.now_s(), Asked("resume", {}))
            self._keeper.resume(known)
        return self.view(salt, trace)

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
        asked = Asked("pin", {"kind": kind, "ttl_s": ttl_s, "priority": priority, "replicas": replicas})
        self._decisions.add(known.key, clock.now_s(), asked)
        if ttl_s == 0:
            await self._keeper.unpin(known)
            return Pinned(0, 0, 0.0)
        return await self._keeper.pin(known, PinWish(kind, clock.now_s() + ttl_s, priority, replicas))

    def called(self, salt: str, trace: TraceId, tools: tuple[str, ...]) -> None:
        """What its last step's answer calls, once that is known."""
        known = self._traces.get((salt, trace))
        if known is not None:
            self._keeper.called(known, tools)

    def _idle(self, salt: str, trace: TraceId) -> Trace | None:
        known = self._traces.get((salt, trace))
        if known is not None and known.state in ("running", "ended"):
            raise TraceBusy(f"a step of trace {trace} runs" if known.running else f"trace {trace} has ended")
        return known

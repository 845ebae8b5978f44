"""The traces as their clients see and steer them."""

from collections.abc import Callable

from router.decisions import Decisions
from router.traces import Trace, Traces
from router.views import TraceList, TraceView, trace_list, view
from tracehaul.runtime import clock
from tracehaul.wire.ids import TraceId


class Book:
    """What ``/v1/traces`` asks and tells. Of a trace that is not known, and of another tenant's, the answer is None."""

    def __init__(self, traces: Traces, decisions: Decisions, delete: Callable[[Trace], None]) -> None:
        self._traces = traces
        self._decisions = decisions
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

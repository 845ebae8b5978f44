"""The traces: what each is, what its steps did and how long its tools took. Pure; bounded; lost with the router at the
cost of time only."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from router.policy.retention import Retention
from router.traces.contexts import Left, grow
from router.traces.hits import Hits
from tracehaul.wire.blocks import PinKind
from tracehaul.wire.ids import NodeId, StepId, TraceId

__all__ = ["Gap", "PinWish", "Step", "Suspension", "Tool", "Trace", "TraceKey", "Traces"]

TraceKey = tuple[str, TraceId]
"""Tenant and trace: one tenant's traces are never another's."""

TraceState = Literal["running", "acting", "suspended", "ended"]
"""A step runs; or a tool, or a person; or the client has said how long that takes; or that nothing follows."""

STEPS_MAX = 64
"""Steps of one trace that are remembered one by one."""
CHILDREN_MAX = 256
TOOLS_MAX = 64
"""Tools of one trace that are told apart; more count as the last resort does."""
OTHER_TOOLS = "(others)"


@dataclass
class Gap:
    """What a trace did between two steps."""

    tools: tuple[str, ...]
    """What the earlier step called; empty: what it said was answered otherwise."""
    seconds: float


@dataclass
class Tool:
    """One tool's use by one trace."""

    uses: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0


@dataclass
class Step:
    """One model call."""

    step: StepId
    parent: StepId | None
    """The step whose context it continues: of this trace or of the one that it was forked from."""
    began_s: float
    prompt_tokens: int
    gap: Gap | None
    """What came before it; None for a trace's first, and for one that began while another ran."""
    ended_s: float | None = None
    """None while it runs."""
    ending: str = "aborted"
    """Its finish reason; ``aborted`` by the client or at a stop string; or an error's code."""
    output_tokens: int = 0
    decode: NodeId | None = None
    prefill: NodeId | None = None
    hits: Hits | None = None


@dataclass
class Service:
    """What a trace has been given so far."""

    tokens_computed: int = 0
    tokens_decoded: int = 0
    seconds: float = 0.0
    """Of all steps, those side by side added up."""


@dataclass
class Suspension:
    """The client says that the trace is idle, and for how long."""

    since_s: float
    expected_s: float
    deadline_s: float | None
    """Seconds from ``since_s`` after which nobody comes back."""
    tool: str | None


@dataclass(frozen=True)
class PinWish:
    """The client wants the trace's contexts pinned."""

    kind: PinKind
    until_s: float
    priority: float
    replicas: int


@dataclass
class Trace:
    """One agent task."""

    key: TraceKey
    parent: TraceId | None
    began_s: float
    agent: str = ""
    """Names the kind of agent: those of one kind have one system prompt and the same tools."""
    home: NodeId | None = None
    """Store node that takes its blocks."""
    lefts: list[Left] = field(default_factory=list[Left])
    """The contexts that its next steps may continue, the last one last."""
    children: dict[TraceId, None] = field(default_factory=dict[TraceId, None])
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=STEPS_MAX))
    steps_count: int = 0
    running: int = 0
    idle_since_s: float | None = None
    """Since when no step of it runs; None while one does."""
    calls: tuple[str, ...] | None = None
    """Tools that its last step called; None: not known yet."""
    tools: dict[str, Tool] = field(default_factory=dict[str, Tool])
    service: Service = field(default_factory=Service)
    suspension: Suspension | None = None
    retention: Retention | None = None
    """What was decided when its last step ended, or its client said something."""
    pin: PinWish | None = None
    ended: bool = False
    deleted: bool = False
    """By the client: what still runs is to stop."""

    @property
    def trace(self) -> TraceId:
        """Its name."""
        return self.key[1]

    @property
    def state(self) -> TraceState:
        """What it does now."""
        if self.running:
            return "running"
        if self.ended:
            return "ended"
        return "acting" if self.suspension is None else "suspended"

    @property
    def context_tokens(self) -> int:
        """Length of its last context."""
        return self.lefts[-1].tokens if self.lefts else 0


class Traces:
    """The registry, at most ``traces_max`` of them and ``contexts_bytes_max`` of their contexts.

    The least recently used idle one goes first; contexts go before the traces that left them.
    """

    def __init__(self, traces_max: int, contexts_bytes_max: int) -> None:
        assert traces_max > 0
        self._max = traces_max
        self._bytes_max = contexts_bytes_max
        self._traces: OrderedDict[TraceKey, Trace] = OrderedDict()
        self._with_contexts: OrderedDict[TraceKey, None] = OrderedDict()
        self.contexts_bytes = 0
        self.forgotten: Callable[[Trace], None] = lambda trace: None
        """Told of each trace that is dropped."""

    def __len__(self) -> int:
        return len(self._traces)

    def get(self, key: TraceKey) -> Trace | None:
        """Look without touching."""
        return self._traces.get(key)

    def all(self) -> Iterator[Trace]:
        """Everybody's, the last used last."""
        return iter(self._traces.values())

    def of(self, salt: str) -> Iterator[Trace]:
        """A tenant's traces, the last used first."""
        return (trace for key, trace in reversed(self._traces.items()) if key[0] == salt)

    def page(self, salt: str, limit: int, after: TraceId | None) -> tuple[list[Trace], bool] | None:
        """Up to ``limit`` of a tenant's traces, and whether more follow; None if ``after`` is not known."""
        traces = self.of(salt)
        if after is not None and not any(trace.trace == after for trace in traces):
            return None
        found = list(islice(traces if after is not None else self.of(salt), limit + 1))
        return found[:limit], len(found) > limit

    def start(
        self,
        key: TraceKey,
        parent: TraceId | None,
        step: StepId,
        now_s: float,
        *,
        prompt_tokens: int = 0,
        tools: tuple[str, ...] = (),
        agent: str = "",
    ) -> tuple[Trace, Step]:
        """A step of a trace starts. A fork starts from its parent's places. ``tools``: what ran before it, as the
        prompt tells."""
        known = self._traces.get(key)
        if known is None:
            known = self._open(key, parent, now_s)
        self._traces.move_to_end(key)
        gap = None
        if known.idle_since_s is not None:
            gap = Gap(tools or known.calls or (), now_s - known.idle_since_s)
            self._use(known, gap)
        before = known.steps[-1].step if known.steps else self._fork_point(known)
        begun = Step(step, before, now_s, prompt_tokens, gap)
        known.steps.append(begun)
        known.steps_count += 1
        known.running += 1
        known.agent = agent or known.agent
        known.calls, known.idle_since_s, known.suspension, known.ended = None, None, None, False
        return known, begun

    def lefts(self, trace: Trace) -> list[Left]:
        """The contexts that a step of it may continue: its parent's, then its own."""
        parent = self._parent(trace)
        return (list(parent.lefts) if parent is not None else []) + trace.lefts

    def end(self, trace: Trace, step: Step, now_s: float, *, final: bool) -> None:
        """A step ended, whatever way; ``final``: the client says that no other follows."""
        step.ended_s = now_s
        trace.service.seconds += now_s - step.began_s
        trace.service.tokens_decoded += step.output_tokens
        if step.hits is not None:
            trace.service.tokens_computed += max(0, step.prompt_tokens - step.hits.delivered)
        trace.running -= 1
        assert trace.running >= 0
        trace.ended = trace.ended or final
        if trace.running == 0:
            trace.idle_since_s = now_s
            if trace.ended:
                self._set_lefts(trace, [])

    def leave(self, trace: Trace, left: Left) -> None:
        """A step left a context."""
        if trace.deleted or self._traces.get(trace.key) is not trace:
            return
        self._set_lefts(trace, grow(trace.lefts, left))
        while self.contexts_bytes > self._bytes_max and len(self._with_contexts) > 1:
            self._set_lefts(self._traces[next(iter(self._with_contexts))], [])

    def rewarm(self, trace: Trace, left: Left, again: Left) -> None:
        """A context is on a worker again; nothing happens if a step has continued it meanwhile."""
        trace.lefts = [again if known is left else known for known in trace.lefts]

    def take(self, trace: Trace, left: Left) -> None:
        """A fork continues its parent's context on the worker that kept it: there it is the fork's from now on."""
        parent = self._parent(trace)
        if parent is not None:
            self.rewarm(parent, left, replace(left, warm=None))

    def expire(self, trace: Trace) -> None:
        """Nobody comes back to it."""
        trace.ended, trace.suspension = True, None
        self._set_lefts(trace, [])

    def delete(self, key: TraceKey) -> Trace | None:
        """Forget a trace; what runs of it is to stop."""
        trace = self._traces.pop(key, None)
        if trace is not None:
            trace.deleted = trace.ended = True
            self._drop(trace)
        return trace

    def check(self) -> None:
        """Assert that the limits hold and the counts agree."""
        assert list(self._with_contexts) == sorted(
            (key for key, trace in self._traces.items() if trace.lefts), key=list(self._with_contexts).index
        )
        assert self.contexts_bytes == sum(left.nbytes for t in self._traces.values() for left in t.lefts)
        assert all(not t.deleted and t.running >= 0 for t in self._traces.values())
        assert all((t.idle_since_s is None) == (t.running > 0) for t in self._traces.values() if t.steps_count)

    def _open(self, key: TraceKey, parent: TraceId | None, now_s: float) -> Trace:
        name = key[1]
        trace = self._traces[key] = Trace(key, parent if parent != name else None, now_s)
        origin = self._parent(trace)
        if origin is not None:
            trace.home, trace.agent = origin.home, origin.agent
            if len(origin.children) < CHILDREN_MAX:
                origin.children[name] = None
            self._traces.move_to_end(origin.key)
        self._make_room()
        return trace

    def _parent(self, trace: Trace) -> Trace | None:
        return self._traces.get((trace.key[0], trace.parent)) if trace.parent is not None else None

    def _fork_point(self, trace: Trace) -> StepId | None:
        parent = self._parent(trace)
        return parent.lefts[-1].step if parent is not None and parent.lefts else None

    def _use(self, trace: Trace, gap: Gap) -> None:
        for name in gap.tools:
            if name not in trace.tools and len(trace.tools) >= TOOLS_MAX:
                name = OTHER_TOOLS
            tool = trace.tools.setdefault(name, Tool())
            tool.uses += 1
            tool.seconds += gap.seconds
            tool.longest_s = max(tool.longest_s, gap.seconds)

    def _set_lefts(self, trace: Trace, lefts: list[Left]) -> None:
        self.contexts_bytes += sum(left.nbytes for left in lefts) - sum(left.nbytes for left in trace.lefts)
        trace.lefts = lefts
        self._with_contexts.pop(trace.key, None)
        if lefts:
            self._with_contexts[trace.key] = None

    def _drop(self, trace: Trace) -> None:
        self._set_lefts(trace, [])
        parent = self._parent(trace)
        if parent is not None:
            parent.children.pop(trace.trace, None)
        self.forgotten(trace)

    def _make_room(self) -> None:
        while len(self._traces) > self._max:
            idle = next((key for key, known in self._traces.items() if known.running == 0 and known.steps_count), None)
            if idle is None:
                return  # running steps are bounded by the API's own limit
            self._drop(self._traces.pop(idle))

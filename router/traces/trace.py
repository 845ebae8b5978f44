"""What a trace is: one frozen value with all that is known of an agent task. Pure.

A step, a client or a timer gives it a new value, and only :class:`router.traces.machine.Traces` does that: whoever
holds a trace sees it as it was then.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import msgspec

from router.policy.prices import FREE, UNLIMITED, Bill, Limits
from router.policy.retention import Retention
from router.traces.asks import Ask, size
from router.traces.contexts import Left
from router.traces.decisions import Entry, entry_of
from router.traces.hits import Hits
from router.traces.rows import Pause, Rows, named, packed, unpacked
from router.traces.texts import Text
from tracehaul.wire.blocks import PinKind
from tracehaul.wire.ids import BlockHash, NodeId, StepId, TraceId

TraceKey = tuple[str, TraceId]
"""Tenant and trace: one tenant's traces are never another's."""

TraceState = Literal["running", "acting", "suspended", "ended"]
"""A step runs; or a tool, or a person; or the client has said how long that takes; or that nothing follows."""

STEPS_MAX = 64
"""Steps of one trace that are remembered one by one."""
CHILDREN_MAX = 256
TOOLS_MAX = 64
"""Tools of one trace that are told apart; more count as the last resort does."""
RESPONSES_MAX = 32
"""Answers of one trace that calls may name, or be recognised by."""
UNANSWERED_MAX = 256
OTHER_TOOLS = "(others)"

TRACE_BYTES = 1200
"""Memory of a trace without what follows."""
NAME_BYTES = 150
"""Of a child, a tool."""
LOOKUP_BYTES = 200
"""Of a digest or a response, with its place in the lookup."""


class Tool(msgspec.Struct, frozen=True, gc=False):
    """One tool's use by one trace."""

    uses: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0


class Step(msgspec.Struct, frozen=True, gc=False):
    """One model call."""

    step: StepId
    parent: StepId | None
    """The step whose context it continues: of this trace or of the one that it was forked from."""
    began_s: float
    prompt_tokens: int
    pause: Pause | None
    """What came before it; None for a trace's first, and for one that began while another ran."""
    ended_s: float | None = None
    """None while it runs."""
    ending: str = "running"
    """Its finish reason; ``aborted`` by the client or at a stop string; or an error's code."""
    output_tokens: int = 0
    decode: NodeId | None = None
    prefill: NodeId | None = None
    hits: Hits | None = None


class Service(msgspec.Struct, frozen=True, gc=False):
    """What a trace has been given so far."""

    tokens_computed: int = 0
    tokens_decoded: int = 0
    seconds: float = 0.0
    """Of all steps, those side by side added up."""

    def more(self, computed: int, decoded: int, seconds: float) -> "Service":
        """With a step more."""
        return Service(self.tokens_computed + computed, self.tokens_decoded + decoded, self.seconds + seconds)


class Suspension(msgspec.Struct, frozen=True, gc=False):
    """The client says that the trace is idle, and for how long."""

    since_s: float
    expected_s: float
    deadline_s: float | None
    """Seconds from ``since_s`` after which nobody comes back."""
    tool: str | None


class PinWish(msgspec.Struct, frozen=True, gc=False):
    """The client wants the trace's contexts pinned."""

    kind: PinKind
    until_s: float
    priority: float
    replicas: int
    home: NodeId | None = None
    last: BlockHash | None = None
    """Where, and up to which block, a store was asked to."""


class Trace(msgspec.Struct, frozen=True, gc=False):
    """One agent task."""

    key: TraceKey
    began_s: float
    parent: TraceId | None = None
    agent: str = ""
    """Names the kind of agent: those of one kind have one system prompt and the same tools."""
    home: NodeId | None = None
    """Store node that takes its blocks."""
    worker: NodeId | None = None
    """Decode worker that its last step was given."""
    lefts: tuple[Left, ...] = ()
    """The contexts that its next steps may continue, the last one last."""
    reload_token_s: float = 0.0
    """What bringing back a token of the last one is expected to take."""
    texts: tuple[Text, ...] = ()
    """What was said, the last one last."""
    heavy: int = 0
    """Bytes of ``lefts`` and ``texts``."""
    children: tuple[TraceId, ...] = ()
    running: tuple[Step, ...] = ()
    unanswered: tuple[StepId, ...] = ()
    """Steps of which the call layer has not told yet what they said."""
    past: Rows = Rows()
    """The steps that have ended."""
    log: Rows = Rows()
    """What was decided for it."""
    steps_count: int = 0
    last_step: StepId | None = None
    """The one that began last."""
    idle_since_s: float | None = None
    """Since when no step of it runs; None while one does."""
    calls: tuple[str, ...] | None = None
    """Tools that its last step called; None: not known yet."""
    tools: Mapping[str, Tool] = MappingProxyType({})
    service: Service = Service()
    suspension: Suspension | None = None
    retention: Retention | None = None
    """What was decided when its last step ended, or its client said something."""
    decided: bool = False
    """``retention`` is that of the last step."""
    pin: PinWish | None = None
    keep_s: float = 0.0
    """As in :class:`router.traces.events.StepBegan`, of the last step."""
    ended: bool = False
    digests: tuple[bytes, ...] = ()
    """Beginnings of conversations that it is found by."""
    tip: bytes | None = None
    """The whole conversation of its last call."""
    calls_open: int = 0
    """Recognised calls that are not over."""
    responses: tuple[str, ...] = ()
    asks: tuple[Ask, ...] = ()
    """What may be asked again, the last one last."""
    tenant: str = ""
    """Whom its last step counted for."""
    limits: Limits = UNLIMITED
    bill: Bill = FREE
    """Of the steps that have ended, and of what was kept for it before them."""

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

    @property
    def steps(self) -> list[Step]:
        """Those that are remembered, in the order in which they began."""
        past = [msgspec.convert(named(Step, unpacked(row)), Step) for row in self.past]
        return sorted((*past, *self.running), key=lambda step: step.began_s)

    @property
    def decisions(self) -> list[Entry]:
        """What was decided for it, the oldest first."""
        return [entry_of(row) for row in self.log]

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        names = len(self.children) + len(self.tools) + len(self.running) + len(self.unanswered)
        lookups = len(self.digests) + len(self.responses)
        rows = len(self.past.data) + len(self.log.data)
        return TRACE_BYTES + self.heavy + size(self.asks) + rows + NAME_BYTES * names + LOOKUP_BYTES * lookups

    @property
    def forgettable(self) -> bool:
        """Nothing is under way in it."""
        return not self.running and not self.calls_open

    def runs(self, step: StepId) -> Step | None:
        """A step of it that runs."""
        return next((running for running in self.running if running.step == step), None)


def with_kept(trace: Trace, lefts: Sequence[Left], texts: Sequence[Text]) -> Trace:
    """With other contexts and texts, which share their tokens where they can."""
    for left in reversed(lefts):
        texts = [text.sharing(left.packed) for text in texts]
    tokens = {id(part.packed): len(part.packed) for part in (*lefts, *texts)}
    heavy = sum(tokens.values()) + sum(len(left.hashes) + 400 for left in lefts) + sum(text.nbytes for text in texts)
    return msgspec.structs.replace(trace, lefts=tuple(lefts), texts=tuple(texts), heavy=heavy)


def used(tools: Mapping[str, Tool], pause: Pause) -> Mapping[str, Tool]:
    """A trace's tools after a pause in which some of them ran."""
    found = dict(tools)
    for name in pause.tools:
        if name not in found and len(found) >= TOOLS_MAX:
            name = OTHER_TOOLS
        tool = found.get(name, Tool())
        found[name] = Tool(tool.uses + 1, tool.seconds + pause.seconds, max(tool.longest_s, pause.seconds))
    return MappingProxyType(found)


def past_with(past: Rows, step: Step) -> Rows:
    """The steps that have ended, with one more."""
    return past.added(packed(step), STEPS_MAX)

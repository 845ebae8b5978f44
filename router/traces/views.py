"""Traces as clients see them: what ``/v1/traces`` answers. Times are ages and durations, in seconds."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from router.policy.prices import Bill, Limits
from router.policy.retention import Retention
from router.traces.decisions import Decision
from router.traces.hits import Hits
from router.traces.trace import Step, Trace, TraceState
from tracehaul.wire.ids import NodeId, StepId, TraceId


class TraceSummary(msgspec.Struct, frozen=True):
    """One trace in a list."""

    id: TraceId
    state: TraceState
    parent: TraceId | None
    children: int
    steps: int
    context_tokens: int
    """Length of its last context: what the next step is expected to begin with."""
    age_s: float
    idle_s: float | None
    """Since its last step ended; None while one runs."""
    object: Literal["trace"] = "trace"


class StepView(msgspec.Struct, frozen=True):
    """One of its steps."""

    id: StepId
    parent: StepId | None
    """The step whose context it continues."""
    began_ago_s: float
    seconds: float
    ending: str
    """``running``; a finish reason; ``aborted`` by the client or at a stop string; an error's code."""
    gap_s: float | None
    """Since the step before it ended."""
    tools: tuple[str, ...]
    """What ran in that gap, as far as the prompt tells."""
    prompt_tokens: int
    output_tokens: int
    decode: NodeId | None
    prefill: NodeId | None
    hits: Hits | None


class ToolView(msgspec.Struct, frozen=True):
    """What one of its tools took."""

    uses: int
    mean_s: float
    longest_s: float


class ServiceView(msgspec.Struct, frozen=True):
    """What it has been given."""

    tokens_computed: int
    tokens_decoded: int
    seconds: float


class CostView(msgspec.Struct, frozen=True):
    """What it has cost so far, with what runs, and for what: see ``docs/bills.md``."""

    amount: float
    unit: str
    worker_amount: float
    """Of that, for workers' time."""
    prefill_s: float
    recompute_s: float
    decode_s: float
    moved_bytes: int
    resident_byte_s: float
    """Bytes of KV times the seconds that they lay on workers between steps; likewise the two that follow."""
    memory_byte_s: float
    disk_byte_s: float
    budget: float | None
    """The most that it may cost; None: that was not said."""
    deadline_in_s: float | None
    """Until it has to have ended; likewise."""


class SuspensionView(msgspec.Struct, frozen=True):
    """What its client said of its pause."""

    for_s: float
    """So far."""
    expected_s: float
    deadline_s: float | None
    tool: str | None


class DecisionView(msgspec.Struct, frozen=True):
    """What was decided for it."""

    ago_s: float
    decision: Decision


class TraceView(msgspec.Struct, frozen=True):
    """One trace."""

    id: TraceId
    state: TraceState
    parent: TraceId | None
    children: list[TraceId]
    steps: list[StepView]
    """The last ones."""
    steps_count: int
    context_tokens: int
    age_s: float
    idle_s: float | None
    agent: str
    """The kind of agent: calls with the same system prompt and the same tools."""
    tools: dict[str, ToolView]
    service: ServiceView
    cost: CostView
    suspension: SuspensionView | None
    retention: Retention | None
    """What becomes of its context meanwhile, counted from its last step's end or from what its client said."""
    pinned_s: float | None
    """How much longer its client wants it pinned."""
    home: NodeId | None
    """Store node that takes its blocks."""
    warm: NodeId | None
    """Decode worker that ran its last step."""
    decisions: list[DecisionView]
    object: Literal["trace"] = "trace"


class TraceList(msgspec.Struct, frozen=True):
    """``GET /v1/traces``."""

    data: list[TraceSummary]
    first_id: TraceId | None
    last_id: TraceId | None
    has_more: bool
    object: Literal["list"] = "list"


class TraceDeleted(msgspec.Struct, frozen=True):
    """``DELETE /v1/traces/{id}``."""

    id: TraceId
    deleted: bool = True
    object: Literal["trace.deleted"] = "trace.deleted"


class TracesDeleted(msgspec.Struct, frozen=True):
    """``DELETE /v1/traces``."""

    deleted: int
    """How many there were."""
    object: Literal["trace.list.deleted"] = "trace.list.deleted"


def trace_list(traces: Sequence[Trace], has_more: bool, now_s: float) -> TraceList:
    """A page of them."""
    data = [summary(trace, now_s) for trace in traces]
    return TraceList(data, data[0].id if data else None, data[-1].id if data else None, has_more)


def summary(trace: Trace, now_s: float) -> TraceSummary:
    """One in a list."""
    return TraceSummary(
        trace.trace,
        trace.state,
        trace.parent,
        len(trace.children),
        trace.steps_count,
        trace.context_tokens,
        now_s - trace.began_s,
        _ago(trace.idle_since_s, now_s),
    )


def view(trace: Trace, now_s: float, bill: Bill, unit: str) -> TraceView:
    """All that is known of one. ``bill``: with what runs."""
    pause = trace.suspension
    warm = trace.lefts[-1].warm if trace.lefts else None
    return TraceView(
        id=trace.trace,
        state=trace.state,
        parent=trace.parent,
        children=list(trace.children),
        steps=[_step(step, now_s) for step in trace.steps],
        steps_count=trace.steps_count,
        context_tokens=trace.context_tokens,
        age_s=now_s - trace.began_s,
        idle_s=_ago(trace.idle_since_s, now_s),
        agent=trace.agent,
        tools={
            name: ToolView(tool.uses, tool.seconds / tool.uses, tool.longest_s) for name, tool in trace.tools.items()
        },
        service=ServiceView(trace.service.tokens_computed, trace.service.tokens_decoded, trace.service.seconds),
        cost=_cost(bill, unit, trace.limits, now_s - trace.began_s),
        suspension=SuspensionView(now_s - pause.since_s, pause.expected_s, pause.deadline_s, pause.tool)
        if pause
        else None,
        retention=trace.retention,
        pinned_s=max(0.0, trace.pin.until_s - now_s) if trace.pin is not None else None,
        home=trace.home,
        warm=warm.node if warm is not None else None,
        decisions=[DecisionView(now_s - entry.at_s, entry.decision) for entry in trace.decisions],
    )


def _cost(bill: Bill, unit: str, limits: Limits, age_s: float) -> CostView:
    spent = bill.spent
    return CostView(
        bill.amount,
        unit,
        bill.worker_amount,
        spent.prefill_s,
        spent.recompute_s,
        spent.decode_s,
        spent.moved_bytes,
        spent.resident_byte_s,
        spent.memory_byte_s,
        spent.disk_byte_s,
        limits.budget,
        None if limits.deadline_s is None else limits.deadline_s - age_s,
    )


def _step(step: Step, now_s: float) -> StepView:
    return StepView(
        step.step,
        step.parent,
        now_s - step.began_s,
        (now_s if step.ended_s is None else step.ended_s) - step.began_s,
        step.ending,
        step.pause.seconds if step.pause is not None else None,
        step.pause.tools if step.pause is not None else (),
        step.prompt_tokens,
        step.output_tokens,
        step.decode,
        step.prefill,
        step.hits,
    )


def _ago(at_s: float | None, now_s: float) -> float | None:
    return None if at_s is None else now_s - at_s

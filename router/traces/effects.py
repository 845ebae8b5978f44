"""What is to be done for traces: hints, all of them. What fails costs time, never an answer. Pure, plain data."""

import msgspec

from router.traces.contexts import Left
from router.traces.decisions import Entry
from router.traces.trace import TraceKey
from tracehaul.wire.blocks import PinKind
from tracehaul.wire.ids import BlockHash, NodeId, StepId, TraceId


class ToTrace(msgspec.Struct, frozen=True, gc=False):
    """Something for one trace."""

    key: TraceKey


class SetPin(ToTrace, frozen=True, gc=False, tag="set_pin"):
    """A store keeps a context, rather than others."""

    name: TraceId
    """Of the pin: the trace's where its client wants it, and with a ``~`` where the router does."""
    home: NodeId
    last: BlockHash
    """With all that comes before it."""
    ttl_s: float
    kind: PinKind
    priority: float
    replicas: int = 1


class EndPin(ToTrace, frozen=True, gc=False, tag="end_pin"):
    """No longer."""

    name: TraceId
    home: NodeId


class BringBack(ToTrace, frozen=True, gc=False, tag="bring_back"):
    """A context comes back to a worker. :class:`router.traces.events.ContextRecalled` says what came of it."""

    left: Left
    home: NodeId | None
    why: str
    told: bool
    """The client said when."""


class StopRecall(ToTrace, frozen=True, gc=False, tag="stop_recall"):
    """What comes back to a worker is not waited for any more."""


class StopPrefetch(ToTrace, frozen=True, gc=False, tag="stop_prefetch"):
    """What a store brings up is not waited for any more."""


class FreeContext(ToTrace, frozen=True, gc=False, tag="free_context"):
    """A worker gives up what it keeps for a trace."""

    worker: NodeId


class StopSteps(ToTrace, frozen=True, gc=False, tag="stop_steps"):
    """Steps that run end."""

    steps: tuple[StepId, ...]


class Told(ToTrace, frozen=True, gc=False, tag="told"):
    """A decision was made: whoever keeps a record may write it down."""

    entry: Entry


Effect = SetPin | EndPin | BringBack | StopRecall | StopPrefetch | FreeContext | StopSteps | Told

"""What happens to traces: all that :class:`router.traces.machine.Traces` knows it knows from these. Pure.

Plain data. Written down in their order with the times they came at, and handled again, they give the same traces.
"""

import msgspec

from router.fleet.load import Warm
from router.policy.prices import UNLIMITED, Bill, Limits
from router.traces.asks import Ask, Begun
from router.traces.contexts import Left
from router.traces.decisions import Moved, Placed, Recalled, Replaced
from router.traces.hits import Hits
from router.traces.texts import Said
from router.traces.trace import PinWish, TraceKey
from tracehaul.wire.ids import StepId, TraceId


class OfTrace(msgspec.Struct, frozen=True, gc=False):
    """An event of one trace."""

    key: TraceKey


# --- calls and steps --------------------------------------------------------------------------------------------


class Recognised(OfTrace, frozen=True, gc=False, tag="recognised"):
    """A call without a name has been given this trace, by its messages. One :class:`CallOver` follows."""

    digests: tuple[bytes, ...]
    """Of the beginnings of its conversation: see :func:`router.traces.prefixes.own`."""
    shared: bool = False
    """As in :class:`router.traces.prefixes.Place`."""


class CallOver(OfTrace, frozen=True, gc=False, tag="call_over"):
    """That call is over. A trace of which no step has begun by then is none."""


class StepBegan(OfTrace, frozen=True, gc=False, tag="step_began"):
    """A step begins. One :class:`StepEnded` and one :class:`Answered` follow, in any order."""

    step: StepId
    parent: TraceId | None
    """The trace that this one was forked from, if the client says so. Only the first step's counts."""
    prompt_tokens: int
    tools: tuple[str, ...] = ()
    """What ran before it, as the prompt tells."""
    agent: str = ""
    keep_s: float = 0.0
    """For how long the client means its context to be kept; 0: it does not say."""
    ask: Ask | None = None
    """None: it is not to be asked again."""
    tenant: str = ""
    """Whom it counts for."""
    limits: Limits = UNLIMITED
    """Of its trace, as far as its call says any."""


class StepGrew(OfTrace, frozen=True, gc=False, tag="step_grew"):
    """So far it has these tokens."""

    step: StepId
    packed: bytes


class StepPlaced(OfTrace, frozen=True, gc=False, tag="step_placed"):
    """It was given its places."""

    decision: Placed
    continues: StepId | None
    """The step whose context it continues."""
    takes: bool
    """That is the parent's, on the worker that kept it: there it is this trace's from now on."""


class StepMoved(OfTrace, frozen=True, gc=False, tag="step_moved"):
    """It is to be given others."""

    decision: Moved | Replaced


class StepEnded(OfTrace, frozen=True, gc=False, tag="step_ended"):
    """It ended, whatever way."""

    step: StepId
    ending: str
    """As in :class:`router.traces.trace.Step`."""
    output_tokens: int
    hits: Hits | None
    left: Left | None
    """The context that it leaves."""
    reload_token_s: float
    """What bringing back a token of that is expected to take."""
    final: bool
    """The client says that no other follows, and has what it asked for: it does not ask again."""
    begun: Begun | None = None
    """What it begins with when it is asked again, where that may be; None: nobody knows."""


class Charged(OfTrace, frozen=True, gc=False, tag="charged"):
    """It is billed for something: a step that has ended, and what was kept for it before."""

    bill: Bill


class Answered(OfTrace, frozen=True, gc=False, tag="answered"):
    """The call layer is done with it."""

    step: StepId
    response: str | None = None
    """What calls may name to go on from here."""
    tools: tuple[str, ...] | None = None
    """What its answer calls; None: nobody could tell."""
    said: Said | None = None
    """None where the client sent tokens, or nothing was answered, or nothing follows."""
    heard: str | None = None
    """What calls are recognised by that go on from here: see :class:`router.traces.prefixes.Heard`."""
    done: bool = False
    """It had its whole answer."""


class ContextRecalled(OfTrace, frozen=True, gc=False, tag="context_recalled"):
    """A context was asked back."""

    step: StepId
    """Whose context."""
    warm: Warm | None
    """Who has how much of it now; None: nothing has changed."""
    decision: Recalled


# --- what clients say -------------------------------------------------------------------------------------------


class Suspended(OfTrace, frozen=True, gc=False, tag="suspended"):
    """It is idle for so long, and after ``deadline_s`` for ever."""

    expected_s: float
    deadline_s: float | None
    tool: str | None


class Resumed(OfTrace, frozen=True, gc=False, tag="resumed"):
    """Its next step comes soon."""


class PinAsked(OfTrace, frozen=True, gc=False, tag="pin_asked"):
    """Its contexts are to be pinned for so long; 0: no longer."""

    ttl_s: float
    wish: PinWish


class PinHeld(OfTrace, frozen=True, gc=False, tag="pin_held"):
    """A store does as the client wishes."""

    wish: PinWish


class Deleted(OfTrace, frozen=True, gc=False, tag="deleted"):
    """Nothing of it is to be kept, and what runs of it is to stop."""


class Elsewhere(OfTrace, frozen=True, gc=False, tag="elsewhere"):
    """Another router has it: nothing is known of it here any more, unless something is under way in it."""


# --- time -------------------------------------------------------------------------------------------------------


class Tick(msgspec.Struct, frozen=True, gc=False, tag="tick"):
    """Time has passed."""


OfKnown = (
    StepPlaced
    | StepGrew
    | StepMoved
    | StepEnded
    | Charged
    | Answered
    | ContextRecalled
    | CallOver
    | Suspended
    | Resumed
    | PinAsked
    | PinHeld
    | Deleted
    | Elsewhere
)
"""What changes nothing of a trace that is not known."""

Event = Recognised | StepBegan | Tick | OfKnown

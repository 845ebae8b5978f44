"""What the HTTP surface asks of the rest of the router, and what it gets back."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

import msgspec

from router.adapt.story import Noted
from router.dispatch.flips import FlipOutcome
from router.fleet.members import NodeStatus
from router.policy.prices import UNLIMITED, Bill, Limits
from router.policy.slack import Slack
from router.traces.asks import NOTHING, Begun
from router.traces.book import Book
from router.traces.hits import Changed, Hits
from tracehaul.wire.cluster import WorkerRole
from tracehaul.wire.hashing import token_count
from tracehaul.wire.ids import NodeId, StepId, TraceId
from tracehaul.wire.steps import FinishReason, Sampling, StepClass, StepUsage, TokenLogprobs


class StepRequest(msgspec.Struct, frozen=True):
    """One model call, already in tokens."""

    step: StepId
    trace: TraceId
    """Given by the client, or made up by the API: one trace per unrelated call."""
    parent: TraceId | None
    """The trace this one was forked from, if the client says so."""
    prompt: bytes
    """Packed, as it travels: see :func:`tracehaul.wire.hashing.pack_tokens`."""
    sampling: Sampling
    prompt_logprobs: int | None = None
    """Tell the prompt's logprobs, with so many of the likeliest tokens: nothing cached can be used for it."""
    pool: str = ""
    """Whose workers run it."""
    salt: str = ""
    """Keeps tenants' blocks apart."""
    tenant: str = ""
    """Who asks, and whom it counts for."""
    step_class: StepClass = "standard"
    priority: int = 0
    """Among steps of one class; higher goes first."""
    deadline_s: float | None = None
    """When it ends, by this process's clock, whatever it has: see :mod:`tracehaul.runtime.deadline`."""
    decode: NodeId | None = None
    """Run it on this worker if it is there: for operators and measurements."""
    final: bool = False
    """The client says that no further step of this trace follows."""
    tools: tuple[str, ...] = ()
    """What the trace did between its last step and this one, as the prompt tells: names of the tools."""
    keep_s: float = 0.0
    """As in :class:`router.traces.events.StepBegan`."""
    changed: Changed | None = None
    """Where the prompt parts from what its trace has run, as far as its text tells; tokens are not counted yet."""
    agent: str = ""
    """Names the kind of agent, as far as the call tells: see :class:`router.traces.trace.Trace`."""
    ask: bytes = b""
    """As :attr:`router.traces.asks.Ask.name`; empty: it is not to be asked again."""
    keyed: bool = False
    """As in :class:`router.traces.asks.Ask`."""
    begun: Begun = NOTHING
    """What came of it when it was asked for before: told first, and not sampled again."""
    limits: Limits = UNLIMITED
    """Of its trace, as far as its call says any."""
    choices: int = 1
    """Steps of its call that have its prompt and have not begun, it among them."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return token_count(self.prompt)


class Output(msgspec.Struct, frozen=True):
    """The next output tokens."""

    tokens: list[int]
    usage: StepUsage | None = None
    """On the first output, what is known by then: where the prompt came from. A step that the API ends at a stop
    string has no :class:`Finished`, and its usage is answered from here."""
    hits: Hits | None = None
    """With ``usage``: where the prompt's KV could have come from."""
    logprobs: Sequence[TokenLogprobs] | None = None
    """One for each token if the sampling asks for them."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """The prompt's next ones, from its second token on; all come before the first token."""


class Finished(msgspec.Struct, frozen=True):
    """The terminal event of a step: exactly one, and the last."""

    reason: FinishReason
    usage: StepUsage
    hits: Hits = Hits()


Tell = Callable[[list[int]], bool]
"""Takes a step's next output tokens as soon as they come, where all events before them were taken and nothing but the
ids is told. True: that was all; False: they are an :class:`Output` as ever."""


class ModelCard(msgspec.Struct, frozen=True):
    """A model that the fleet serves, as its workers announced it."""

    name: str
    context_max: int
    pool: str = ""


class Dispatcher(Protocol):
    """Runs steps on the fleet."""

    def run(self, request: StepRequest, tell: Tell | None = None) -> AsyncGenerator[Output | Finished, None]:
        """Output as it comes, as far as ``tell`` did not take it, then one :class:`Finished`. Closing the generator
        aborts the step everywhere.

        Raises (while iterating; before the first Output nothing was computed for good):
            ContextTooLong, Unavailable, Overloaded, DeadlineExceeded, ClusterError.
        """
        ...

    def model(self, name: str) -> ModelCard | None:
        """The model that clients call so; None while no decode worker of it is ready."""
        ...

    def models(self) -> list[ModelCard]:
        """All that a decode worker is ready for, by name."""
        ...

    @property
    def book(self) -> Book:
        """Its traces."""
        ...

    def bill(self, step: StepId) -> Bill:
        """What a step has cost so far; nothing where that is not known any more."""
        ...

    @property
    def unit(self) -> str:
        """Of what things cost."""
        ...

    def slack(self) -> Slack:
        """How many steps of the background may be in progress."""
        ...

    def nodes(self) -> list[NodeStatus]:
        """Every known node, by name."""
        ...

    async def flip(self, node: NodeId, role: WorkerRole) -> FlipOutcome:
        """As :meth:`router.dispatch.flips.Flips.flip`."""
        ...

    def changes(self, node: NodeId) -> Sequence[Noted]:
        """What was changed at a node of this router's own accord, and what came of it, the oldest first."""
        ...

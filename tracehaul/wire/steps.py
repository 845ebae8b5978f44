"""Messages of a step: the router drives a decode worker, which drives a prefill worker."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tracehaul.wire.base import Message
from tracehaul.wire.ids import BlockHash, NodeId, StepId, TraceId
from tracehaul.wire.spent import Allowance, Reading

FinishReason = Literal["stop", "length"]

StepClass = Literal["interactive", "standard", "background"]
"""Somebody waits for every token; an agent waits for the answer; nobody waits."""


CONSTRAINT_CHARACTERS_MAX = 2**21
"""Several hundred tools with schemas of some kilobytes each make one grammar."""


class Constraint(msgspec.Struct, frozen=True):
    """What the text of an answer must match, from its first character to its last."""

    kind: Literal["json_schema", "regex", "grammar"]
    source: Annotated[str, Meta(max_length=CONSTRAINT_CHARACTERS_MAX)]
    """A JSON schema as JSON; a regular expression in the syntax of Rust's ``regex``; or a grammar in
    Lark's syntax or GBNF."""
    lenient: bool = False
    """Ignore what a schema says that cannot be enforced, instead of refusing it."""
    thinking: Literal["none", "may", "opened"] = "none"
    """Whether free text up to ``</think>`` comes first: it may, from ``<think>`` on; or the prompt has opened it."""


class Sampling(msgspec.Struct, frozen=True):
    """How output tokens are chosen. Randomness is a function of (seed, position in the sequence) alone.

    Rules apply in the order of :func:`tracehaul.engine.sampling.choose`.
    """

    max_tokens: int
    """Output tokens of the whole step, those already emitted included; at least 1."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is unlimited."""
    min_p: float = 0.0
    """Tokens less than this share as likely as the likeliest are never sampled."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the sequence, multiplies negative ones; 1 is none."""
    presence_penalty: float = 0.0
    """Off the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Off the logits of tokens in the output, for each time."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """What is added to a token's logit, by token."""
    seed: int = 0
    seeded: bool = True
    """The client has said the seed, so that the answer must depend on nothing else; if not, it was drawn."""
    stop_tokens: tuple[int, ...] = ()
    """The model's own end tokens and the request's: generation ends after one of them."""
    min_tokens: int = 0
    """Stop tokens are not sampled before this many output tokens."""
    constraint: Constraint | None = None
    """Tokens that leave it are never sampled; when it is complete, only the model's end tokens are."""
    logprobs: int | None = None
    """How many of the likeliest tokens to tell with each output token's own logprob; None: tell neither."""

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def finish_reason(self, token: int, emitted: int, length: int, context_max: int) -> FinishReason | None:
        """Whether a step ends with output token ``token``, its ``emitted``-th, in a sequence now ``length`` long."""
        if token in self.stop_tokens and emitted >= self.min_tokens:
            return "stop"
        if emitted >= self.max_tokens or length >= context_max:
            return "length"
        return None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """How likely the model held one token, and what it held likeliest there.

    Natural logarithms of probabilities in the model's own distribution: before temperature, penalties, bias and masks.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, likeliest first; as many as were asked for."""


class PrefillStep(Message, frozen=True):
    """Decode worker -> prefill worker, as a stream: :class:`PrefillProgress` as blocks are published, one
    :class:`PrefillToken`, more progress, and one :class:`PrefillDone`."""

    step: StepId
    trace: TraceId
    root: BlockHash
    """The KV layout's root without salt: a worker with another one refuses."""
    tokens: bytes
    """The whole sequence so far: prompt and what was already emitted."""
    salt: str
    home: NodeId | None
    """Store node that takes the new blocks."""
    sampling: Sampling
    emitted: int
    """How many of ``tokens`` are output of this step."""
    family: TraceId
    """As in :class:`DecodeStep`."""
    tenant: str = ""
    """As in :class:`DecodeStep`, like those that follow."""
    step_class: StepClass = "standard"
    priority: int = 0
    deadline_in_s: float | None = None
    known_tokens: int = 0
    """As in :class:`DecodeStep`."""
    seconds_max: float | None = None
    """What the step may take of this worker; it ends after the iteration that reaches it. None: as much as it likes."""


class PrefillProgress(Message, frozen=True):
    """The first ``published_tokens`` of the sequence can be pulled from the store now."""

    published_tokens: int
    reading: Reading = Reading()
    """What this worker has spent on the step, up to now; likewise in those that follow."""


class PrefillToken(Message, frozen=True):
    """The next token of the sequence, sampled; the last blocks are still being published."""

    token: int
    computed_from: int
    """Positions before it were not computed here: they were resident or pulled."""
    logprobs: TokenLogprobs | None = None
    """If the step asks for them."""
    reading: Reading = Reading()


class PrefillDone(Message, frozen=True):
    """The terminal message of a prefill: all that will be published is."""

    published_tokens: int
    reading: Reading = Reading()


class DecodeStep(Message, frozen=True):
    """Router -> decode worker, as a stream of :class:`Tokens`, then one :class:`StepDone`."""

    step: StepId
    trace: TraceId
    root: BlockHash
    """The KV layout's root without salt: a worker with another one refuses."""
    prompt: bytes
    emitted: bytes
    """Output tokens that the client already has (a step moved in mid-stream); never sampled again."""
    salt: str
    home: NodeId | None
    prefill: NodeId | None
    """Who computes the missing part of the prompt; None: the decode worker itself."""
    sampling: Sampling
    family: TraceId
    """The trace that started this one, and waits for it and its siblings; itself if none did."""
    pull_tokens: int | None = None
    """The store's leading tokens beyond these are to be computed: bringing them up would take longer. None: none."""
    prompt_logprobs: int | None = None
    """Tell the logprobs of the prompt's tokens too, with so many of the likeliest. Such a prompt is computed anew, all
    of it and on the decode worker: KV that is there already gives no logits."""
    tenant: str = ""
    """Who asks, and whom it counts for. ``salt`` alone keeps blocks apart."""
    step_class: StepClass = "standard"
    priority: int = 0
    """Among steps of one class; higher goes first."""
    deadline_in_s: float | None = None
    """What is left until nothing more may be done for the step: see :mod:`tracehaul.runtime.deadline`."""
    known_tokens: int = 0
    """Leading ones that were computed before for its trace: to compute them is to do it again."""
    allowance: Allowance | None = None
    """What the step may spend; None: what it takes."""


class StepUsage(msgspec.Struct, frozen=True):
    """Where a step's context came from, in tokens, and what that took."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    resident_tokens: int = 0
    """Found on the decode worker itself."""
    host_tokens: int = 0
    """Of these, what was not in its engine's own memory, but in its host's."""
    pulled_tokens: int = 0
    """Pulled from the store by the decode worker."""
    computed_from: int = 0
    """First position that anybody computed in this step: everything before it is cached."""
    pulled_bytes: int = 0
    pull_s: float = 0.0
    missed_blocks: int = 0
    """Blocks expected from the store that did not arrive: recomputed."""
    prefill_fallback: str = ""
    """Why the prefill worker's result was not used, as an error code; empty if it was, or none was asked."""
    reading: Reading = Reading()
    """What the decode worker has spent on the step, up to now."""
    prefill_reading: Reading = Reading()
    """What the prefill worker has, as far as it told."""


class Tokens(Message, frozen=True, omit_defaults=True):
    """The next output tokens, packed."""

    ids: bytes
    usage: StepUsage | None = None
    """With the first tokens: what is known by then."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of ``ids`` if the step asks for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's next tokens, if the step asks for them: in order from its second token on (nothing precedes the
    first), all before the first output token."""


class StepDone(Message, frozen=True):
    """The terminal message of a step on a decode worker."""

    reason: FinishReason
    usage: StepUsage
    retained_tokens: int
    """Length of the sequence whose KV stays on this worker, warm for the next step."""
    published_tokens: int = 0
    """Its leading tokens that can be pulled from the store."""


class KeepContext(Message, frozen=True):
    """Router -> decode worker: a trace's context, idle there, is worth its memory for so long; until then others give
    way first. Answered with :class:`Resident`."""

    trace: TraceId
    salt: str
    for_s: float


class RecallContext(Message, frozen=True):
    """Router -> decode worker: bring a trace's context back from the store, before its next step asks for it.

    It takes memory that is free, or that of contexts past their time, and gives way to any step that waits for
    memory and to the trace's own next step. Answered with :class:`Resident` when it has ended, however far it came.
    """

    trace: TraceId
    root: BlockHash
    """The KV layout's root without salt: a worker with another one refuses."""
    tokens: bytes
    salt: str
    keep_s: float
    """As in :class:`KeepContext`, from when it is there."""
    told: bool = False
    """Its client has said that the step comes, so that it may take the memory of any idle context: the others' are
    kept on a guess."""


class ForgetContext(Message, frozen=True):
    """Router -> decode worker: the trace has ended; its contexts that are idle there are of no more use."""

    trace: TraceId
    salt: str


class Resident(Message, frozen=True):
    """What is idle on the worker of a trace, in tokens: its longest context."""

    tokens: int

"""What a client asks for, in no dialect's form. Pure."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from router.calls.tools import Tools
from tracehaul.wire.steps import Constraint


class ToolCall(msgspec.Struct, frozen=True):
    """What the assistant called, in an earlier turn."""

    id: str
    name: str
    arguments: str
    """JSON, as the client has it."""


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Conversation(msgspec.Struct, frozen=True):
    """A prompt that the chat template makes, and whose answer is read for reasoning and calls of tools."""

    messages: tuple[Message, ...]
    kit: tuple[str, ...] = ()
    """Names of all tools that the client has, also of those that this call must not use; in order."""
    variables: Mapping[str, Any] | None = None
    """Of the chat template, as JSON has them, beside those that it is always given."""
    add_generation_prompt: bool = True
    """The prompt ends with what begins the assistant's message."""
    continue_final_message: bool = False
    """The prompt ends where the last message does, which is the assistant's and goes on."""


class Plain(msgspec.Struct, frozen=True):
    """A prompt in text."""

    text: str


class Ids(msgspec.Struct, frozen=True):
    """A prompt in token ids."""

    ids: list[int]


Asked = Conversation | Plain | Ids
"""One prompt."""


class Wanted(msgspec.Struct, frozen=True):
    """What each answer must look like."""

    constraint: Constraint
    param: str
    """The parameter that asks for it."""


class Options(msgspec.Struct, frozen=True):
    """A call's options, checked. What a dialect has no word for keeps its default."""

    stream: bool = False
    include_usage: bool = False
    """At a stream's end."""
    continuous_usage: bool = False
    """With each event of a stream."""
    opening_usage: bool = False
    """With each choice's beginning."""
    max_tokens: int | None = None
    """None: the rest of the window. 0: nothing but the echo of the prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """How many of the likeliest tokens to tell beside each token's own logprob; None: tell neither."""
    echo: bool = False
    """Each choice begins with its prompt."""
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stops: bool = False
    """The text has what ended it: the stop string, or the stop token's text."""
    special_shown: bool = False
    """The text has special tokens, too."""
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    """Choices of each prompt."""
    return_token_ids: bool = False


class TraceFields(msgspec.Struct, frozen=True):
    """What a body can say about its trace."""

    metadata: Mapping[str, Any] | None = None
    prompt_cache_key: str | None = None
    previous_response_id: str | None = None
    session: str | None = None
    """A name of the task or of one of its agents, in whatever words."""
    parent: str | None = None
    """A name of what began that, likewise."""
    baseline: str | None = None
    """The answer with whose call the client compares this one: why is less of it cached than was to be expected?"""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call."""

    id: str
    """Names its answer; its steps are named after it."""
    model: str
    prompts: tuple[Asked, ...]
    """At least one; each has :attr:`Options.n` choices."""
    where: str
    """The parameter that holds the prompts."""
    options: Options = Options()
    tools: Tools | None = None
    """None: there are none, or it must not use them."""
    wanted: Wanted | None = None
    trace: TraceFields = TraceFields()
    keep_s: float = 0.0
    """For how long the client means its context to be kept; 0: it does not say."""
    flex: bool = False
    """It is background work: it may wait, and be refused."""
    priority: int | None = None
    """As in :class:`router.calls.urgency.Urgency`; None: the body says nothing of it."""
    tenant: str = ""
    """Keeps tenants' traces, texts and blocks apart."""
    quota: str | None = None
    """Whose quota its blocks count to; None: the tenant's."""
    nbytes: int = 0
    """Size of what the client sent: what it takes to render it goes by that."""
    keyed: bool = False
    """Its client has named it, to be able to ask again: then :attr:`id` is the same again, and its seeds follow from
    that; and each token is told by itself, so that its answer is in the same pieces again."""

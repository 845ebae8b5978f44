"""What clients receive: OpenAI's objects, and ours where it has none."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.traces.hits import Hits
from tracehaul.wire.steps import FinishReason


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """OpenAI's ``usage.prompt_tokens_details``."""

    cached_tokens: int
    """Prompt tokens that nobody in the cluster computed for this call."""


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """OpenAI's ``usage.completion_tokens_details``."""

    reasoning_tokens: int
    """Output tokens up to the end of the reasoning, where the model does some."""


class ClusterUsage(msgspec.Struct, frozen=True):
    """``usage.tracehaul``: where the prompts' KV came from, summed over the choices."""

    resident_tokens: int
    pulled_tokens: int
    pulled_bytes: int
    pull_s: float
    missed_blocks: int
    prefill_fallback: str
    hits: Hits
    """Prompt tokens that could have been cached, that were, and why the others were not."""


class Usage(msgspec.Struct, frozen=True):
    """OpenAI's ``usage`` with our extension."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    tracehaul: ClusterUsage


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token of a chat completion, and the likeliest at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a chat completion's choice: one entry for each output token that its usage counts."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a completion's choice: four lists of one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the choice's text before the token."""


class CalledFunction(msgspec.Struct, frozen=True):
    """What is called; the pieces of a stream name it once, and add to its arguments."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool, or a piece of one; only pieces have an index, only first ones an id."""

    function: CalledFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    index: int | UnsetType = UNSET


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's message; None: it has calls alone."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice of a chat completion."""

    index: int
    message: AnswerMessage
    finish_reason: ChatFinishReason
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    """One choice's part in a chat chunk."""

    index: int
    delta: Delta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class TextChoice(msgspec.Struct, frozen=True):
    """One choice of a completion, or its part in a chunk."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Response(msgspec.Struct, frozen=True):
    """Every answer and every chunk of a generation; chunks of a stream without usage leave it out."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatDelta] | list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelEntry(msgspec.Struct, frozen=True):
    """One model of ``/v1/models``."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "tracehaul"


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"

"""What clients receive: OpenAI's objects, and ours where it has none."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.hits import Hits
from tracehaul.wire.steps import FinishReason


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """OpenAI's ``usage.prompt_tokens_details``."""

    cached_tokens: int
    """Prompt tokens that nobody in the cluster computed for this call."""


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


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's message."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice of a chat completion."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    """One choice's part in a chat chunk."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
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

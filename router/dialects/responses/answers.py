"""What clients receive from ``/v1/responses``. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.calls import events
from router.dialects.openai.response import Tier
from router.dialects.openai.usage import ClusterUsage, usage_of

MissReason = Literal["model_changed", "tools_changed", "reasoning_effort_changed", "input_changed"]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True):
    """The content of a message."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


class ReasoningText(msgspec.Struct, frozen=True):
    """The content of a reasoning item."""

    text: str
    type: Literal["reasoning_text"] = "reasoning_text"


class SummaryText(msgspec.Struct, frozen=True):
    """The summary of a reasoning item: the reasoning itself, where it is asked for in that form."""

    text: str
    type: Literal["summary_text"] = "summary_text"


class MessageItem(msgspec.Struct, frozen=True):
    """What the model says."""

    id: str
    content: Sequence[OutputText]
    status: ItemStatus
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class ReasoningItem(msgspec.Struct, frozen=True):
    """What it thinks."""

    id: str
    summary: Sequence[SummaryText]
    content: Sequence[ReasoningText]
    status: ItemStatus
    encrypted_content: str | None = None
    type: Literal["reasoning"] = "reasoning"


class FunctionCallItem(msgspec.Struct, frozen=True):
    """A call of a function."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus
    type: Literal["function_call"] = "function_call"


class CustomCallItem(msgspec.Struct, frozen=True):
    """A call of a custom tool."""

    id: str
    call_id: str
    name: str
    input: str
    status: ItemStatus
    type: Literal["custom_tool_call"] = "custom_tool_call"


OutputItem = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem


class InputDetails(msgspec.Struct, frozen=True):
    """``usage.input_tokens_details``."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """Nobody is charged for writing."""


class OutputDetails(msgspec.Struct, frozen=True):
    """``usage.output_tokens_details``."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """``usage``, with our extension."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    tracehaul: ClusterUsage


class Failure(msgspec.Struct, frozen=True):
    """Why a response failed."""

    code: str
    message: str


class Incomplete(msgspec.Struct, frozen=True):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class CacheMiss(msgspec.Struct, frozen=True, tag="cache_miss"):
    """The beginning of the prompt that another response shares is shorter than it was: what the client changed first,
    and what could not be used because of it."""

    reason: MissReason
    cache_missed_tokens: int


class CacheHit(msgspec.Struct, frozen=True, tag="cache_hit"):
    """The prompt begins as that of the other response did, and was not computed again."""


class ComparisonNotFound(msgspec.Struct, frozen=True, tag="comparison_response_not_found"):
    """That response is not known."""


class Unavailable(msgspec.Struct, frozen=True, tag="unavailable"):
    """The client changed nothing, or the two have nothing to do with each other."""


_REASONS: Mapping[str, MissReason] = {
    "model": "model_changed",
    "tools": "tools_changed",
    "variables": "reasoning_effort_changed",
    "system": "input_changed",
    "messages": "input_changed",
}
"""By :attr:`router.calls.events.Compared.outcome`."""
CacheDiagnostics = CacheMiss | CacheHit | ComparisonNotFound | Unavailable
"""``prompt_cache_diagnostics``."""


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A response, as far as it is. What a request said and nothing came of is null, or left out
    where OpenAI's own description has no null."""

    id: str
    created_at: int
    model: str
    status: Status
    object: Literal["response"] = "response"
    completed_at: int | None = None
    background: bool = False
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: Any = None
    max_output_tokens: int | None = None
    max_tool_calls: None = None
    metadata: dict[str, Any] = {}
    output: Sequence[OutputItem] = ()
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    priority: UnsetType | None = UNSET
    """Null, where it was said: it decides nothing yet."""
    prompt_cache_diagnostics: CacheDiagnostics | None = None
    prompt_cache_key: str | UnsetType = UNSET
    reasoning: dict[str, str | None] = {}
    safety_identifier: str | UnsetType = UNSET
    service_tier: Tier = "default"
    store: bool = True
    temperature: float = 1.0
    text: dict[str, Any] = {}
    tool_choice: Any = "auto"
    tools: Sequence[dict[str, Any]] = ()
    top_logprobs: int = 0
    top_p: float = 1.0
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | UnsetType = UNSET


def response_usage(told: events.Usage) -> ResponseUsage:
    """A call's usage."""
    usage = usage_of(told)
    return ResponseUsage(
        usage.prompt_tokens,
        InputDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        OutputDetails(usage.completion_tokens_details.reasoning_tokens),
        usage.total_tokens,
        usage.tracehaul,
    )


def cache_diagnostics(told: events.Usage) -> CacheDiagnostics | None:
    """What the comparison with an earlier response has shown; None: there was none."""
    compared = told.compared
    match None if compared is None else compared.outcome:
        case None:
            return None
        case "unknown":
            return ComparisonNotFound()
        case "same":
            return CacheHit() if told.cached_tokens else Unavailable()
        case "elsewhere":
            return Unavailable()
        case "model" | "tools" | "variables" | "system" | "messages" as section:
            assert compared is not None
            return CacheMiss(_REASONS[section], compared.tokens)

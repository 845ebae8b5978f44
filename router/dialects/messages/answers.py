"""What clients receive from ``/v1/messages``. Pure."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from blake3 import blake3
from msgspec import UNSET, UnsetType

from router.calls import events
from router.calls.errors import CallFailed
from router.calls.slips import is_object
from router.dialects.blocks import Block
from router.dialects.openai.usage import ClusterUsage, usage_of
from tracehaul.wire.steps import FinishReason

MissReason = Literal[
    "model_changed",
    "system_changed",
    "tools_changed",
    "messages_changed",
    "previous_message_not_found",
    "unavailable",
]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
_CHANGED: Mapping[str, MissReason] = {
    "model": "model_changed",
    "system": "system_changed",
    "tools": "tools_changed",
    "messages": "messages_changed",
}
"""By :attr:`router.calls.events.Compared.outcome`."""
ERRORS = {
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "limited": "rate_limit_error",
    "not_found": "not_found_error",
    "too_large": "request_too_large",
    "late": "timeout_error",
    "spent": "billing_error",
    "unavailable": "overloaded_error",
    "failed": "api_error",
}
"""Names of errors, by their cause; others are ``invalid_request_error``."""


class TextBlock(msgspec.Struct, frozen=True):
    """What the model says."""

    text: str
    type: Literal["text"] = "text"
    citations: None = None


class ThinkingBlock(msgspec.Struct, frozen=True):
    """What it thinks."""

    thinking: str
    signature: str
    """The same for the same thoughts; nothing hangs on it."""
    type: Literal["thinking"] = "thinking"


class ToolUseBlock(msgspec.Struct, frozen=True):
    """A call of a tool."""

    id: str
    name: str
    input: msgspec.Raw
    type: Literal["tool_use"] = "tool_use"


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(msgspec.Struct, frozen=True):
    """``usage``, with our extension. A prompt's tokens are those read from the cache, and the others."""

    input_tokens: int
    cache_creation_input_tokens: int
    """Nobody is charged for them."""
    cache_read_input_tokens: int
    output_tokens: int
    tracehaul: ClusterUsage
    service_tier: Literal["standard"] = "standard"
    # What a service may have besides, and this one has not.
    cache_creation: None = None
    inference_geo: None = None
    output_tokens_details: None = None
    server_tool_use: None = None


class CacheMissReason(msgspec.Struct, frozen=True):
    """Why a beginning of the prompt that was computed before was of no use."""

    type: MissReason
    cache_missed_input_tokens: int | UnsetType = UNSET
    """Only where something changed."""


class Diagnostics(msgspec.Struct, frozen=True):
    """``diagnostics``."""

    cache_miss_reason: CacheMissReason


class Answer(msgspec.Struct, frozen=True):
    """A message, as far as it is."""

    id: str
    model: str
    content: Sequence[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    diagnostics: Diagnostics | None = None
    """None: they were not asked for, or nothing differs."""
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    stop_details: None = None
    container: None = None


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inside of Anthropic's error body."""

    type: str
    message: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """Anthropic's error body."""

    error: ErrorDetail
    request_id: str | None
    type: Literal["error"] = "error"


def error_body(failure: CallFailed) -> ErrorBody:
    """What the client reads: its clients show the message alone, so that says what is at fault."""
    kind, message, param = ERRORS.get(failure.cause, "invalid_request_error"), str(failure), failure.param
    if param is not None and param not in message:
        message = f"{param}: {message}"
    return ErrorBody(ErrorDetail(kind, message, param, failure.code), failure.request)


def message_usage(told: events.Usage) -> MessageUsage:
    """A call's usage."""
    fresh = told.prompt_tokens - told.cached_tokens
    return MessageUsage(fresh, 0, told.cached_tokens, told.output_tokens, usage_of(told).tracehaul)


def diagnostics(told: events.Usage) -> Diagnostics | None:
    """What the comparison with an earlier message has shown."""
    compared = told.compared
    match None if compared is None else compared.outcome:
        case None | "same":
            return None
        case "unknown":
            return Diagnostics(CacheMissReason("previous_message_not_found"))
        case "elsewhere" | "variables":
            return Diagnostics(CacheMissReason("unavailable"))
        case "model" | "tools" | "system" | "messages" as section:
            assert compared is not None
            return Diagnostics(CacheMissReason(_CHANGED[section], compared.tokens))


def stop_reason(reason: FinishReason, called: bool, stop: str | None) -> StopReason:
    """Why an answer ended."""
    if reason == "length":
        return "max_tokens"
    if stop is not None:
        return "stop_sequence"
    return "tool_use" if called else "end_turn"


def content_block(block: Block) -> ContentBlock:
    """A whole block."""
    match block.kind:
        case "text":
            return TextBlock(block.text)
        case "reasoning":
            return ThinkingBlock(block.text, signature(block.text))
        case "call":
            return ToolUseBlock(block.id, block.name, _input(block.text))


def signature(thinking: str) -> str:
    """Stands where others have a proof that the thoughts are the model's."""
    return "th-" + blake3(thinking.encode()).hexdigest(16)


def _input(arguments: str) -> msgspec.Raw:
    """An object, as it was written; where the answer was cut in it, an empty one."""
    return msgspec.Raw(arguments.encode() if is_object(arguments) else b"{}")

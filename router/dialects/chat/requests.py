"""What clients send to ``/v1/chat/completions``. Pure."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from router.calls.errors import invalid
from router.dialects.openai.requests import GenerationRequest, integer

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TOLD_MESSAGES = Meta(extra_json_schema={"minItems": 1})
ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]


class Part(msgspec.Struct, frozen=True):
    """One part of a message's content; only text can be honoured."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """What the assistant called, in an earlier turn."""

    name: str
    arguments: str = ""


class CustomCall(msgspec.Struct, frozen=True):
    """What the assistant called with a text."""

    name: str
    input: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    """A call in an earlier turn: of a function or of a custom tool."""

    id: str
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    type: Literal["function", "custom"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same by a newer name."""
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    """A call in the older form, whose result is the next message of role ``function``."""


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], TOLD_MESSAGES]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    service_tier: ServiceTier | None = None
    store: bool | None = None

    def output_limit(self) -> tuple[str, int | None, int]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens, 1
        return super().output_limit()

    def likeliest(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        return integer("top_logprobs", self.top_logprobs, 0) if self.logprobs else None

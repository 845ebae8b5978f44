"""What clients send to ``/v1/responses``. Pure."""

from typing import Any, Literal

import msgspec

from router.calls.errors import invalid, unsupported
from router.dialects.openai.requests import GenerationRequest

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
LOGPROBS = "message.output_text.logprobs"
REFERENCE = "item_reference"
ENCRYPTED = "reasoning.encrypted_content"


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """One part of an item's content, output or summary; only text can be honoured."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """One item of a conversation: which fields it has goes by its type; without one it is a message."""

    type: str | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None
    status: str | None = None


class TextFormat(msgspec.Struct, frozen=True):
    """``text.format``."""

    type: str
    name: str = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """``text``."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """``reasoning``."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """What ``summary`` was called before."""

    @property
    def summarised(self) -> bool:
        """Whether the client shows what it is told as a summary."""
        return (self.summary or self.generate_summary or "none") != "none"


class CacheOptions(msgspec.Struct, frozen=True):
    """``prompt_cache_options``: what is cached, and for how long, is not the client's to say."""

    comparison_response_id: str | None = None


class ResponsesRequest(GenerationRequest, frozen=True, kw_only=True):
    """``POST /v1/responses``."""

    input: str | list[Item] | None = None
    instructions: str | list[Item] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    conversation: Any = None
    prompt: Any = None
    prompt_cache_options: CacheOptions | None = None

    def output_limit(self) -> tuple[str, int | None, int]:
        return "max_output_tokens", self.max_output_tokens, 1

    @property
    def stored(self) -> bool:
        """Whether the answer is kept."""
        return self.store is not False


def check(request: ResponsesRequest) -> None:
    """Raises CallFailed: it asks for what cannot be honoured, or contradicts itself."""
    if request.conversation is not None:
        raise unsupported("conversation", "a conversation that the server keeps (name the response before)")
    if request.prompt is not None:
        raise unsupported("prompt", "a prompt that the server keeps")
    if request.truncation == "auto":
        raise unsupported("truncation", "leaving out items so that the others fit")
    if request.top_logprobs or LOGPROBS in (request.include or ()):
        raise unsupported("top_logprobs" if request.top_logprobs else "include", "logprobs of a response")
    if request.background and not request.stored:
        raise invalid("what runs in the background has to be stored", "store", "invalid_value")
    if not request.input and request.previous_response_id is None:
        raise invalid("missing required parameter: 'input'", "input", "missing_required_parameter")

"""What clients send to ``/v1/messages`` and ``/v1/messages/count_tokens``. Pure."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from router.dialects.body import ModelName
from router.dialects.openai.requests import INTEGER_MAX, SALT_CHARACTERS_MAX, STOP_CHARACTERS_MAX

STOPS_MAX = 64
Stop = Annotated[str, Meta(min_length=1, max_length=STOP_CHARACTERS_MAX)]


class CacheControl(msgspec.Struct, frozen=True):
    """``cache_control``: blocks are cached whether or not it is there, and kept for longer if it is."""

    type: str
    ttl: str | None = None

    @property
    def keep_s(self) -> float:
        """For how long its client means them to be kept."""
        return 3600.0 if self.ttl == "1h" else 300.0


class Block(msgspec.Struct, frozen=True):
    """One block of a message's content: which fields it has goes by its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class Message(msgspec.Struct, frozen=True):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True):
    """One of ``tools``; a type other than ``custom`` names what only a service can run."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    type: str | None = None
    cache_control: CacheControl | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    """``thinking``; a budget cannot be kept to, and is not looked at."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    """``output_config.format``."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    """``output_config``."""

    effort: str | None = None
    format: OutputFormat | None = None


class Metadata(msgspec.Struct, frozen=True):
    """``metadata``."""

    user_id: str | None = None


class DiagnosticsAsked(msgspec.Struct, frozen=True):
    """``diagnostics``."""

    previous_message_id: str | None = None
    """The answer to compare with; None: there is none yet."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take. Unknown fields are ignored."""

    model: ModelName | None = None
    messages: Annotated[list[Message], Meta(extra_json_schema={"minItems": 1})]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=SALT_CHARACTERS_MAX)] | None = None


class MessagesRequest(Asked, frozen=True, kw_only=True):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Meta(ge=1, le=INTEGER_MAX)]
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=INTEGER_MAX)] | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=STOPS_MAX)] | None = None
    metadata: Metadata | None = None
    diagnostics: DiagnosticsAsked | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None

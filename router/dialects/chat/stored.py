"""Chat completions that are kept (``store``): what is kept of one, and how it is told again. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from router.calls.errors import invalid
from router.dialects.chat.requests import ChatMessage, ChatRequest, FunctionCall, Part, ToolCall

PAIRS_MAX, KEY_CHARACTERS_MAX, VALUE_CHARACTERS_MAX = 16, 64, 512
"""Of metadata."""
_ECHOED = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_completion_tokens",
    "max_tokens",
    "stop",
    "n",
)
"""Fields of the request that a completion is told with."""
_encode = msgspec.json.Encoder().encode
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Message(msgspec.Struct, frozen=True):
    """One that was asked, as it is told again."""

    id: str
    role: str
    content: str | None
    name: str | None
    content_parts: list[Part] | None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    refusal: None = None


class Asked(msgspec.Struct, frozen=True):
    """What is known of one before it is answered."""

    messages: Sequence[ChatMessage]
    metadata: Mapping[str, str]
    fields: Mapping[str, Any]


class Stored(msgspec.Struct, frozen=True):
    """One that is kept, but its metadata."""

    told: msgspec.Raw
    """The completion as it was answered, an object."""
    fields: Mapping[str, Any]
    """What else it is told with."""
    messages: Sequence[msgspec.Raw]
    """What it answers, each a :class:`Message`."""


def asked_of(request: ChatRequest) -> Asked | None:
    """None: it is not to be kept.

    Raises:
        CallFailed: its metadata cannot be kept.
    """
    if not request.store:
        return None
    said = {name: value for name in _ECHOED if (value := getattr(request, name)) is not None}
    return Asked(request.messages, checked(request.metadata), {**said, "input_user": request.user})


def checked(metadata: Mapping[str, Any] | None) -> Mapping[str, str]:
    """Metadata that can be kept.

    Raises:
        CallFailed: it is too much, or something in it is no text.
    """
    metadata = metadata or {}
    if len(metadata) > PAIRS_MAX:
        raise invalid(f"metadata of what is kept has {PAIRS_MAX} pairs at most", "metadata", "invalid_value")
    for key, value in metadata.items():
        if len(key) > KEY_CHARACTERS_MAX:
            message = f"a key of metadata has {KEY_CHARACTERS_MAX} characters at most"
            raise invalid(message, "metadata", "invalid_value")
        if not isinstance(value, str) or len(value) > VALUE_CHARACTERS_MAX:
            message = f"metadata of what is kept has texts of {VALUE_CHARACTERS_MAX} characters at most"
            raise invalid(message, f"metadata.{key}", "invalid_value")
    return metadata


def stored(asked: Asked, told: bytes, request: str | None) -> bytes:
    """What is kept. ``told``: as it is answered; ``request``: that request's id."""
    name = msgspec.json.decode(told, type=_Named).id
    messages = [msgspec.Raw(_encode(_message(each, f"{name}-{at}"))) for at, each in enumerate(asked.messages)]
    return _encode(Stored(msgspec.Raw(told), {**asked.fields, "request_id": request}, messages))


def completion(body: bytes, metadata: Mapping[str, str]) -> msgspec.Raw:
    """As it is told again."""
    kept = msgspec.json.decode(body, type=Stored)
    told: dict[str, Any] = {**_fields(kept.told), **kept.fields, "metadata": metadata}
    told.pop("store", None)
    return msgspec.Raw(_encode(told))


def messages(body: bytes) -> Sequence[msgspec.Raw]:
    """What it answers."""
    return msgspec.json.decode(body, type=Stored).messages


class _Named(msgspec.Struct, frozen=True):
    """What has an id."""

    id: str


def _message(said: ChatMessage, name: str) -> Message:
    parts = said.content if isinstance(said.content, list) else None
    text = said.content if parts is None else "".join(part.text or "" for part in parts)
    reasoning = said.reasoning_content or said.reasoning
    return Message(
        name,
        said.role,
        text if isinstance(text, str) else None,
        said.name,
        parts,
        said.tool_calls or UNSET,
        said.tool_call_id or UNSET,
        said.function_call or UNSET,
        reasoning or UNSET,
    )

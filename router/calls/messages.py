"""A conversation in the shape that chat templates read. Pure."""

from collections.abc import Sequence
from typing import Any, cast

import msgspec

from router.calls.call import Message
from router.calls.mending import mended


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain dicts, arguments as objects."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        result["reasoning_content"] = message.reasoning
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return result


def _arguments(arguments: str) -> dict[str, Any]:
    """As an object, since templates print it as JSON again, and models are trained on objects. What is none, or is
    broken off, becomes the only value of one."""
    if not arguments.strip():
        return {}
    try:
        parsed = _decoded(arguments)
    except (ValueError, RecursionError):
        parsed = arguments
    return cast(dict[str, Any], parsed) if isinstance(parsed, dict) else {"arguments": parsed}


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except ValueError:
        whole = mended(text.encode())
        if whole is None:
            raise
        return msgspec.json.decode(whole)

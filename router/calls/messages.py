"""A conversation in the shape that chat templates read. Pure."""

from collections.abc import Sequence
from typing import Any

import msgspec

from router.calls.call import Message


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


def _arguments(arguments: str) -> Any:
    """As an object, since templates print it as JSON again; as it is where it is none."""
    try:
        parsed = msgspec.json.decode(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments

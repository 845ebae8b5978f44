"""A request's messages in the shape that chat templates read."""

from collections.abc import Sequence
from typing import Any

import msgspec

from router.api.errors import bad_request, unsupported
from router.api.requests import ChatMessage, ChatRequest, Part


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Plain dicts, content as one string, arguments as objects.

    Raises:
        ApiError: there are none, or one has content that cannot be honoured.
    """
    if not messages:
        raise bad_request("messages must not be empty", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def template_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the template is told of; None if there are none or the client wants none used."""
    return request.tools if request.tools and request.tool_choice != "none" else None


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    # Templates know the older name of what is now called developer.
    result: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.content is None and message.role != "assistant":
        raise bad_request(f"a {message.role} message needs content", f"{where}.content")
    result["content"] = _content(message.content, f"{where}.content")
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return result


def _content(content: str | list[Part] | None, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: Part, where: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal"):
        raise unsupported(where, f"content of type {part.type[:64]!r}")
    if text is None:
        raise bad_request(f"a part of type {part.type} needs {part.type}", f"{where}.{part.type}")
    return text


def _arguments(arguments: str) -> Any:
    """As an object, since templates print it as JSON again; as it is where it is none."""
    try:
        parsed = msgspec.json.decode(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments

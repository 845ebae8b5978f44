"""A request's messages, as calls have them. Pure."""

from collections.abc import Mapping, Sequence
from typing import Literal

from router.calls import call
from router.calls.custom import arguments_of
from router.calls.errors import invalid, unsupported
from router.dialects.chat.requests import ChatMessage, Part, ToolCall

_ROLES: Mapping[str, Literal["system", "user", "assistant", "tool"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""What templates know each by: an older name of what is now called developer, a newer one of functions' results."""


def messages_of(messages: Sequence[ChatMessage]) -> tuple[call.Message, ...]:
    """The same messages, content as one string.

    Raises:
        CallFailed: there are none, or one has content that cannot be honoured.
    """
    if not messages:
        raise invalid("messages must not be empty", "messages")
    told: list[call.Message] = []
    called: dict[str, str] = {}
    for index, message in enumerate(messages):
        told.append(_message(message, index, called.get(message.name or "") or f"call_{index - 1}"))
        called |= {made.name: made.id for made in told[-1].tool_calls}
    return tuple(told)


def _message(message: ChatMessage, index: int, called: str) -> call.Message:
    """``called``: the id of the last call of a function of the message's name."""
    content = message.content
    if content is None and message.role not in ("assistant", "tool", "function"):
        raise invalid(f"a {message.role} message needs content", f"messages[{index}].content")
    return call.Message(
        _ROLES[message.role],
        content if isinstance(content, str) else _joined(content or (), f"messages[{index}].content"),
        message.name,
        message.reasoning if message.reasoning_content is None else message.reasoning_content,
        _calls(message, index),
        message.tool_call_id if message.role != "function" else called,
    )


def _calls(message: ChatMessage, index: int) -> tuple[call.ToolCall, ...]:
    calls = [_call(made, f"messages[{index}].tool_calls[{at}]") for at, made in enumerate(message.tool_calls or ())]
    if (made := message.function_call) is not None:
        calls.append(call.ToolCall(f"call_{index}", made.name, made.arguments))
    return tuple(calls)


def _call(made: ToolCall, where: str) -> call.ToolCall:
    if made.function is not None:
        return call.ToolCall(made.id, made.function.name, made.function.arguments)
    if made.custom is not None:
        return call.ToolCall(made.id, made.custom.name, arguments_of(made.custom.input))
    raise invalid(f"a call of type {made.type} needs {made.type}", f"{where}.{made.type}")


def _joined(parts: Sequence[Part], where: str) -> str:
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _part(part: Part, where: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal"):
        raise unsupported(where, f"content of type {part.type[:64]!r}")
    if text is None:
        raise invalid(f"a part of type {part.type} needs {part.type}", f"{where}.{part.type}")
    return text

"""A request's messages, as calls have them. Pure."""

from collections.abc import Sequence

from router.calls import call
from router.calls.errors import invalid, unsupported
from router.dialects.chat.requests import ChatMessage, Part


def messages_of(messages: Sequence[ChatMessage]) -> tuple[call.Message, ...]:
    """The same messages, content as one string.

    Raises:
        CallFailed: there are none, or one has content that cannot be honoured.
    """
    if not messages:
        raise invalid("messages must not be empty", "messages")
    return tuple(_message(message, index) for index, message in enumerate(messages))


def _message(message: ChatMessage, index: int) -> call.Message:
    content = message.content
    if content is None and message.role not in ("assistant", "tool"):
        raise invalid(f"a {message.role} message needs content", f"messages[{index}].content")
    return call.Message(
        # Templates know the older name of what is now called developer.
        "system" if message.role == "developer" else message.role,
        content if isinstance(content, str) else _joined(content or (), f"messages[{index}].content"),
        message.name,
        message.reasoning if message.reasoning_content is None else message.reasoning_content,
        tuple(call.ToolCall(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ()),
        message.tool_call_id,
    )


def _joined(parts: Sequence[Part], where: str) -> str:
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _part(part: Part, where: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal"):
        raise unsupported(where, f"content of type {part.type[:64]!r}")
    if text is None:
        raise invalid(f"a part of type {part.type} needs {part.type}", f"{where}.{part.type}")
    return text

"""Items as messages, which is what calls have. Pure."""

import base64
import binascii
from collections.abc import Iterable, Sequence

import msgspec

from router.calls import call
from router.calls.custom import arguments_of
from router.calls.errors import CallFailed, invalid, unsupported
from router.dialects.responses import requests
from router.dialects.responses.requests import Item, Part

TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
SEALED = "th1."
"""What ``encrypted_content`` of ours begins with: it is the reasoning in base64, and hides nothing."""


def asked_items(value: str | Sequence[Item] | None) -> tuple[Item, ...]:
    """``input`` or ``instructions`` as items."""
    if value is None:
        return ()
    return (Item("message", role="user", content=value),) if isinstance(value, str) else tuple(value)


def messages_of(items: Iterable[Item], where: str = "input") -> tuple[call.Message, ...]:
    """The messages that items are: reasoning, text and calls that follow each other are one answer.

    Raises:
        CallFailed: an item lacks what its type needs, or cannot be honoured.
    """
    gathered = _Gathered()
    for at, item in enumerate(items):
        _take(item, f"{where}[{at}]", gathered)
    return gathered.finish()


class _Gathered:
    """Messages so far, and the answer that the next items may belong to."""

    def __init__(self) -> None:
        self._messages: list[call.Message] = []
        self._answer: call.Message | None = None

    def add(self, message: call.Message) -> None:
        self._close()
        self._messages.append(message)

    def reasoning(self, text: str) -> None:
        if self._answer is not None and (self._answer.content or self._answer.tool_calls):
            self._close()
        answer = self._open()
        self._answer = msgspec.structs.replace(answer, reasoning=(answer.reasoning or "") + text)

    def said(self, text: str) -> None:
        if self._answer is not None and (self._answer.content or self._answer.tool_calls):
            self._close()
        self._answer = msgspec.structs.replace(self._open(), content=text)

    def called(self, made: call.ToolCall) -> None:
        answer = self._open()
        self._answer = msgspec.structs.replace(answer, tool_calls=(*answer.tool_calls, made))

    def finish(self) -> tuple[call.Message, ...]:
        self._close()
        return tuple(self._messages)

    def _open(self) -> call.Message:
        return self._answer or call.Message("assistant")

    def _close(self) -> None:
        if self._answer is not None:
            self._messages.append(self._answer)
            self._answer = None


def _take(item: Item, where: str, gathered: _Gathered) -> None:
    match item.type or "message":
        case "message":
            content = "" if item.content is None and item.role == "assistant" else item.content
            text = _text(content, f"{where}.content")
            match item.role:
                case None:
                    raise _missing("role", where)
                case "assistant":
                    gathered.said(text)
                case "user":
                    gathered.add(call.Message("user", text))
                case "system" | "developer":
                    # Templates know the older name of what is now called developer.
                    gathered.add(call.Message("system", text))
        case "reasoning":
            gathered.reasoning(_thought(item, where))
        case "function_call":
            gathered.called(_call(item, item.arguments, "arguments", where))
        case "custom_tool_call":
            text = None if item.input is None else arguments_of(item.input)
            gathered.called(_call(item, text, "input", where))
        case "function_call_output" | "custom_tool_call_output":
            if item.call_id is None:
                raise _missing("call_id", where)
            text = _text(item.output or "", f"{where}.output")  # it may have said nothing
            gathered.add(call.Message("tool", text, tool_call_id=item.call_id))
        case requests.REFERENCE:
            if item.id is None:
                raise _missing("id", where)
            # Whoever keeps items has put it in the reference's place by the time that it is rendered.
        case other:
            raise unsupported(f"{where}.type", f"an item of type {other[:64]!r}")


def _call(item: Item, arguments: str | None, field: str, where: str) -> call.ToolCall:
    for name, value in (("call_id", item.call_id), ("name", item.name), (field, arguments)):
        if value is None:
            raise _missing(name, where)
    return call.ToolCall(item.call_id or "", item.name or "", arguments or "")


def _text(content: str | Sequence[Part] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise invalid(f"missing required parameter: '{where}'", where, "missing_required_parameter")
    return "".join(_part(part, f"{where}[{at}]") for at, part in enumerate(content))


def _part(part: Part, where: str) -> str:
    if part.type not in TEXTS:
        raise unsupported(where, f"content of type {part.type[:64]!r}")
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        name = "refusal" if part.type == "refusal" else "text"
        raise invalid(f"a part of type {part.type} needs {name}", f"{where}.{name}", "missing_required_parameter")
    return text


def _thought(item: Item, where: str) -> str:
    """In full if the item has it, else what it has of it."""
    if item.content:
        return _text(item.content, f"{where}.content")
    sealed = unsealed(item.encrypted_content)
    return _text(item.summary or (), f"{where}.summary") if sealed is None else sealed


def sealed(reasoning: str) -> str:
    """Reasoning for clients that keep it without looking into it."""
    return SEALED + base64.urlsafe_b64encode(reasoning.encode()).decode()


def unsealed(content: str | None) -> str | None:
    """What :func:`sealed` made it of; None where somebody else did."""
    if content is None or not content.startswith(SEALED):
        return None
    try:
        return base64.b64decode(content[len(SEALED) :].encode(), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        return None


def _missing(field: str, where: str) -> CallFailed:
    name = f"{where}.{field}"
    return invalid(f"missing required parameter: '{name}'", name, "missing_required_parameter")

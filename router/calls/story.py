"""By what a conversation's messages are known again in a later call. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from blake3 import blake3

from router.calls.call import Message, ToolCall
from router.calls.custom import arguments_of
from router.calls.events import Said
from router.traces.turns import KEY_BYTES, Story

ANSWER = "\ufdd1answer\ufdd1"
"""Stands for an answer that is not to be told again: in a noncharacter's shade no text says that."""

_encode = msgspec.json.Encoder().encode


def story(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any] | None
) -> Story:
    """The keys of a call's messages, and of what is told before them."""

    def said(at: int) -> bytes:
        return says(messages[at])

    return Story(_key((tools, variables)), [sent(message) for message in messages], said)


def sent(message: Message) -> bytes:
    """Of a message as it comes from a client. Thoughts are left out, which many clients do not send back, and ids of
    calls, which some make up anew."""
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return _key((message.role, message.content, message.name, calls, message.tool_call_id))


def says(message: Message) -> bytes:
    """Of what an answer says: its text without the space around it, its calls with arguments as JSON values, however
    they are spelled."""
    calls = [(call.name, canonical(call.arguments)) for call in message.tool_calls]
    return _key((message.role, message.content.strip(), calls))


def canonical(arguments: str) -> str:
    """One spelling for all equal arguments; a text that is no JSON as it is. A whole number is one, with or without a
    fraction, as in JSON's own language."""
    try:
        value = json.loads(arguments, strict=False, parse_float=_number) if arguments.strip() else {}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))  # in ASCII: it may hold half a surrogate pair
    except (ValueError, RecursionError):
        return arguments


def untold(message: dict[str, Any]) -> dict[str, Any]:
    """An answer, in the shape that templates read, with :data:`ANSWER` for all that it says."""
    told = {key: value for key, value in message.items() if key != "reasoning_content"}
    told["content"] = ANSWER
    if calls := message.get("tool_calls"):
        function = {**calls[0]["function"], "arguments": {ANSWER: ANSWER}}
        told["tool_calls"] = [{**calls[0], "function": function}]
    return told


def answered(said: Said) -> Message:
    """An answer as its client has it."""
    calls = [
        ToolCall(call.id or "", call.name or "", arguments_of(call.arguments) if call.custom else call.arguments)
        for call in said.calls
    ]
    return Message("assistant", said.content, tool_calls=tuple(calls))


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value


def _key(value: Any) -> bytes:
    return blake3(_encode(value)).digest(KEY_BYTES)

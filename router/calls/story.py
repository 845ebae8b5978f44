"""By what a conversation's messages are known again in a later call. Pure."""

import json
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from xxhash import xxh3_64_digest

from router.calls.call import Message, ToolCall
from router.calls.custom import arguments_of
from router.calls.events import Said
from router.traces.turns import KEY_BYTES, Story

HERE = f"\ufdd1{secrets.token_hex(8)}\ufdd1"
"""Marks a place in what a template tells: nobody is shown it, and no stranger's text can hold it."""

_encode = msgspec.json.Encoder().encode


def story(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any] | None
) -> Story:
    """The keys of a call's messages, and of what is told before them."""

    @cache
    def said(at: int) -> bytes:
        return says(messages[at])

    half = KEY_BYTES // 2
    context = _key(_encode(tools), "")[:half] + _key(_encode(variables), "")[:half]
    return Story(context, [sent(message) for message in messages], said)


def same_tools(context: bytes, other: bytes) -> bool:
    """Whether two contexts of stories differ in variables of the template alone."""
    return context[: KEY_BYTES // 2] == other[: KEY_BYTES // 2]


def sent(message: Message) -> bytes:
    """Of a message as it comes from a client. Thoughts are left out, which many clients do not send back, and ids of
    calls, which some make up anew."""
    about = message.role.encode()
    if message.tool_calls or message.name or message.tool_call_id:
        calls = [(call.name, call.arguments) for call in message.tool_calls]
        about = _encode((message.role, message.name, calls, message.tool_call_id))
    return _key(about, message.content)


def says(message: Message) -> bytes:
    """Of what an answer says: its text without the space around it, its calls with arguments as JSON values, however
    they are spelled."""
    calls = [(call.name, canonical(call.arguments)) for call in message.tool_calls]
    return _key(_encode((message.role, calls)), message.content.strip())


def canonical(arguments: str) -> str:
    """One spelling for all equal arguments; a text that is no JSON as it is. A whole number is one, with or without a
    fraction, as in JSON's own language."""
    try:
        value = json.loads(arguments, strict=False, parse_float=_number) if arguments.strip() else {}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))  # in ASCII: it may hold half a surrogate pair
    except (ValueError, RecursionError):
        return arguments


def untold(message: dict[str, Any]) -> dict[str, Any]:
    """An answer, in the shape that templates read, with :data:`HERE` for all that it says."""
    told = {key: value for key, value in message.items() if key != "reasoning_content"}
    told["content"] = HERE
    if calls := message.get("tool_calls"):
        function = {**calls[0]["function"], "arguments": {HERE: HERE}}
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


def _key(about: bytes, text: str) -> bytes:
    """Fast rather than hard to forge: it tells apart what one client sends for one trace, with every call all of it."""
    return xxh3_64_digest(about + b"\0" + text.encode("utf-8", "surrogatepass"))

"""What clients are known to change from call to call although it means nothing to a model: left out of prompts, whose
beginnings would never be found again. Pure."""

import re
from typing import Any

from msgspec.structs import replace

from router.calls.call import Call, Conversation, Message

PREAMBLES = {
    # Claude Code's: a version and hashes of the request, first or on a line of its own.
    "x-anthropic-billing-header": re.compile(
        r"^x-anthropic-billing-header:(?:[ \t]*[\w.-]+=[^;\s]*(?:;|$))+[ \t]*\n{0,2}", re.MULTILINE
    ),
}
"""In the system's messages, by name."""
MARKS = ("cache_control",)
"""Of tools: told for a cache, with each call for another tool."""


def without_noise(call: Call) -> tuple[Call, list[str]]:
    """The call without it, and the names of what was there."""
    found: list[str] = []
    prompts = tuple(_quiet(asked, found) if isinstance(asked, Conversation) else asked for asked in call.prompts)
    if found:
        call = replace(call, prompts=prompts)
    if call.tools is not None and (marks := _marks(call.tools.told)):
        call = replace(call, tools=replace(call.tools, told=[_unmarked(tool) for tool in call.tools.told]))
        found += marks
    return call, found


def _quiet(asked: Conversation, found: list[str]) -> Conversation:
    messages: list[Message] = []
    for message in asked.messages:
        text = _without_preambles(message.content, found) if message.role == "system" else message.content
        if text != message.content:
            message = replace(message, content=text)
            if not text:  # it was nothing else
                continue
        messages.append(message)
    return replace(asked, messages=tuple(messages)) if found else asked


def _without_preambles(text: str, found: list[str]) -> str:
    for name, preamble in PREAMBLES.items():
        if f"{name}:" in text:
            text, count = preamble.subn("", text)
            found += [name] if count and name not in found else []
    return text


def _marks(tools: list[dict[str, Any]]) -> list[str]:
    return [mark for mark in MARKS if any(mark in tool or mark in (tool.get("function") or ()) for tool in tools)]


def _unmarked(tool: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in tool.items() if key not in MARKS}
    function = kept.get("function")
    if isinstance(function, dict):
        kept["function"] = {key: value for key, value in function.items() if key not in MARKS}
    return kept

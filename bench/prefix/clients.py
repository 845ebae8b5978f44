"""How clients send back what they were told: the same answer in other words. Pure.

Each takes an answer's message as the cluster told it and returns what its client will send with the next call.
"""

import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def as_told(message: Message) -> Message:
    """To the letter."""
    return message


def compact(message: Message) -> Message:
    """Arguments parsed and written without spaces; content null beside calls."""
    changed = _rewritten(message, lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    return {**changed, "content": None} if changed.get("tool_calls") and not changed.get("content") else changed


def escaped(message: Message) -> Message:
    """Arguments parsed and written in ASCII, as Python does; the content in parts."""
    changed = _rewritten(message, json.dumps)
    content = changed.get("content")
    return {**changed, "content": [{"type": "text", "text": content}]} if content else changed


def in_javascript(message: Message) -> Message:
    """Whole numbers lose their fraction; the content loses the space at its end; thoughts are not kept."""
    changed = _rewritten(message, lambda value: json.dumps(_whole(value), ensure_ascii=False, separators=(",", ":")))
    changed = {key: value for key, value in changed.items() if key not in ("reasoning_content", "reasoning")}
    return {**changed, "content": changed["content"].rstrip()} if changed.get("content") else changed


def sorted_and_indented(message: Message) -> Message:
    """Arguments parsed, sorted and indented; nothing else of the message is kept."""
    changed = _rewritten(message, lambda value: json.dumps(value, ensure_ascii=False, indent=4, sort_keys=True))
    return {key: value for key, value in changed.items() if key in ("role", "content", "tool_calls")}


CLIENTS: tuple[Callable[[Message], Message], ...] = (as_told, compact, escaped, in_javascript, sorted_and_indented)


def _rewritten(message: Message, spell: Callable[[Any], str]) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    written = [
        {**call, "function": {**call["function"], "arguments": spell(json.loads(call["function"]["arguments"]))}}
        for call in calls
    ]
    return {**message, "tool_calls": written}


def _whole(value: Any) -> Any:
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _whole(item) for key, item in value.items()}
        case list():
            return [_whole(item) for item in value]
        case _:
            return value

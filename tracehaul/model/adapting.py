"""Conversations in the form that a chat template takes. Pure.

Each change is the same for the same beginning of a conversation, so that a prompt grows at its end only.
"""

import json
import string
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from blake3 import blake3

Message = dict[str, Any]
SHORT_ID_CHARACTERS = 9
"""Mistral's templates take ids of no other length."""
_LETTERS = string.ascii_letters + string.digits


class Needs(msgspec.Struct, frozen=True):
    """What a template does not take by itself."""

    short_ids: bool = False
    """Ids of calls have nine letters or digits."""
    one_call: bool = False
    """An answer has one call: several are several answers, each with its result."""
    calls_as_text: bool = False
    """It leaves calls out: they are written into the answer's text."""
    turns: bool = False
    """User and assistant take turns, tools aside."""
    one_system: bool = False
    """The system speaks once and first: what it says later is the user's."""
    tools_as: str = ""
    """The variable in which it reads tools; empty: as all do."""
    tools_unseen: bool = False
    """It never shows tools: the system tells of them."""
    user: bool = False
    """Without a user it fails, or is silent of the system: one who says nothing follows the system."""
    words: bool = False
    """Answers say something: one that says nothing says a space."""

    @property
    def note(self) -> str:
        """What a person who serves the model should know of it; empty if nothing."""
        said = {
            "it never shows tools (they are told in the system's message)": self.tools_unseen,
            "it leaves calls of tools out (they are written into the answers' text)": self.calls_as_text,
            "it takes one call in an answer (several are shown as several answers)": self.one_call,
        }
        return "; ".join(line for line, holds in said.items() if holds)

    def but(self, **changes: Any) -> "Needs":
        """The same with changes."""
        return msgspec.structs.replace(self, **changes)


def adapted(messages: Sequence[Message], needs: Needs) -> list[Message]:
    """The same conversation as a template of these needs takes it."""
    found = list(messages)
    if needs.one_system:
        found = list(_one_system(found))
    if needs.calls_as_text:
        found = [_calls_as_text(message) for message in found]
    elif needs.one_call:
        found = list(_one_call(found))
    if needs.short_ids:
        found = [_short_ids(message) for message in found]
    if needs.user and not any(message["role"] == "user" for message in found):
        opening = next((at for at, message in enumerate(found) if message["role"] != "system"), len(found))
        found.insert(opening, {"role": "user", "content": ""})
    if needs.turns:
        found = _turns(found)
    if needs.words:
        found = [_in_words(message) for message in found]
    return found


def with_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The same with the tools in the system's message, and how they are called, in the form of most open models."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = (
        f"You can call these tools:\n<tools>\n{listed}\n</tools>\nTo call one, write its name and its "
        'arguments as a JSON object between these tags:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": _joined(messages[0]["content"], told)}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def filled(tools: Sequence[dict[str, Any]] | None) -> Sequence[dict[str, Any]]:
    """Tools with what some templates expect: a list, though there are none; of each a description, and parameters with
    properties."""
    return [_filled(tool) for tool in tools or ()]


def short_id(given: str) -> str:
    """An id of nine letters and digits: itself if it is one, else one that is always the same for it."""
    if len(given) == SHORT_ID_CHARACTERS and given.isascii() and given.isalnum():
        return given
    return in_letters(blake3(given.encode(errors="surrogatepass")).digest(16), SHORT_ID_CHARACTERS)


def in_letters(digest: bytes, length: int) -> str:
    """The lowest ``length`` digits of a number, in letters and digits."""
    number, letters = int.from_bytes(digest), list[str]()
    for _ in range(length):
        number, digit = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[digit])
    return "".join(letters)


def _filled(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    given: dict[str, Any] = function.get("parameters") or {}
    properties: dict[str, Any] = given.get("properties") or {}
    properties = {
        name: {"description": "", **field} if isinstance(field, dict) else field for name, field in properties.items()
    }
    parameters = {"type": "object", **given, "properties": properties}
    return {
        **tool,
        "function": {**function, "description": function.get("description") or "", "parameters": parameters},
    }


def _short_ids(message: Message) -> Message:
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": short_id(call.get("id") or "")} for call in message["tool_calls"]]
    if message["role"] == "tool":
        changed["tool_call_id"] = short_id(message.get("tool_call_id") or "")
    return changed


def _one_call(messages: Sequence[Message]) -> Iterator[Message]:
    """Several calls of an answer as several answers, each followed by the result of its call."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            yield message
            continue
        end = at
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        results = list(messages[at:end])
        at = end
        for number, call in enumerate(calls):
            yield {**message, "content": message["content"] if number == 0 else "", "tool_calls": [call]}
            own = next((result for result in results if result.get("tool_call_id") == call.get("id")), None)
            if own is not None:
                results.remove(own)
                yield own
        yield from results


def _calls_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [f"<tool_call>\n{json.dumps(_function(call), ensure_ascii=False)}\n</tool_call>" for call in calls]
    text = "\n".join([message["content"], *written] if message["content"] else written)
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}


def _function(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


def _one_system(messages: Sequence[Message]) -> Iterator[Message]:
    """What the system says at the beginning in one message, what it says later as the user's."""
    opening = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if opening:
        yield {**messages[0], "content": "\n\n".join(message["content"] for message in messages[:opening])}
    for message in messages[opening:]:
        yield {**message, "role": "user"} if message["role"] == "system" else message


def _turns(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role merged; where one has to speak in between, it says nothing."""
    found: list[Message] = []
    speaks = "user"
    """Whose turn it is."""
    for message in messages:
        role = message["role"]
        counts = role == "user" or (role == "assistant" and not message.get("tool_calls"))
        if not counts:
            if role == "assistant" and speaks == "user" and not any(known["role"] == "user" for known in found):
                found.append({"role": "user", "content": ""})
                speaks = "assistant"
            found.append(message)
            continue
        if role != speaks:
            last = found[-1] if found else None
            if last is not None and last["role"] == role and not last.get("tool_calls"):
                found[-1] = {**last, "content": _joined(last["content"], message["content"])}
                continue
            found.append({"role": speaks, "content": ""})
        found.append(message)
        speaks = "assistant" if role == "user" else "user"
    return found


def _in_words(message: Message) -> Message:
    silent = message["role"] == "assistant" and not message["content"] and not message.get("tool_calls")
    return {**message, "content": " "} if silent else message


def _joined(first: str, then: str) -> str:
    return f"{first}\n\n{then}" if first and then else first or then

"""Custom tools: they take a text, and the model is told of a function with that text as its one argument. Pure."""

import json
import re
from typing import Any, Literal

INPUT = "input"

_BEGIN = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_CERTAIN = re.compile(
    r'(?:[^"\\]+|\\(?:["\\/bfnrt]|u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))*"
)
"""Whole characters of a JSON string's inside."""


def parameters(pattern: str | None = None) -> dict[str, Any]:
    """The schema of such a function's arguments. ``pattern``: a regular expression that the whole text matches."""
    text: dict[str, Any] = {"type": "string"}
    if pattern is not None:
        text["pattern"] = f"^(?:{pattern})$"
    return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}


def arguments_of(text: str) -> str:
    """The arguments of such a call."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def input_of(arguments: str) -> str:
    """The text that valid arguments hold; where they are of another shape, they themselves."""
    found = json.loads(arguments)
    text = found.get(INPUT)
    return text if isinstance(text, str) and len(found) == 1 else arguments


class InputReader:
    """Reads valid arguments in pieces and tells the text in them as it comes; of another shape, at the end."""

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["begin", "text", "ended"] = "begin"

    def feed(self, text: str) -> str:
        """The text that the next piece of the arguments completes."""
        self._held += text
        if self._state == "begin":
            begun = _BEGIN.match(self._held)
            if begun is None:
                return ""
            self._held, self._state = self._held[begun.end() :], "text"
        return self._text() if self._state == "text" else ""

    def finish(self) -> str:
        """The arguments are complete: what was not told."""
        return input_of(self._held) if self._state == "begin" else ""

    def _text(self) -> str:
        certain = _CERTAIN.match(self._held)
        assert certain is not None
        if self._held[certain.end() :].startswith('"'):
            self._state = "ended"
        self._held = self._held[certain.end() :]
        return json.loads(f'"{certain.group()}"')

"""One call of a tool, read character by character: its name as soon as it is there, its arguments as they come. Pure.

Not a JSON parser: it finds where the values of one object begin and end. What the arguments hold is the caller's.
"""

import json
import re
from typing import Literal

_NAME = re.compile(r"[\w.:/-]{1,256}")
_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)


class NoCall(Exception):
    """This is no call, or ended being one before this character."""


class CallReader:
    """Reads ``{"name": ..., "arguments": {...}}``, in any order; a list may have been opened before it.

    ``names``: None, or the only names (and with them the only keys) that a call can have. ``bare``: ``name{...}`` with
    ``[CALL_ID]...`` and ``[ARGS]`` between is a call too.
    """

    def __init__(self, names: frozenset[str] | None = None, *, bare: bool = False) -> None:
        self._names = names
        self._bare = bare
        self._state: Literal["start", "bare", "key", "colon", "value", "comma"] = "start"
        self._value: list[str] = []
        """Of the key or value under way; arguments of a named call go to :attr:`_told` instead."""
        self._kind: Literal["none", "string", "container", "scalar"] = "none"
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._key = ""
        self._waiting = ""
        """Arguments that came before the name."""
        self._told: list[str] = []
        self._has_arguments = False
        self.name: str | None = None
        """Once it is known."""

    def take(self, character: str) -> bool:
        """Read one more; True if the call is complete with it.

        Raises:
            NoCall: it cannot be a part of a call.
        """
        if self._kind != "none":
            return self._in_value(character)
        if self._state == "bare":
            self._in_bare(character)
            return False
        if character in _SPACE:
            return False
        match self._state, character:
            case "start", "{":
                self._state = "key"
            case "start", "[":
                pass
            case "start", _ if self._bare and (character.isalnum() or character == "_"):
                self._state, self._value = "bare", [character]
            case "key", '"':
                self._begin("string", character)
            case (("key" | "comma"), "}"):
                self._end()
                return True
            case "colon", ":":
                self._state = "value"
            case "value", '"':
                self._begin("string", character)
            case "value", ("{" | "["):
                self._begin("container", character)
            case "value", _ if character.isalnum() or character in "-+.":
                self._begin("scalar", character)
            case "comma", ",":
                self._state = "key"
            case _:
                raise NoCall
        return False

    def told(self) -> str:
        """Arguments since the last time; nothing before there is a name."""
        if self.name is None:
            return ""
        text = "".join(self._told)
        self._told.clear()
        return text

    def finish(self) -> str:
        """The text ended inside the call: what is known of its arguments and was not told."""
        if self._kind == "string" and self._key in _ARGUMENTS:
            self._told.append("".join(self._value))
        return self.told()

    # --- values -------------------------------------------------------------------------------------------

    def _begin(self, kind: Literal["string", "container", "scalar"], character: str) -> None:
        self._kind, self._depth, self._quoted, self._escaped = kind, 0, False, False
        self._value = []
        self._in_value(character)

    def _in_value(self, character: str) -> bool:
        if self._kind == "scalar" and (character in ",}" or character in _SPACE):
            self._settle()
            return self.take(character)
        (self._told if self._streams() else self._value).append(character)
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._quoted = False
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self._kind != "scalar" and self._depth == 0 and not self._quoted:
            if self._state == "bare":
                return True
            self._settle()
        return False

    def _streams(self) -> bool:
        return self._kind == "container" and self.name is not None and self._key in _ARGUMENTS

    def _settle(self) -> None:
        """A key or value is complete."""
        kind, self._kind = self._kind, "none"
        if self._state == "key":
            self._key, self._state = _text("".join(self._value)), "colon"
            if self._names is not None and self._key not in _KEYS:
                raise NoCall
            return
        self._state = "comma"
        if self._key == "name" and self.name is None:
            if kind != "string":
                raise NoCall
            self._name(_text("".join(self._value)))
        elif self._key in _ARGUMENTS:
            self._has_arguments = True
            if kind == "string":
                self._argue(_text("".join(self._value)))
            elif kind == "scalar":
                self._argue("{}")
            elif self.name is None:
                self._argue("".join(self._value))

    def _argue(self, text: str) -> None:
        if self.name is None:
            self._waiting += text
        else:
            self._told.append(text)

    def _name(self, name: str) -> None:
        if not _NAME.fullmatch(name) or (self._names is not None and name not in self._names):
            raise NoCall
        self.name = name
        self._told.append(self._waiting)

    def _end(self) -> None:
        if self.name is None:
            raise NoCall
        if not self._has_arguments:
            self._told.append("{}")

    # --- name{...} ----------------------------------------------------------------------------------------

    def _in_bare(self, character: str) -> None:
        text = "".join(self._value)
        if character == "{":
            name, _, tags = text.partition("[")
            if tags and not (tags.endswith("ARGS]") or tags.startswith("CALL_ID]")):
                raise NoCall
            self._key = "arguments"
            self._name(name.strip())
            self._has_arguments = True
            self._begin("container", character)
        elif character.isalnum() or character in "_-." or ("[" in text or character == "[") or character in _SPACE:
            self._value.append(character)
            if len(self._value) > 256:
                raise NoCall
        else:
            raise NoCall


def _text(quoted: str) -> str:
    """The text of a JSON string; as it is where its escapes make no sense."""
    try:
        return json.loads(quoted, strict=False)
    except ValueError:
        return quoted[1:-1]

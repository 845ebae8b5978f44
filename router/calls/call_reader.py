"""One call of a tool, read as it comes: its name as soon as it is there, its arguments as valid JSON. Pure.

Not a JSON parser of the call itself: it finds where the values of one object begin and end.
"""

import json
import re
from typing import Literal

from router.calls.slips import Broken, ObjectMender, whole_object

_NAME = re.compile(r"[\w.:/-]{1,256}")
_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)
_NOTHING = ("null", "None")


class NoCall(Exception):
    """This is no call, or ended being one before the character at ``at`` of the piece that was read."""

    def __init__(self, at: int = 0) -> None:
        super().__init__(at)
        self.at = at


class CallReader:
    """Reads ``{"name": ..., "arguments": {...}}``, in any order; a list may have been opened before it.

    Args:
        names: None, or the only names that a call can have.
        only: it can have no other keys than a call's.
        bare: ``name{...}`` with ``[CALL_ID]...`` and ``[ARGS]`` between is a call too.
    """

    def __init__(self, names: frozenset[str] | None = None, *, only: bool = False, bare: bool = False) -> None:
        self._names = names
        self._only = only
        self._bare = bare
        self._state: Literal["start", "bare", "key", "colon", "value", "comma"] = "start"
        self._value: list[str] = []
        """Of the key or value under way."""
        self._kind: Literal["none", "string", "container", "scalar"] = "none"
        self._mender: ObjectMender | None = None
        """While arguments are read."""
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._key = ""
        self._told: list[str] = []
        self.name: str | None = None
        """Once it is known."""
        self.id = ""
        """That the model gave it, once it is known; empty: none."""
        self.argued = False
        """Its arguments are complete."""
        self.complete = False

    @property
    def settled(self) -> bool:
        """What is told with its beginning cannot change any more."""
        return self.complete or self.id != "" or self._state == "bare"

    def read(self, text: str, at: int) -> int:
        """Read on from ``at``, up to the end of the call or of the text; where that is.

        Raises:
            NoCall: it cannot be a part of a call.
        """
        while at < len(text) and not self.complete:
            if self._mender is not None:
                at = self._argue(self._mender, text, at)
                continue
            try:
                self._take(text[at])
            except NoCall:
                raise NoCall(at) from None
            if self._mender is None:
                at += 1  # else the mender begins with it
        return at

    def told(self) -> str:
        """Arguments since the last time; nothing before there is a name."""
        if self.name is None:
            return ""
        text = "".join(self._told)
        self._told.clear()
        return text

    def rest(self) -> str:
        """The text ended inside the call: what is known of its arguments and was not told."""
        if self._mender is not None:
            self._told.append(self._mender.rest())
        elif self._kind == "string" and self._key in _ARGUMENTS:
            self._told.append("".join(self._value))
        return self.told()

    def _take(self, character: str) -> None:
        if self._kind != "none":
            return self._in_value(character)
        if self._state == "bare":
            return self._in_bare(character)
        if character in _SPACE:
            return None
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
            case "colon", ":":
                self._begin_value()
            case "value", '"':
                self._begin("string", character)
            case "value", "{" if self._key in _ARGUMENTS:
                self._mender = ObjectMender()
            case "value", ("{" | "[") if self._key not in _ARGUMENTS:
                self._begin("container", character)
            case "value", _ if character.isalnum() or character in "-+.":
                self._begin("scalar", character)
            case "comma", ",":
                self._state = "key"
            case _:
                raise NoCall
        return None

    # --- values -------------------------------------------------------------------------------------------

    def _begin_value(self) -> None:
        if self._key in _ARGUMENTS and self.argued:
            raise NoCall
        self._state = "value"

    def _argue(self, mender: ObjectMender, text: str, at: int) -> int:
        try:
            at = mender.read(text, at)
        except Broken as broken:
            raise NoCall(broken.at) from None
        self._told.append(mender.told())
        if mender.done:
            self._mender, self.argued = None, True
            self.complete = self._state == "bare"
            self._state = "comma"
        return at

    def _begin(self, kind: Literal["string", "container", "scalar"], character: str) -> None:
        self._kind, self._depth, self._quoted, self._escaped = kind, 0, False, False
        self._value = []
        self._in_value(character)

    def _in_value(self, character: str) -> None:
        if self._kind == "scalar" and (character in ",}" or character in _SPACE):
            self._settle()
            return self._take(character)
        self._value.append(character)
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
            self._settle()
        return None

    def _settle(self) -> None:
        """A key or value is complete."""
        kind, self._kind = self._kind, "none"
        value = "".join(self._value)
        if self._state == "key":
            self._key, self._state = _text(value), "colon"
            if self._only and self._key not in _KEYS:
                raise NoCall
            return
        self._state = "comma"
        if self._key == "name" and self.name is None:
            if kind != "string":
                raise NoCall
            self._name(_text(value))
        elif self._key == "id" and kind == "string":
            self.id = self.id or _text(value)
        elif self._key in _ARGUMENTS:
            # As text, or nothing at all.
            text = _text(value).strip() if kind == "string" else value
            told = "{}" if not text or text in _NOTHING else whole_object(text)
            if told is None:
                raise NoCall
            self._told.append(told)
            self.argued = True

    def _name(self, name: str) -> None:
        if not _NAME.fullmatch(name) or (self._names is not None and name not in self._names):
            raise NoCall
        self.name = name

    def _end(self) -> None:
        if self.name is None:
            raise NoCall
        if not self.argued:
            self._told.append("{}")
        self.argued = self.complete = True

    # --- name{...} ----------------------------------------------------------------------------------------

    def _in_bare(self, character: str) -> None:
        text = "".join(self._value)
        if character == "{":
            name, _, tags = text.partition("[")
            if tags and not (tags.endswith("ARGS]") or tags.startswith("CALL_ID]")):
                raise NoCall
            self._name(name.strip())
            self.id = tags.removeprefix("CALL_ID]").partition("[")[0].strip() if tags.startswith("CALL_ID]") else ""
            self._mender = ObjectMender()
        elif character.isalnum() or character in "_-." or ("[" in text or character == "[") or character in _SPACE:
            self._value.append(character)
            if len(self._value) > 256:
                raise NoCall
        else:
            raise NoCall


def _text(quoted: str) -> str:
    """The text of a JSON string, slips mended."""
    found = whole_object(f'{{"text": {quoted}}}')
    assert found is not None  # a string ends where the reader says so
    return json.loads(found)["text"]

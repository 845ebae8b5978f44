"""Arguments of a call as models write them, told as JSON: what is valid to the letter, slips mended as it comes. Pure.

Mended is what can mean one thing only: control characters inside strings, a backslash that begins no escape
(``C:\\dir``), half of a surrogate pair, a comma before a closing bracket, ``True``, ``False`` and ``None``.
"""

import re
from typing import Literal

import msgspec

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = re.compile(r"[ \t\r\n]+")
_WORD = re.compile(r"[^\s,:{}\[\]\"]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
_CONTROLS = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
_CLOSERS = {"{": "}", "[": "]"}
_HEX = frozenset("0123456789abcdefABCDEF")
_LOST = "\\ufffd"


class Broken(Exception):
    """No JSON, and nothing that is meant by it is sure. ``at``: where in the piece that was read."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


class ObjectMender:
    """Reads one object in pieces. All that it tells is, at any time, the beginning of one; once done, all of one."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._wants: Literal["open", "first", "item", "colon", "value", "next"] = "open"
        """``first``: an item or the end; ``item``: of an object, a key."""
        self._quoted = False
        self._escape = ""
        """An escape that has begun."""
        self._high = ""
        """The escape of a surrogate pair's first half."""
        self._comma = ""
        """A comma, and the space after it: told if anything follows."""
        self._word = ""
        self._told: list[str] = []
        self.done = False

    def read(self, text: str, at: int = 0) -> int:
        """Read on from ``at``, up to the end of the object or of the text; where that is.

        Raises:
            Broken: it cannot be mended.
        """
        while at < len(text) and not self.done:
            if not self._quoted:
                at = self._structure(text, at)
            elif not self._escape and not self._high and (plain := _PLAIN.match(text, at)):
                self._told.append(plain.group())
                at = plain.end()
            else:
                at = self._string(text, at)
        return at

    def told(self) -> str:
        """What is certain since the last time."""
        text = "".join(self._told)
        self._told.clear()
        return text

    def rest(self) -> str:
        """The text ended: what was not certain, as it was."""
        return self._comma + self._word + self._high + self._escape

    # --- between strings ----------------------------------------------------------------------------------

    def _structure(self, text: str, at: int) -> int:
        if self._word or self._wants in ("value", "first", "item"):
            if word := _WORD.match(text, at):
                self._word += word.group()
                return word.end()
            if self._word:
                self._settle_word(at)
        if space := _SPACE.match(text, at):
            if self._comma:
                self._comma += space.group()
            else:
                self._told.append(space.group())
            return space.end()
        self._mark(text[at], at)
        return at + 1

    def _mark(self, mark: str, at: int) -> None:
        in_object = bool(self._closers) and self._closers[-1] == "}"
        match self._wants, mark:
            case "open", "{":
                self._open(mark)
            case (("first" | "item" | "next"), ("}" | "]")) if self._closers[-1] == mark:
                self._told.append(self._comma[1:] + mark)  # without a comma that nothing follows
                self._comma = ""
                self._closers.pop()
                self._wants, self.done = "next", not self._closers
            case "next", ",":
                self._comma, self._wants = mark, "item"
            case "colon", ":":
                self._told.append(mark)
                self._wants = "value"
            case (("first" | "item"), '"') if in_object:
                self._begin(mark)
                self._wants = "colon"
            case (("first" | "item" | "value"), '"'):
                self._begin(mark)
                self._wants = "next"
            case (("first" | "item"), ("{" | "[")) if not in_object:
                self._open(mark)
            case "value", ("{" | "["):
                self._open(mark)
            case _:
                raise Broken(at)

    def _open(self, mark: str) -> None:
        self._tell_comma()
        self._told.append(mark)
        self._closers.append(_CLOSERS[mark])
        self._wants = "first"

    def _begin(self, mark: str) -> None:
        self._tell_comma()
        self._told.append(mark)
        self._quoted = True

    def _tell_comma(self) -> None:
        self._told.append(self._comma)
        self._comma = ""

    def _settle_word(self, at: int) -> None:
        in_object = self._closers[-1] == "}"
        word = self._word if _NUMBER.fullmatch(self._word) else _WORDS.get(self._word.lower())
        if word is None or (in_object and self._wants != "value"):
            raise Broken(at)
        self._tell_comma()
        self._told.append(word)
        self._word, self._wants = "", "next"

    # --- in strings ---------------------------------------------------------------------------------------

    def _string(self, text: str, at: int) -> int:
        if self._escape:
            return self._escaped(text[at], at)
        if text[at] == "\\":
            self._escape = "\\"
            return at + 1
        self._tell_high()
        if plain := _PLAIN.match(text, at):
            self._told.append(plain.group())
            return plain.end()
        character = text[at]
        if character == '"':
            self._quoted = False
            self._told.append(character)
        else:
            self._told.append(_CONTROLS.get(character) or f"\\u{ord(character):04x}")
        return at + 1

    def _escaped(self, character: str, at: int) -> int:
        escape = self._escape + character
        if len(escape) == 2 and character != "u":
            self._escape = ""
            self._tell_high()
            if character in '"\\/bfnrt':
                self._told.append(escape)
            elif character == "'":
                self._told.append(character)
            else:
                self._told.append("\\\\")
                return at
            return at + 1
        if len(escape) > 2 and character not in _HEX:
            self._tell_high()
            self._told.append("\\" + self._escape)
            self._escape = ""
            return at
        self._escape = escape
        if len(escape) == 6:
            self._escape = ""
            self._unit(escape)
        return at + 1

    def _unit(self, escape: str) -> None:
        """One unit of UTF-16."""
        value = int(escape[2:], 16)
        if 0xDC00 <= value < 0xE000:
            self._told.append(self._high + escape if self._high else _LOST)
            self._high = ""
            return
        self._tell_high()
        if 0xD800 <= value < 0xDC00:
            self._high = escape
        else:
            self._told.append(escape)

    def _tell_high(self) -> None:
        if self._high:
            self._told.append(_LOST)
            self._high = ""


def whole_object(text: str) -> str | None:
    """The object that ``text`` is, whole; None where it is none."""
    mender = ObjectMender()
    try:
        end = mender.read(text)
    except Broken:
        return None
    return mender.told() if mender.done and end == len(text) else None


def is_object(text: str) -> bool:
    """Whether it is a JSON object, however deep."""
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except ValueError:
        return False
    except RecursionError:
        return whole_object(text) == text

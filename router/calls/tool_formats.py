"""How models write calls of tools in their text, read piece by piece. Pure.

Three formats, told apart by what marks a call:

- ``hermes`` (Hermes, Qwen, SmolLM): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``
- ``mistral``: ``[TOOL_CALLS]`` and a list of such objects, or ``name{...}``, or ``name[ARGS]{...}``
- ``llama3``: the whole answer is such an object, with ``parameters``; or several with ``;`` between them

What turns out to be no call is content, to the letter; white space around calls is not. Once a call's name was told it
is a call: if the text ends in the middle of its arguments, those are what there is of them.
"""

from typing import Literal

import msgspec

from router.calls.call_reader import CallReader, NoCall
from router.calls.reasoning import partial

ToolFormat = Literal["hermes", "mistral", "llama3"]

BEGIN: dict[ToolFormat, str] = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "<|python_tag|>"}
END = "</tool_call>"
MARKERS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": (BEGIN["hermes"], END),
    "mistral": (BEGIN["mistral"], "[ARGS]", "[CALL_ID]"),
    "llama3": (BEGIN["llama3"],),
}
"""What may be special tokens of a model, and has to be read all the same."""
_CLOSING = " \t\r\n]"
"""What may follow the last call of a list."""
_BETWEEN = _CLOSING + ",;"
"""What may stand between two calls."""


class Content(msgspec.Struct, frozen=True):
    """Text that is no call."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A call begins; calls are numbered from 0."""

    index: int
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """The next piece of a call's arguments: together they are JSON."""

    index: int
    text: str


Event = Content | CallStart | CallArguments


class ToolReader:
    """Reads text in pieces; apart from where contents and arguments are cut, the result does not depend on those.

    ``names``: the tools there are. Where nothing marks a call (``llama3``), only an object with one of them is one.
    """

    def __init__(self, form: ToolFormat, names: frozenset[str]) -> None:
        self._form: ToolFormat = form
        self._names = names if form == "llama3" else None
        self._state: Literal["begin", "text", "plain", "call", "after"] = "begin" if form == "llama3" else "text"
        self._held = ""
        self._doubtful = ""
        """What was read of a call that has no name yet, from the white space before it on."""
        self._marked = 0
        """How much of that comes before the call itself."""
        self._call = CallReader()
        self.calls = 0
        """Calls begun."""

    def feed(self, text: str) -> list[Event]:
        """What ``text``, and what was held back before it, tells now."""
        self._held += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return _merged(events)

    def finish(self) -> list[Event]:
        """The text ended: what is still held back."""
        held, self._held = self._held, ""
        if self._state == "call":
            if self._call.name is None:
                return [Content(self._doubtful)]
            rest = self._call.finish()
            return [CallArguments(self.calls - 1, rest)] if rest else []
        if self.calls and not held.strip(_CLOSING):
            return []
        if self._state == "after" and END.startswith(held.lstrip(_BETWEEN)):
            return []
        return [Content(held)] if held else []

    def _advance(self, events: list[Event]) -> bool:
        """Take what can be taken from the beginning of what is held; False: nothing more without more text."""
        match self._state:
            case "begin":
                return self._begin()
            case "text":
                return self._text(events)
            case "plain":
                if self._held:
                    events.append(Content(self._held))
                self._held = ""
                return False
            case "call":
                return self._read(events)
            case "after":
                return self._after()

    def _begin(self) -> bool:
        """Where nothing marks a call: is the answer one?"""
        begun, marker = self._held.lstrip(), BEGIN[self._form]
        if begun.startswith(marker):
            self._start(len(self._held) - len(begun) + len(marker))
        elif begun.startswith("{"):
            self._start(len(self._held) - len(begun))
        elif marker.startswith(begun):
            return False
        else:
            self._state = "plain"
        return True

    def _text(self, events: list[Event]) -> bool:
        marker = BEGIN[self._form]
        at = self._held.find(marker)
        end = at if at >= 0 else len(self._held) - partial(self._held, marker)
        shown = self._held[:end].rstrip()
        if shown:
            events.append(Content(shown))
            self._held = self._held[len(shown) :]
        if at < 0:
            return False
        self._start(self._held.index(marker) + len(marker))
        return True

    def _start(self, marked: int) -> None:
        """A call may begin after the first ``marked`` characters."""
        self._doubtful, self._held, self._marked = self._held[:marked], self._held[marked:], marked
        self._state = "call"
        self._call = CallReader(self._names, bare=self._form == "mistral")

    def _read(self, events: list[Event]) -> bool:
        call, held = self._call, self._held
        for at, character in enumerate(held):
            named = call.name is not None
            try:
                ended = call.take(character)
            except NoCall:
                self._tell(events)
                self._give_up(events, held[at:])
                return True
            if not named:
                self._doubtful += character
                if call.name is not None:
                    events.append(CallStart(self.calls, call.name))
                    self.calls += 1
            if ended:
                self._tell(events)
                self._held, self._state = held[at + 1 :], "after"
                return True
        self._tell(events)
        self._held = ""
        return False

    def _tell(self, events: list[Event]) -> None:
        if arguments := self._call.told():
            events.append(CallArguments(self.calls - 1, arguments))

    def _give_up(self, events: list[Event], rest: str) -> None:
        """It is no call, or not any more."""
        self._state = "plain" if self._form == "llama3" else "text"
        if self._call.name is not None:
            self._held = rest
            return
        events.append(Content(self._doubtful[: self._marked]))
        self._held = self._doubtful[self._marked :] + rest

    def _after(self) -> bool:
        rest = self._held.lstrip(_BETWEEN)
        if not rest or (self._form == "hermes" and END.startswith(rest) and rest != END):
            return False
        if rest.startswith("{"):
            self._start(len(self._held) - len(rest))
        elif self._form == "hermes" and rest.startswith(END):
            self._held, self._state = rest[len(END) :], "text"
        else:
            self._held = self._held.lstrip(_CLOSING)
            self._state = "plain" if self._form == "llama3" else "text"
        return True


def _merged(events: list[Event]) -> list[Event]:
    """Neighbouring contents as one, empty ones left out."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, Content):
            if not event.text:
                continue
            if result and isinstance(last := result[-1], Content):
                result[-1] = Content(last.text + event.text)
                continue
        result.append(event)
    return result

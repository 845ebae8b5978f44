"""How models write calls of tools in their text, read piece by piece. Pure.

Three formats, told apart by what marks a call:

- ``hermes`` (Hermes, Qwen, SmolLM): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``
- ``mistral``: ``[TOOL_CALLS]`` and a list of such objects, or ``name{...}``, or ``name[ARGS]{...}``
- ``llama3``: the whole answer is such an object, with ``parameters``; or several with ``;`` between them

What turns out to be no call is content, to the letter; white space around calls is not. Where calls are marked they are
told as they come, so that what was told of one may be taken back; if the text ends in the middle of its arguments,
those are what there is of them. Where nothing marks them, a call is told when it is complete.
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
_CLOSING: dict[ToolFormat, str] = {"hermes": " \t\r\n]}", "mistral": " \t\r\n]", "llama3": " \t\r\n]"}
"""What may follow the last call of a list, or a call that was closed once too often."""
_SEPARATORS = ",;"
"""What may stand between two calls, too."""
RETRIED_CHARACTERS_MAX = 1024
"""Of what began like a call: inside of more than that none is looked for, which would take long."""


class Content(msgspec.Struct, frozen=True):
    """Text that is no call."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A call begins; calls are numbered from 0."""

    index: int
    name: str
    id: str = ""
    """That the model gave it; empty: none that was known in time."""


class CallArguments(msgspec.Struct, frozen=True):
    """The next piece of a call's arguments: together they are the beginning of a JSON object."""

    index: int
    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """A call is complete, and its arguments are a JSON object; one without this was cut."""

    index: int


class CallBroken(msgspec.Struct, frozen=True):
    """What was told of a call is none: it follows as content."""

    index: int


Event = Content | CallStart | CallArguments | CallEnd | CallBroken


class ToolReader:
    """Reads text in pieces; apart from where contents and arguments are cut, the result does not depend on those.

    Args:
        form: how calls are written.
        names: the only names that a call can have; None: any. Where nothing marks a call there must be some.
        forced: the text is calls and nothing else, so that no part of one is content.
        ids: the model gives its calls ids, which may come last: a call is told when its id is known, or it ends.
    """

    def __init__(
        self, form: ToolFormat, names: frozenset[str] | None, *, forced: bool = False, ids: bool = False
    ) -> None:
        assert names is not None or form != "llama3"
        self._form: ToolFormat = form
        self._names = names
        self._forced = forced
        self._waits = form == "llama3" and not forced
        """A call is told when it is complete."""
        self._ids = ids
        self._state: Literal["begin", "text", "plain", "call", "after"] = "begin" if form == "llama3" else "text"
        self._held = ""
        self._read_of_call: list[str] = []
        """What was read of a call, from the white space before it on."""
        self._marked = 0
        """How much of that comes before the call itself."""
        self._call = CallReader()
        self._started = False
        """The call was told."""
        self.calls = 0
        """Calls that were told."""

    def feed(self, text: str) -> list[Event]:
        """What ``text``, and what was held back before it, tells now."""
        self._held += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return self._merged(events) if events else events

    def finish(self) -> list[Event]:
        """The text ended: what is still held back."""
        held, self._held = self._held, ""
        if self._state == "call":
            return self._merged(self._cut())
        if self.calls and not held.strip(_CLOSING[self._form]):
            return []
        if self._state == "after" and END.startswith(held.lstrip(_CLOSING[self._form] + _SEPARATORS)):
            return []
        return self._merged([Content(held)])

    def _cut(self) -> list[Event]:
        """The text ended inside a call."""
        events: list[Event] = []
        if not self._waits:
            self._tell(events)
        if not self._started:
            return [Content("".join(self._read_of_call))]
        if self._call.argued:
            return [*events, CallEnd(self.calls - 1)]
        rest = self._call.rest()
        return [*events, CallArguments(self.calls - 1, rest)] if rest else events

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
        self._read_of_call, self._held, self._marked = [self._held[:marked]], self._held[marked:], marked
        self._state, self._started = "call", False
        self._call = CallReader(self._names, only=self._form == "llama3", bare=self._form == "mistral")

    def _read(self, events: list[Event]) -> bool:
        call, held = self._call, self._held
        try:
            at = call.read(held, 0)
        except NoCall as no:
            self._read_of_call.append(held[: no.at])
            self._give_up(events, held[no.at :])
            return True
        self._read_of_call.append(held if at == len(held) else held[:at])
        self._held = held[at:]
        if call.complete or not (self._waits or (self._ids and not call.settled)):
            self._tell(events)
        if call.complete:
            events.append(CallEnd(self.calls - 1))
            self._state = "after"
        return call.complete

    def _tell(self, events: list[Event]) -> None:
        """What is known of the call since the last time."""
        if self._call.name is None:
            return
        if not self._started:
            events.append(CallStart(self.calls, self._call.name, self._call.id))
            self.calls, self._started = self.calls + 1, True
        if arguments := self._call.told():
            events.append(CallArguments(self.calls - 1, arguments))

    def _give_up(self, events: list[Event], rest: str) -> None:
        """It is no call, or not any more."""
        named = self._call.name is not None
        if not self._waits and (not self._ids or self._started or self._call.argued):
            self._tell(events)
        if named and self._call.argued and not self._waits:
            # All of it is there: what follows belongs to nothing.
            events.append(CallEnd(self.calls - 1))
            self._held, self._state = rest, "after"
            return
        if self._started:
            events.append(CallBroken(self.calls - 1))
        self._state = "plain" if self._form == "llama3" else "text"
        text = "".join(self._read_of_call)
        settled = len(text) if named or len(text) > RETRIED_CHARACTERS_MAX else self._marked
        events.append(Content(text[:settled]))
        self._held = text[settled:] + rest

    def _after(self) -> bool:
        closing = _CLOSING[self._form]
        rest = self._held.lstrip(closing + _SEPARATORS)
        if not rest or (self._form == "hermes" and END.startswith(rest) and rest != END):
            return False
        if rest.startswith("{"):
            self._start(len(self._held) - len(rest))
        elif self._form == "hermes" and rest.startswith(END):
            self._held, self._state = rest[len(END) :], "text"
        else:
            self._held = self._held.lstrip(closing)
            self._state = "plain" if self._form == "llama3" else "text"
        return True

    def _merged(self, events: list[Event]) -> list[Event]:
        """Neighbouring contents as one, empty ones left out, and all where there can be none."""
        if len(events) == 1 and not isinstance(events[0], Content):
            return events
        result: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                if self._forced or not event.text:
                    continue
                if result and isinstance(last := result[-1], Content):
                    result[-1] = Content(last.text + event.text)
                    continue
            result.append(event)
        return result

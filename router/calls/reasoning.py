"""Takes a model's reasoning, between ``<think>`` and ``</think>``, out of its answer. Pure."""

import msgspec

OPEN, CLOSE = "<think>", "</think>"


class Thought(msgspec.Struct, frozen=True):
    """What a piece of text adds: to the reasoning, and to what follows it."""

    reasoning: str = ""
    text: str = ""


class ThinkReader:
    """Reads text in pieces; the result does not depend on how it is cut into them.

    Reasoning comes first or not at all: a ``<think>`` later on is text like any other. ``opened``: the prompt ended
    with the begin of it. Newlines around the markers belong to the markers.
    """

    def __init__(self, *, opened: bool) -> None:
        self._state = "opened" if opened else "start"
        self._held = ""

    @property
    def thinking(self) -> bool:
        """What was read so far is, to its end, reasoning."""
        return self._state in ("opened", "thinking")

    def feed(self, text: str) -> Thought:
        """What ``text``, and what was held back before it, tells now."""
        self._held += text
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(OPEN):
                self._state, self._held = "opened", begun[len(OPEN) :]
            elif not OPEN.startswith(begun):
                self._state = "text"
        reasoning = self._reason() if self.thinking else ""
        if self._state == "closed":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "text"
        if self._state == "text":
            text, self._held = self._held, ""
            return Thought(reasoning, text)
        return Thought(reasoning)

    def finish(self) -> Thought:
        """The text ended: what is still held back."""
        held, self._held = self._held, ""
        return Thought(reasoning=held) if self.thinking else Thought(text=held)

    def _reason(self) -> str:
        if self._state == "opened":
            self._held = self._held.lstrip("\n")
            if not self._held:
                return ""
            self._state = "thinking"
        at = self._held.find(CLOSE)
        if at >= 0:
            reasoning, self._held, self._state = self._held[:at].rstrip("\n"), self._held[at + len(CLOSE) :], "closed"
            return reasoning
        keep = partial(self._held, CLOSE)
        shown = self._held[: len(self._held) - keep].rstrip("\n")
        self._held = self._held[len(shown) :]
        return shown


def partial(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``marker``, but not all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0

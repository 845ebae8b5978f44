"""One choice's tokens on their way to text: stop strings, stop tokens, counts. Pure."""

from collections.abc import Sequence

import msgspec

from router.calls.events import Choice, Mark, Opening, Said, joined
from router.calls.reading import AnswerReader
from router.calls.text import TextStream
from router.traces.hits import Hits
from tracehaul.wire.steps import FinishReason, StepUsage, TokenLogprobs


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one.

    ``include``: they are shown themselves.

    The result does not depend on how the text is cut into pieces: of several matches, the one that ends first counts.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """What was found."""

    @property
    def matches(self) -> bool:
        """There is something to find."""
        return bool(self._stops)

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can be shown now, and True if it ends before a stop string, or with it."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if matches:
            self._held = ""
            end, at, self.matched = min(matches)
            return buffer[: end if self._include else at], True
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], False

    def flush(self) -> str:
        """What was held back: nothing follows it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Growth(msgspec.Struct, frozen=True, gc=False):
    """What one output adds to a choice."""

    tokens: list[int]
    """A stop string may have ended the choice before the last of them that came."""
    marks: Sequence[Mark]
    """One for each of ``tokens``, if logprobs are asked for."""
    said: Said


class Answer:
    """One choice as it grows."""

    def __init__(
        self,
        stream: TextStream,
        reader: AnswerReader | None = None,
        *,
        stops: Sequence[str],
        stop_tokens: Sequence[int],
        min_tokens: int,
        include_stops: bool = False,
    ) -> None:
        """``include_stops``: what ends it is shown itself."""
        self._stream = stream
        self.reader = reader or AnswerReader()
        """Reads what it says."""
        self._matcher = StopMatcher(stops, include=include_stops)
        self._stop_tokens = frozenset(stop_tokens)
        self._silent = frozenset[int]() if include_stops else self._stop_tokens
        """What says that the text ended, and is none itself."""
        self._min_tokens = min_tokens
        self._texts: list[str] = []
        self._decoded = 0
        """Characters of all tokens so far, shown or not."""
        self.tokens: list[int] = []
        self.marks: list[Mark] = []
        self.usage = StepUsage()
        self.hits = Hits()
        self.reason: FinishReason | None = None
        self.matched = False
        """A stop string ended it."""

    @property
    def stop(self) -> str | None:
        """The stop string that ended it; None: something else did."""
        return self._matcher.matched

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._texts)

    @property
    def generated(self) -> list[int]:
        """The ids without the token that ended them: what the next prompt will quote."""
        return self.tokens[:-1] if self.tokens and self.tokens[-1] in self._stop_tokens else self.tokens

    @property
    def plain(self) -> bool:
        """No text ends it."""
        return not self._matcher.matches

    def grow(self, tokens: list[int]) -> Said:
        """Take the next tokens of a plain one."""
        self.tokens += tokens
        silent = self._silent
        text = self._stream.push(tokens if silent.isdisjoint(tokens) else [t for t in tokens if t not in silent])
        self._decoded += len(text)
        self._texts.append(text)
        return self.reader.feed(text, len(tokens))

    def push(self, tokens: list[int], logprobs: Sequence[TokenLogprobs] | None = None) -> Growth:
        """Take the next tokens, with their logprobs if they are to be told."""
        assert self.reason is None
        if logprobs is None and self.plain:
            return Growth(tokens, (), self.grow(tokens))
        known = len(self.tokens)
        shown: list[str] = []
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            if logprobs is not None:
                self.marks.append(Mark(token, self._decoded, logprobs[count - 1]))
            if token in self._silent:
                continue
            text = self._stream.push((token,))
            self._decoded += len(text)
            if len(self.tokens) <= self._min_tokens:
                shown.append(text)
                continue
            text, stopped = self._matcher.push(text)
            shown.append(text)
            if stopped:
                self.reason, self.matched = "stop", True
                break
        return self._growth(shown, known)

    def finish(self, reason: FinishReason, usage: StepUsage) -> Growth:
        """The step ended: what is still held back."""
        assert self.reason is None
        text, stopped = self._matcher.push(self._stream.finish())
        self.reason, self.usage, self.matched = "stop" if stopped else reason, usage, stopped
        return self._growth([text] if stopped else [text, self._matcher.flush()], len(self.tokens))

    def nothing(self, usage: StepUsage) -> Growth:
        """No output is wanted: the choice ends before its first token."""
        assert self.reason is None
        self.reason, self.usage = "length", usage
        return self._growth([], 0)

    def _growth(self, shown: list[str], known: int) -> Growth:
        """What was added to the first ``known`` tokens."""
        text = "".join(shown)
        self._texts.append(text)
        added = self.tokens[known:]
        return Growth(added, self.marks[known:], self._said(text, len(added)))

    def _said(self, text: str, tokens: int) -> Said:
        said = self.reader.feed(text, tokens)
        return said if self.reason is None else joined(said, self.reader.finish())

    def whole(self, opening: Opening) -> Choice:
        """All of it, once it has ended."""
        assert self.reason is not None
        return Choice(opening, self.reader.whole, self.tokens, self.marks, self.reason, self.reader.called, self.stop)

"""How answers look on the wire: two endpoints, each whole or as chunks."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from router.api.answers import Answer, Piece
from router.api.echo import Echo
from router.api.logprobs import Mark, chat_logprobs, text_logprobs
from router.api.responses import (
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    Delta,
    Response,
    TextChoice,
    Usage,
)
from router.api.said import deltas, finish_reason, message
from router.api.text import Text
from tracehaul.wire.steps import FinishReason

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"

UsageField = Usage | UnsetType | None


class Head(msgspec.Struct, frozen=True):
    """What is the same in every object of one call."""

    id: str
    created: int
    model: str


class Shape(Protocol):
    """One endpoint's objects, for one call."""

    def piece(self, index: int, piece: Piece, usage: UsageField) -> bytes:
        """Events for what an output adds to a choice; empty if there is nothing to tell."""
        ...

    def end(self, index: int, reason: FinishReason, usage: UsageField) -> bytes:
        """The event that ends a choice."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The event that tells a stream's usage."""
        ...

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The body of a call that does not stream."""
        ...


class ChatShape:
    """Chat completions. ``prompt_ids`` is None unless the client wants token ids; ``text`` reads the tokens that
    logprobs are of."""

    def __init__(self, head: Head, text: Text, prompt_ids: list[int] | None) -> None:
        self._head = head
        self._text = text
        self._prompt_ids = prompt_ids
        self._begun: set[int] = set()
        self._called: set[int] = set()
        """Choices that have told a call."""

    def piece(self, index: int, piece: Piece, usage: UsageField) -> bytes:
        events = self._begin(index, usage)
        if piece.said.calls:
            self._called.add(index)
        told = deltas(piece.said)
        if not told and (piece.marks or (self._prompt_ids is not None and piece.tokens)):
            told = [Delta(content="")]
        ids = UNSET if self._prompt_ids is None else piece.tokens
        logprobs = self._logprobs(piece.marks)
        for delta in told:
            events += self._chunk([ChatDelta(index, delta, logprobs=logprobs, token_ids=ids)], usage)
            ids, logprobs = UNSET if ids is UNSET else [], None  # told once
        return events

    def end(self, index: int, reason: FinishReason, usage: UsageField) -> bytes:
        ended = finish_reason(reason, called=index in self._called)
        return self._begin(index, usage) + self._chunk([ChatDelta(index, Delta(), ended)], usage)

    def usage(self, usage: Usage) -> bytes:
        return self._chunk([], usage)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices: list[ChatChoice] = []
        for index, answer in enumerate(answers):
            assert answer.reason is not None
            assert answer.reader is not None
            ids = UNSET if self._prompt_ids is None else answer.tokens
            reason, told = finish_reason(answer.reason, called=answer.reader.called), self._logprobs(answer.marks)
            whole = message(answer.reader.whole)
            choices.append(ChatChoice(index, whole, reason, logprobs=told, token_ids=ids))
        prompt_ids = UNSET if self._prompt_ids is None else self._prompt_ids
        head = self._head
        return msgspec.json.encode(
            Response(head.id, "chat.completion", head.created, head.model, choices, usage, prompt_token_ids=prompt_ids)
        )

    def _logprobs(self, marks: Sequence[Mark]) -> ChatLogprobs | None:
        return chat_logprobs(self._text, marks) if marks else None

    def _begin(self, index: int, usage: UsageField) -> bytes:
        """A choice's first event carries its role; a call's first event also the prompt."""
        if index in self._begun:
            return b""
        prompt_ids = UNSET if self._prompt_ids is None or self._begun else self._prompt_ids
        self._begun.add(index)
        return self._chunk([ChatDelta(index, Delta(role="assistant", content=""))], usage, prompt_ids)

    def _chunk(self, choices: list[ChatDelta], usage: UsageField, prompt_ids: list[int] | UnsetType = UNSET) -> bytes:
        head = self._head
        return event(
            Response(
                head.id,
                "chat.completion.chunk",
                head.created,
                head.model,
                choices,
                usage,
                prompt_token_ids=prompt_ids,
            )
        )


class _Start(NamedTuple):
    """What a completion's choice begins with: its prompt, as far as the client wants it."""

    text: str
    marks: list[Mark]
    prompt_ids: list[int] | UnsetType


class TextShape:
    """Completions.

    ``prompt_ids`` holds each choice's prompt; None unless the client wants token ids. ``echoes`` holds what each choice
    begins with; None unless the client wants it. ``text`` reads the tokens that logprobs are of.
    """

    def __init__(
        self, head: Head, text: Text, prompt_ids: list[list[int]] | None, echoes: Sequence[Echo] | None
    ) -> None:
        self._head = head
        self._text = text
        self._prompt_ids = prompt_ids
        self._echoes = echoes
        self._begun: set[int] = set()

    def piece(self, index: int, piece: Piece, usage: UsageField) -> bytes:
        start = self._begin(index)
        text, marks = start.text + piece.text, start.marks + self._moved(index, piece.marks)
        if not (text or marks or (self._prompt_ids is not None and piece.tokens)):
            return b""
        return self._chunk([self._choice(index, text, None, piece.tokens, marks, start.prompt_ids)], usage)

    def end(self, index: int, reason: FinishReason, usage: UsageField) -> bytes:
        start = self._begin(index)
        return self._chunk([self._choice(index, start.text, reason, [], start.marks, start.prompt_ids)], usage)

    def usage(self, usage: Usage) -> bytes:
        return self._chunk([], usage)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices: list[TextChoice] = []
        for index, answer in enumerate(answers):
            start = self._begin(index)
            text, marks = start.text + answer.text, start.marks + self._moved(index, answer.marks)
            choices.append(self._choice(index, text, answer.reason, answer.tokens, marks, start.prompt_ids))
        return msgspec.json.encode(self._response(choices, usage))

    def _begin(self, index: int) -> "_Start":
        """What the next event of a choice begins with; nothing after its first."""
        if index in self._begun:
            return _Start("", [], UNSET)
        self._begun.add(index)
        prompt_ids = UNSET if self._prompt_ids is None else self._prompt_ids[index]
        if self._echoes is None:
            return _Start("", [], prompt_ids)
        return _Start(self._echoes[index].text, self._echoes[index].marks, prompt_ids)

    def _moved(self, index: int, marks: Sequence[Mark]) -> list[Mark]:
        """Behind what the choice begins with."""
        start = len(self._echoes[index].text) if self._echoes is not None else 0
        return [Mark(mark.token, mark.offset + start, mark.logprobs) for mark in marks]

    def _choice(
        self,
        index: int,
        text: str,
        reason: FinishReason | None,
        tokens: list[int],
        marks: Sequence[Mark],
        prompt_ids: list[int] | UnsetType,
    ) -> TextChoice:
        ids = UNSET if self._prompt_ids is None else tokens
        told = text_logprobs(self._text, marks) if marks else None
        return TextChoice(index, text, reason, told, token_ids=ids, prompt_token_ids=prompt_ids)

    def _chunk(self, choices: list[TextChoice], usage: UsageField) -> bytes:
        return event(self._response(choices, usage))

    def _response(self, choices: list[TextChoice], usage: UsageField) -> Response:
        return Response(self._head.id, "text_completion", self._head.created, self._head.model, choices, usage)


def event(data: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"

"""How answers look on the wire: two endpoints, each whole or as chunks."""

from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from router.api.answers import Answer, Piece
from router.api.responses import (
    ChatChoice,
    ChatDelta,
    Delta,
    Response,
    TextChoice,
    Usage,
)
from router.api.said import deltas, finish_reason, message
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
    """Chat completions. ``prompt_ids`` is None unless the client wants token ids."""

    def __init__(self, head: Head, prompt_ids: list[int] | None) -> None:
        self._head = head
        self._prompt_ids = prompt_ids
        self._begun: set[int] = set()
        self._called: set[int] = set()
        """Choices that have told a call."""

    def piece(self, index: int, piece: Piece, usage: UsageField) -> bytes:
        events = self._begin(index, usage)
        if piece.said.calls:
            self._called.add(index)
        told = deltas(piece.said)
        if not told and self._prompt_ids is not None and piece.tokens:
            told = [Delta(content="")]
        ids = UNSET if self._prompt_ids is None else piece.tokens
        for delta in told:
            events += self._chunk([ChatDelta(index, delta, token_ids=ids)], usage)
            ids = UNSET if ids is UNSET else []
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
            reason = finish_reason(answer.reason, called=answer.reader.called)
            choices.append(ChatChoice(index, message(answer.reader.whole), reason, token_ids=ids))
        prompt_ids = UNSET if self._prompt_ids is None else self._prompt_ids
        head = self._head
        return msgspec.json.encode(
            Response(head.id, "chat.completion", head.created, head.model, choices, usage, prompt_token_ids=prompt_ids)
        )

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


class TextShape:
    """Completions. ``prompt_ids`` holds each choice's prompt; None unless the client wants token ids."""

    def __init__(self, head: Head, prompt_ids: list[list[int]] | None) -> None:
        self._head = head
        self._prompt_ids = prompt_ids
        self._begun: set[int] = set()

    def piece(self, index: int, piece: Piece, usage: UsageField) -> bytes:
        if not piece.text and (self._prompt_ids is None or not piece.tokens):
            return b""
        return self._chunk([self._choice(index, piece.text, None, piece.tokens)], usage)

    def end(self, index: int, reason: FinishReason, usage: UsageField) -> bytes:
        return self._chunk([self._choice(index, "", reason, [])], usage)

    def usage(self, usage: Usage) -> bytes:
        return self._chunk([], usage)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = [self._choice(i, answer.text, answer.reason, answer.tokens) for i, answer in enumerate(answers)]
        return msgspec.json.encode(self._response(choices, usage))

    def _choice(self, index: int, text: str, reason: FinishReason | None, tokens: list[int]) -> TextChoice:
        if self._prompt_ids is None:
            return TextChoice(index, text, reason)
        prompt_ids = UNSET if index in self._begun else self._prompt_ids[index]
        self._begun.add(index)
        return TextChoice(index, text, reason, token_ids=tokens, prompt_token_ids=prompt_ids)

    def _chunk(self, choices: list[TextChoice], usage: UsageField) -> bytes:
        return event(self._response(choices, usage))

    def _response(self, choices: list[TextChoice], usage: UsageField) -> Response:
        return Response(self._head.id, "text_completion", self._head.created, self._head.model, choices, usage)


def event(data: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"

"""How completions tell an answer, whole or as chunks. Pure."""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import UNSET

from router.calls.call import Options
from router.calls.events import Begun, CallEvent, Choice, Ended, Mark, Opening, Piece, Usage
from router.calls.text import Text
from router.dialects.completions.logprobs import text_logprobs
from router.dialects.completions.responses import TextChoice
from router.dialects.openai.response import Frame, Head, Response, frame
from router.dialects.openai.stream import DONE, event
from router.dialects.openai.usage import UsageField, chunk_usage, usage_of
from tracehaul.wire.steps import FinishReason

_encode = msgspec.json.Encoder().encode
_NOTHING = Opening()


class TextTeller:
    """Tells one call. ``text`` reads the tokens that logprobs are of."""

    def __init__(self, head: Head, options: Options, text: Text) -> None:
        self._head = head
        self._options = options
        self._text = text
        self._openings: dict[int, Opening] = {}
        """What choices begin with and have not told yet."""
        self._shifts: dict[int, int] = {}
        """Characters that choices begin with."""
        self._frames: dict[int, Frame] = {}
        """Of each choice's chunks that hold a text and nothing else of their own."""

    def events(self, events: Iterable[CallEvent]) -> bytes:
        chunks: list[bytes] = []
        for happened in events:
            match happened:
                case Piece():
                    self._piece(happened, chunks)
                case Begun(index, opening):
                    self._openings[index] = opening
                    self._shifts[index] = len(opening.text)
                case Ended(index, reason, _, usage):
                    opening = self._openings.pop(index, _NOTHING)
                    ended = self._choice(index, opening, opening.text, reason, [], opening.marks)
                    chunks.append(self._chunk([ended], chunk_usage(usage, self._options)))
        return b"".join(chunks)

    def end(self, usage: Usage) -> bytes:
        return (self._chunk([], usage_of(usage)) if self._options.include_usage else b"") + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        told = [
            self._choice(
                index,
                choice.opening,
                choice.opening.text + choice.said.content,
                choice.reason,
                choice.tokens,
                [*choice.opening.marks, *_moved(choice.marks, len(choice.opening.text))],
            )
            for index, choice in enumerate(choices)
        ]
        return _encode(self._response(told, usage_of(usage)))

    def _piece(self, piece: Piece, chunks: list[bytes]) -> None:
        index = piece.choice
        opening = self._openings.pop(index, _NOTHING)
        text = opening.text + piece.said.content
        options = self._options
        if not (opening.marks or piece.marks or options.return_token_ids or options.continuous_usage):
            if text:
                chunks.append(self._frame(index).around(_encode(text)))
            return
        marks = [*opening.marks, *_moved(piece.marks, self._shifts[index])]
        if text or marks or (options.return_token_ids and piece.tokens):
            told = self._choice(index, opening, text, None, piece.tokens, marks)
            chunks.append(self._chunk([told], chunk_usage(piece.usage, options)))

    def _choice(
        self,
        index: int,
        opening: Opening,
        text: str,
        reason: FinishReason | None,
        tokens: list[int],
        marks: Sequence[Mark],
    ) -> TextChoice:
        return TextChoice(
            index,
            text,
            reason,
            text_logprobs(self._text, marks) if marks else None,
            token_ids=tokens if self._options.return_token_ids else UNSET,
            prompt_token_ids=UNSET if opening.prompt_ids is None else opening.prompt_ids,
        )

    def _frame(self, index: int) -> Frame:
        found = self._frames.get(index)
        if found is None:
            empty = self._choice(index, _NOTHING, "", None, [], ())
            found = frame(self._chunk([empty], chunk_usage(None, self._options)), b'"text":""')
            found = self._frames[index] = Frame(found.head + b'"text":', found.tail)
        return found

    def _chunk(self, choices: Sequence[TextChoice], usage: UsageField) -> bytes:
        return event(self._response(choices, usage))

    def _response(self, choices: Sequence[TextChoice], usage: UsageField) -> Response[TextChoice]:
        head = self._head
        told = head.told.priority
        return Response(
            head.id, "text_completion", head.created, head.model, head.fingerprint, choices, usage, priority=told
        )


def _moved(marks: Sequence[Mark], by: int) -> list[Mark]:
    """Behind what the choice begins with."""
    return [Mark(mark.token, mark.offset + by, mark.logprobs) for mark in marks]

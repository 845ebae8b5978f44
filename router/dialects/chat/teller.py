"""How chat completions tell an answer, whole or as chunks. Pure."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.calls.call import Options
from router.calls.events import Begun, CallEvent, Choice, Ended, Mark, Piece, Usage
from router.calls.text import Text
from router.dialects.chat.logprobs import chat_logprobs
from router.dialects.chat.responses import ChatChoice, ChatDelta, ChatLogprobs, Delta
from router.dialects.chat.said import deltas, finish_reason, message
from router.dialects.chat.stored import Asked
from router.dialects.openai.response import Frame, Head, Response, frame
from router.dialects.openai.stream import DONE, event
from router.dialects.openai.usage import UsageField, chunk_usage, usage_of

_encode = msgspec.json.Encoder().encode
_NO_TEXT = Delta(content="")
ChatObject = Literal["chat.completion", "chat.completion.chunk"]


class ChatTeller:
    """Tells one call. ``text`` reads the tokens that logprobs are of; ``older``: see :mod:`.said`;
    ``asked``: of one that is to be kept."""

    def __init__(
        self, head: Head, options: Options, text: Text, *, older: bool = False, asked: Asked | None = None
    ) -> None:
        self._older = older
        self.asked = asked
        """What is to be kept with the answer; None: nothing."""
        self.store: bool | UnsetType | None = head.told.store
        """What answers say of that."""
        self._head = head
        self._options = options
        self._text = text
        self._begun = False
        """The first chunk was told, and with it the prompt."""
        self._frames: dict[int, Frame] = {}
        """Of each choice's chunks that hold a delta and nothing else of their own."""

    def events(self, events: Iterable[CallEvent]) -> bytes:
        chunks: list[bytes] = []
        for happened in events:
            match happened:
                case Piece():
                    self._piece(happened, chunks)
                case Begun(index, opening, usage):
                    chunks.append(self._begin(index, opening.prompt_ids, chunk_usage(usage, self._options)))
                case Ended(index, reason, called, usage):
                    ended = ChatDelta(index, Delta(), finish_reason(reason, called=called, older=self._older))
                    chunks.append(self._chunk([ended], chunk_usage(usage, self._options)))
        return b"".join(chunks)

    def end(self, usage: Usage) -> bytes:
        return (self._chunk([], usage_of(usage)) if self._options.include_usage else b"") + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        with_ids = self._options.return_token_ids
        told = [
            ChatChoice(
                index,
                message(choice.said, older=self._older),
                finish_reason(choice.reason, called=choice.called, older=self._older),
                logprobs=self._logprobs(choice.marks),
                token_ids=choice.tokens if with_ids else UNSET,
            )
            for index, choice in enumerate(choices)
        ]
        prompt_ids = choices[0].opening.prompt_ids
        return _encode(
            self._response("chat.completion", told, usage_of(usage), UNSET if prompt_ids is None else prompt_ids)
        )

    def _piece(self, piece: Piece, chunks: list[bytes]) -> None:
        said, with_ids = piece.said, self._options.return_token_ids
        plain = not (piece.marks or with_ids or self._options.continuous_usage)
        if plain and not (said.reasoning or said.calls):
            if said.content:
                chunks.append(self._frame(piece.choice).around(b'{"content":%b}' % _encode(said.content)))
            return
        told = deltas(said, older=self._older)
        if plain:
            for delta in told:
                chunks.append(self._frame(piece.choice).around(_encode(delta)))
            return
        if not told and (piece.marks or (with_ids and piece.tokens)):
            told = [_NO_TEXT]
        usage = chunk_usage(piece.usage, self._options)
        ids: list[int] | UnsetType = piece.tokens if with_ids else UNSET
        logprobs = self._logprobs(piece.marks)
        for delta in told:
            chunks.append(self._chunk([ChatDelta(piece.choice, delta, logprobs=logprobs, token_ids=ids)], usage))
            ids, logprobs = [] if with_ids else UNSET, None  # told once

    def _begin(self, index: int, prompt_ids: list[int] | None, usage: UsageField) -> bytes:
        """A choice's first chunk carries its role; a call's first one also the prompt."""
        ids = UNSET if prompt_ids is None or self._begun else prompt_ids
        self._begun = True
        return self._chunk([ChatDelta(index, Delta(role="assistant", content=""))], usage, ids)

    def _frame(self, index: int) -> Frame:
        found = self._frames.get(index)
        if found is None:
            whole = self._chunk([ChatDelta(index, _NO_TEXT)], chunk_usage(None, self._options))
            found = self._frames[index] = frame(whole, _encode(_NO_TEXT))
        return found

    def _logprobs(self, marks: Sequence[Mark]) -> ChatLogprobs | None:
        return chat_logprobs(self._text, marks) if marks else None

    def _chunk(
        self, choices: Sequence[ChatDelta], usage: UsageField, prompt_ids: list[int] | UnsetType = UNSET
    ) -> bytes:
        return event(self._response("chat.completion.chunk", choices, usage, prompt_ids))

    def _response(
        self, kind: ChatObject, choices: Sequence[msgspec.Struct], usage: UsageField, prompt_ids: list[int] | UnsetType
    ) -> Response[msgspec.Struct]:
        head, told = self._head, self._head.told
        tier = None if told.service_tier is UNSET and kind == "chat.completion" else told.service_tier
        return Response(
            head.id,
            kind,
            head.created,
            head.model,
            head.fingerprint,
            choices,
            usage,
            prompt_token_ids=prompt_ids,
            service_tier=tier,
            store=self.store,
            reasoning_effort=told.reasoning_effort,
            priority=told.priority,
        )

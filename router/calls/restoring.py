"""From answers that were kept to the texts of a trace that is not remembered any more.

Each answer is put where it was: its prompt is made as it was made then, by the same functions, of the messages that
this call brings. Where its tokens are those that were answered, the text is the one that was run.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from router.calls.call import Conversation
from router.calls.errors import CallFailed
from router.calls.rendering import Rendering
from router.calls.story import story
from router.calls.text import Text
from router.traces.kept import Kept, digest
from router.traces.texts import CutTokens, Said, extend, find, remember
from router.traces.texts import Text as Remembered
from router.traces.turns import Story, Turn, unpacked_turns, with_turn
from tracehaul.wire.errors import InvalidRequest

STRANGE_MAX = 8
"""Answers in a row that were given to other prompts: what came after them was, too."""


class Restoring:
    """Puts the answers of one conversation in place again. Iterates over turns of a few milliseconds at most, away from
    the event loop: one answer each.

    Args:
        text: the model's.
        cut_tokens: likewise.
        rendering: likewise.
        asked: the conversation as it is now.
        tools: what it is told of tools.
        answers: those that were kept, in the order in which they were given.
        texts: what is remembered, the newest first.
    """

    def __init__(
        self,
        text: Text,
        cut_tokens: CutTokens,
        rendering: Rendering,
        asked: Conversation,
        tools: list[dict[str, Any]] | None,
        answers: Sequence[Kept],
        texts: Sequence[Remembered],
    ) -> None:
        self._text = text
        self._cut_tokens = cut_tokens
        self._rendering = rendering
        self._asked = asked
        self._tools = tools
        told = {place for known in texts for place in _places(known)}
        own = [answer for answer in answers if answer.model == cut_tokens.model]
        self._answers = [answer for answer in own if (answer.context, answer.number, answer.sent) not in told]
        self._texts = texts
        self._restored: tuple[Remembered, ...] = ()
        self.all_told = not self._answers
        """The texts tell all of the answers already."""

    @property
    def texts(self) -> list[Remembered]:
        """What is remembered, with the answers that are in place by now, the newest first."""
        return [*reversed(self._restored), *self._texts]

    @property
    def dated_s(self) -> float:
        """The time that the trace's prompts tell; 0: none is known."""
        return self._answers[0].dated_s if self._answers else 0.0

    def __iter__(self) -> Iterator[None]:
        asked = self._asked
        strange = 0
        told = story(asked.messages, self._tools, asked.variables) if self._answers else None
        for answer in self._answers:
            if told is None or strange == STRANGE_MAX or not _is_in(told, answer):
                continue
            try:
                restored = self._said(answer)
            except (CallFailed, InvalidRequest, RecursionError):
                return  # what the template says of the whole conversation is told to the client
            strange = strange + 1 if restored is None else 0
            if restored is not None:
                self._restored = remember(self._restored, restored)
            yield

    def _said(self, answer: Kept) -> Said | None:
        """An answer with its prompt; None: that was another one."""
        before = msgspec.structs.replace(
            self._asked,
            messages=self._asked.messages[: answer.number],
            add_generation_prompt=True,
            continue_final_message=False,
        )
        texts = self.texts
        rendered = self._rendering.of(before, self._tools, texts, answer.dated_s)
        known = find(texts, rendered.text, self._cut_tokens)
        rest = rendered.text[len(known.text) :]
        prompt = extend(known, rendered.text, self._text.encode(rest) if rest else [], self._cut_tokens)
        if digest(prompt.packed) != answer.prompt or not self._are_tokens(answer.generated):
            return None
        prompt = msgspec.structs.replace(prompt, turns=rendered.turns, dated_s=rendered.dated_s)
        end = len(prompt.text) + len(answer.answer)
        turns = with_turn(rendered.turns, Turn(answer.sent, answer.says, end))
        return Said(prompt, answer.answer, answer.generated, turns, answer.model)

    def _are_tokens(self, packed: bytes) -> bool:
        return not packed or int(np.frombuffer(packed, "<u4").max()) < self._text.vocab_size


def _is_in(told: Story, answer: Kept) -> bool:
    """The conversation has it, where it was given."""
    if answer.context != told.context or answer.number >= len(told.sent):
        return False
    return answer.sent == told.sent[answer.number] or answer.says == told.says(answer.number)


def _places(text: Remembered) -> Iterator[tuple[bytes, int, bytes]]:
    """Context, number and key of each answer that a text tells as it was given."""
    context, turns = unpacked_turns(text.turns)
    return ((context, number, turn.sent) for number, turn in enumerate(turns) if turn.end)

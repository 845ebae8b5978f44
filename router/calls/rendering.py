"""From a conversation to its prompt's text.

A trace only grows: what was run of it stays as it was run, and the chat template tells no more than what follows. So
answers keep the tokens that they came in, however their client spells them; a date is that of the trace's first step;
and what a template rewrites of earlier turns (thoughts that it drops, tools that it moves along) stays.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from router.calls.call import Conversation, Message
from router.calls.errors import invalid
from router.calls.messages import template_messages
from router.calls.story import HERE, same_tools, story, untold
from router.calls.text import Text
from router.traces.hits import Changed
from router.traces.texts import CutTokens, common_prefix
from router.traces.texts import Text as Remembered
from router.traces.turns import Difference, Turn, compared, packed_turns
from tracehaul.runtime.clock import wall_s
from tracehaul.wire.errors import InvalidRequest


class Rendered(msgspec.Struct, frozen=True):
    """A conversation as text."""

    text: str
    turns: bytes
    """As in :class:`router.traces.texts.Encoded`; and so is what follows."""
    dated_s: float
    changed: Changed | None = None
    """Where it parts from what its trace has run."""


class Rendering:
    """Renders for one model. Safe to call from another thread."""

    def __init__(self, text: Text, cut_tokens: CutTokens) -> None:
        self._text = text
        self._cut_tokens = cut_tokens

    def of(
        self,
        asked: Conversation,
        tools: list[dict[str, Any]] | None,
        texts: Sequence[Remembered],
        dated_s: float = 0.0,
    ) -> Rendered:
        """The prompt's text. ``texts``: what was said in its trace, the newest first. ``dated_s``: the time to tell
        where no text knows one; 0: now.

        Raises:
            CallFailed, InvalidRequest: the template does not take the messages, or does not show the one that is to go
                on.
        """
        told = story(asked.messages, tools, asked.variables)
        dated_s = next((text.dated_s for text in texts if text.dated_s), dated_s) or wall_s()
        messages = template_messages(asked.messages)
        before, difference = compared(texts, self._cut_tokens.model, told)
        if asked.continue_final_message and before is not None and len(before.turns) == len(asked.messages):
            before = None  # the answer itself is to go on
        rest = None if before is None else self._rest(asked, messages, tools, len(before.turns), dated_s)
        if before is not None and rest is not None:
            turns = [*before.turns, *map(Turn, told.sent[len(before.turns) :])]
            text = before.text.text[: before.end] + rest
        else:
            turns = [*map(Turn, told.sent)]
            text = self._whole(asked, messages, tools, dated_s)
        changed = _changed(difference, told.context, asked.messages, text)
        return Rendered(text, packed_turns(told.context, turns), dated_s, changed)

    def _whole(
        self,
        asked: Conversation,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        dated_s: float,
    ) -> str:
        """All that the template tells."""
        if not asked.continue_final_message:
            return self._text.render(messages, tools, asked.add_generation_prompt, asked.variables, dated_s)
        *before, last = messages
        # What the template writes behind it is left out.
        goes_on = [*before, last | {"content": last["content"] + HERE}]
        shown, found, _ = self._text.render(goes_on, tools, False, asked.variables, dated_s).rpartition(HERE)
        if not found:
            raise invalid("the chat template does not show the message that is to go on", "continue_final_message")
        return shown

    def _rest(
        self,
        asked: Conversation,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        count: int,
        dated_s: float,
    ) -> str | None:
        """What the template tells after the first ``count`` messages, the last of which is an answer; None where that
        cannot be seen."""
        marked = [*messages[: count - 1], untold(messages[count - 1]), *messages[count:]]
        try:
            text = self._whole(asked, marked, tools, dated_s)
        except InvalidRequest:
            return None
        at = text.rfind(HERE)
        end = self._cut_tokens.after(text, at) if at >= 0 else None
        return None if end is None else text[end:]


def _changed(found: Difference | None, context: bytes, messages: Sequence[Message], text: str) -> Changed | None:
    """What a client changed, by where the prompt's text parts from the one that was run."""
    if found is None:
        return None
    offset = common_prefix(text, found.text.text)
    lost = len(found.text.text) - offset
    if found.message < 0:
        return Changed("variables" if same_tools(context, found.text.turns) else "tools", None, offset, lost)
    system = messages[found.message].role == "system"
    return Changed("system" if system else "messages", found.message, offset, lost)

"""From what a client asked to token ids, off the event loop where that takes long."""

from collections.abc import Sequence

import msgspec

from router.calls.call import Asked, Call, Conversation, Ids, Plain
from router.calls.errors import invalid
from router.calls.memory import Memory, TraceKey
from router.calls.messages import template_messages
from router.calls.text import Text
from router.dispatch.steps import ModelCard
from router.traces.texts import Encoded
from tracehaul.runtime.offload import Offload

OFFLOAD_CHARACTERS = 16384
"""Text from which on rendering and tokenizing (about a millisecond) leave the event loop."""


class Prompt(msgspec.Struct, frozen=True):
    """One prompt in tokens."""

    ids: list[int]
    encoded: Encoded | None
    """Its text; None if the client sent ids."""
    conversation: bool = False
    """The chat template made it, so that its answer is a message."""

    @property
    def rendered(self) -> str | None:
        """The text of a conversation; None where it is none."""
        return self.encoded.text if self.conversation and self.encoded is not None else None


class Prompts:
    """Makes prompts; what a trace has seen keeps the ids it had."""

    def __init__(self, text: Text, offload: Offload, memory: Memory) -> None:
        self._text = text
        self._offload = offload
        self._memory = memory

    async def of(self, call: Call, traces: Sequence[TraceKey]) -> list[Prompt]:
        """A call's prompts, in order. ``traces``: where their text may be known from.

        Raises:
            CallFailed, InvalidRequest: one cannot be rendered, is empty, or has ids that the model does not know.
        """
        return [await self._prompt(asked, call, traces) for asked in call.prompts]

    async def _prompt(self, asked: Asked, call: Call, traces: Sequence[TraceKey]) -> Prompt:
        match asked:
            case Ids(ids):
                check_ids(ids, self._text.vocab_size, call.where)
                return Prompt(ids, None)
            case Plain(text):
                encoded = await self._encode(text, traces, plain=True, where=call.where)
                return Prompt(encoded.ids, encoded)
            case Conversation():
                text = await self._render(asked, call)
                encoded = await self._encode(text, traces, plain=False, where=call.where)
                return Prompt(encoded.ids, encoded, conversation=True)

    async def _render(self, asked: Conversation, call: Call) -> str:
        messages = template_messages(asked.messages)
        tools = None if call.tools is None else call.tools.told

        def render() -> str:
            try:
                return self._text.render(messages, tools)
            except RecursionError:
                raise invalid(f"the {call.where} are nested too deeply", call.where) from None

        return render() if call.nbytes < OFFLOAD_CHARACTERS else await self._offload.run(render)

    async def _encode(self, text: str, traces: Sequence[TraceKey], *, plain: bool, where: str) -> Encoded:
        known = self._memory.known(traces, text)
        rest = text[len(known.text) :]

        def encode() -> Encoded:
            # What a plain prompt wants around it belongs to its beginning.
            ids = self._text.encode(rest, special=plain and not known.text) if rest else []
            return self._memory.extended(known, text, ids)

        encoded = encode() if len(rest) < OFFLOAD_CHARACTERS else await self._offload.run(encode)
        if not encoded.packed:
            raise invalid("the prompt is empty", where)
        return encoded


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises CallFailed if one is not the model's: an engine would read outside its tables."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise invalid(f"token ids must be from 0 to {vocab_size - 1}", param, "invalid_value")


def output_budget(prompt_tokens: int, max_tokens: int | None, card: ModelCard, param: str) -> int:
    """Output tokens that a step may have: what was asked for, or the rest of the window.

    Raises:
        CallFailed: it does not fit the window.
    """
    left = card.context_max - prompt_tokens
    if left < (max_tokens or 1):
        wanted = f" and asks for {max_tokens} more" if max_tokens else ", which leaves no room for output"
        raise invalid(
            f"this model's context is {card.context_max} tokens; the prompt has {prompt_tokens}{wanted}",
            param,
            "context_length_exceeded",
        )
    return max_tokens or left

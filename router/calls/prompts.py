"""From what a client asked to token ids, off the event loop where that takes long."""

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np

from router.calls.call import Asked, Call, Conversation, Ids, Plain
from router.calls.errors import CallFailed, invalid
from router.calls.memory import Memory
from router.calls.rendering import Rendered, Rendering
from router.calls.restoring import Restoring
from router.calls.text import Text
from router.dispatch.steps import ModelCard
from router.traces.hits import Changed
from router.traces.texts import CutTokens, Encoded, extend, find
from router.traces.texts import Text as Remembered
from router.traces.trace import TraceKey
from tracehaul.runtime.offload import Offload
from tracehaul.wire.hashing import token_count, unpack_tokens
from tracehaul.wire.ids import TraceId

OFFLOAD_CHARACTERS = 16384
"""Text from which on rendering and tokenizing (about a millisecond) leave the event loop."""
HOPELESS_CHARACTERS = 6
"""For each token that the window has left: text of more will hardly fit, which is looked at first."""


class Prompt(msgspec.Struct, frozen=True):
    """One prompt in tokens."""

    packed: bytes
    """Its tokens, in wire form."""
    encoded: Encoded | None
    """Its text; None if the client sent ids."""
    conversation: bool = False
    """The chat template made it, so that its answer is a message."""
    changed: Changed | None = None
    """Where it parts from what its trace has run."""

    @property
    def tokens(self) -> int:
        """Its length."""
        return token_count(self.packed)

    @property
    def ids(self) -> list[int]:
        """Its tokens, unpacked."""
        return unpack_tokens(self.packed)

    @property
    def rendered(self) -> str | None:
        """The text of a conversation; None where it is none."""
        return self.encoded.text if self.conversation and self.encoded is not None else None


class Prompts:
    """Makes prompts; what a trace has seen keeps the ids it had."""

    def __init__(self, text: Text, offload: Offload, memory: Memory, model: str) -> None:
        self._text = text
        self._cut_tokens = CutTokens({text.token_text(token): token for token in text.eos_tokens}, model)
        self._rendering = Rendering(text, self._cut_tokens)
        self._offload = offload
        self._memory = memory

    async def of(self, call: Call, trace: TraceId, parent: TraceId | None, card: ModelCard) -> list[Prompt]:
        """A call's prompts, in order. ``trace``, ``parent``: where their text may be known from.

        Raises:
            CallFailed, InvalidRequest: one cannot be rendered, is empty, cannot fit the window, or has ids that the
                model does not know.
        """
        prompts: list[Prompt] = []
        for at, asked in enumerate(call.prompts):
            own = dict.fromkeys((numbered(trace, at), trace))
            known = [(call.tenant, name) for name in (*own, parent) if name is not None]
            prompts.append(await self._prompt(asked, call, known, card))
        return prompts

    def check_length(self, call: Call, card: ModelCard) -> None:
        """Before anything is done with a call that is far too long.

        Raises:
            CallFailed: a conversation cannot fit the window, whatever its chat template leaves out.
        """
        if call.nbytes <= card.context_max:
            return
        for asked in call.prompts:
            least = self._text.tokens_min(_shown(asked)) if isinstance(asked, Conversation) else 0
            if least >= card.context_max:
                raise _too_long(least, 1, card, call.where, "at least ")

    async def _prompt(self, asked: Asked, call: Call, traces: Sequence[TraceKey], card: ModelCard) -> Prompt:
        match asked:
            case Ids(ids):
                return Prompt(check_ids(ids, self._text.vocab_size, call.where), None)
            case Plain(text):
                texts = self._memory.texts(traces)
                encoded = await self._encode(text, texts, card, plain=True, where=call.where)
                return Prompt(encoded.packed, encoded)
            case Conversation():
                texts, dated_s = await self._texts(asked, call, traces)
                rendered = await self._render(asked, call, texts, dated_s)
                encoded = await self._encode(rendered.text, texts, card, plain=False, where=call.where)
                encoded = msgspec.structs.replace(encoded, turns=rendered.turns, dated_s=rendered.dated_s)
                return Prompt(encoded.packed, encoded, conversation=True, changed=rendered.changed)

    async def _texts(
        self, asked: Conversation, call: Call, traces: Sequence[TraceKey]
    ) -> tuple[Sequence[Remembered], float]:
        """What was said in ``traces``, the newest first, and the time that it tells, where no text does."""
        texts = self._memory.texts(traces)
        if not self._memory.keeps(traces, former=bool(texts)):
            return texts, 0.0
        tools = None if call.tools is None else call.tools.told
        dated_s = 0.0
        # The parent's first: they were given first.
        for trace in reversed(traces):
            answers = await self._memory.kept(trace)
            restoring = Restoring(self._text, self._cut_tokens, self._rendering, asked, tools, answers, texts)
            await self._offload.turns(iter(restoring))
            self._memory.placed_again(trace, all_of_them=restoring.all_told)
            texts, dated_s = restoring.texts, restoring.dated_s or dated_s
        return texts, dated_s

    async def _render(self, asked: Conversation, call: Call, texts: Sequence[Remembered], dated_s: float) -> Rendered:
        tools = None if call.tools is None else call.tools.told

        def render() -> Rendered:
            try:
                return self._rendering.of(asked, tools, texts, dated_s)
            except RecursionError:
                raise invalid(f"the {call.where} are nested too deeply", call.where) from None

        return render() if call.nbytes < OFFLOAD_CHARACTERS else await self._offload.run(render)

    async def _encode(
        self, text: str, texts: Sequence[Remembered], card: ModelCard, *, plain: bool, where: str
    ) -> Encoded:
        known = find(texts, text, self._cut_tokens)
        rest = text[len(known.text) :]
        left = max(0, card.context_max - token_count(known.packed))

        def encode() -> Encoded | int:
            """In tokens; of what cannot fit the window only how many it has at least."""
            least = self._text.tokens_at_least(rest, left) if len(rest) > HOPELESS_CHARACTERS * left else 0
            if least >= left:
                return least
            # What a plain prompt wants around it belongs to its beginning.
            ids = self._text.encode(rest, special=plain and not known.text) if rest else []
            return extend(known, text, ids, self._cut_tokens)

        encoded = self._text.tokens_min(len(rest))
        if encoded < left:
            encoded = encode() if len(rest) < OFFLOAD_CHARACTERS else await self._offload.run(encode)
        if isinstance(encoded, int):
            # To learn by how much would take longer than all else that is done for a call.
            raise _too_long(card.context_max - left + encoded, 1, card, where, "at least ")
        if not encoded.packed:
            raise invalid("the prompt is empty", where)
        return encoded


def _shown(asked: Conversation) -> int:
    """So many characters of a conversation are in its prompt at least."""
    return sum(len(said.content.strip()) for said in asked.messages if said.role in ("user", "tool"))


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> bytes:
    """The ids, packed. Raises CallFailed if one is not the model's: an engine would read outside its tables."""
    wrong = invalid(f"token ids must be from 0 to {vocab_size - 1}", param, "invalid_value")
    try:
        packed = array("I", ids)
    except OverflowError:
        raise wrong from None
    if packed and int(np.asarray(packed).max()) >= vocab_size:
        raise wrong
    return packed.tobytes()


def output_budget(prompt_tokens: int, max_tokens: int | None, card: ModelCard, param: str) -> int:
    """Output tokens that a step may have: what was asked for, as far as the rest of the window has room for it.

    Raises:
        CallFailed: the window has no room for output at all.
    """
    left = card.context_max - prompt_tokens
    if left < 1:
        raise _too_long(prompt_tokens, max_tokens or 1, card, param)
    return min(max_tokens or left, left)


def numbered(trace: TraceId, prompt: int) -> TraceId:
    """The trace of a call's prompt: prompts that share nothing but a call are traces of their own."""
    return trace if prompt == 0 else TraceId(f"{trace}.{prompt}")


def _too_long(tokens: int, output_tokens: int, card: ModelCard, param: str, least: str = "") -> CallFailed:
    # Clients look for these words, to shorten the conversation and to ask again.
    message = (
        f"This model's maximum context length is {card.context_max} tokens. However, you requested "
        f"{least}{tokens + output_tokens} tokens ({least}{tokens} in the {param}, {output_tokens} in the completion). "
        f"Please reduce the length of the {param} or completion."
    )
    return invalid(message, param, "context_length_exceeded")

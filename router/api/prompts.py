"""From a request's text to token ids, off the event loop where that takes long."""

from collections.abc import Sequence

import msgspec

from router.api.answers import Answer
from router.api.errors import bad_request
from router.api.messages import template_messages, template_tools
from router.api.requests import ChatRequest, CompletionRequest
from router.api.text import Text
from router.dispatch.steps import ModelCard
from router.traces.book import Book
from router.traces.texts import CutTokens, Encoded, Said, extend
from router.traces.trace import TraceKey
from tracehaul.runtime.offload import Offload
from tracehaul.wire.hashing import pack_tokens, token_count, unpack_tokens
from tracehaul.wire.ids import TraceId

OFFLOAD_CHARACTERS = 16384
"""Text from which on rendering and tokenizing (about a millisecond) leave the event loop."""


class Prompt(msgspec.Struct, frozen=True):
    """One prompt in tokens."""

    packed: bytes
    encoded: Encoded | None
    """Its text; None if the client sent ids."""

    @property
    def tokens(self) -> int:
        """Its length."""
        return token_count(self.packed)

    @property
    def ids(self) -> list[int]:
        """Its tokens, unpacked: for who shows them."""
        return unpack_tokens(self.packed)


class Prompts:
    """Makes prompts, of what the traces know already."""

    def __init__(self, text: Text, offload: Offload, book: Book) -> None:
        self._text = text
        self._offload = offload
        self._cut_tokens = CutTokens({text.token_text(token): token for token in text.eos_tokens})
        self._book = book

    async def chat(self, request: ChatRequest, traces: Sequence[TraceKey], *, body_bytes: int) -> list[Prompt]:
        """The one prompt of a conversation.

        Raises:
            ApiError, InvalidRequest: the messages cannot be rendered.
        """
        messages, tools = template_messages(request.messages), template_tools(request)

        def render() -> str:
            try:
                return self._text.render(messages, tools)
            except RecursionError:
                raise bad_request("the messages are nested too deeply", "messages") from None

        text = render() if body_bytes < OFFLOAD_CHARACTERS else await self._offload.run(render)
        return [await self._encode(text, traces, plain=False, param="messages")]

    async def completion(self, request: CompletionRequest, traces: Sequence[TraceKey]) -> list[Prompt]:
        """The prompts of a completion, in order; ``traces``: the call's own first.

        Raises:
            ApiError: one is empty, or mixes kinds, or has ids that the model does not know.
        """
        prompts: list[Prompt] = []
        salt, trace = traces[0]
        for at, prompt in enumerate(split(request.prompt)):
            if isinstance(prompt, str):
                own = (salt, numbered(trace, at))
                prompts.append(await self._encode(prompt, (own, *traces), plain=True, param="prompt"))
            else:
                check_ids(prompt, self._text.vocab_size, "prompt")
                prompts.append(Prompt(pack_tokens(prompt), None))
        return prompts

    async def _encode(self, text: str, traces: Sequence[TraceKey], *, plain: bool, param: str) -> Prompt:
        known = self._book.known(traces, text, self._cut_tokens)
        rest = text[len(known.text) :]

        def encode() -> Encoded:
            # What a plain prompt wants around it belongs to its beginning.
            ids = self._text.encode(rest, special=plain and not known.text) if rest else []
            return extend(known, text, ids, self._cut_tokens)

        encoded = encode() if len(rest) < OFFLOAD_CHARACTERS else await self._offload.run(encode)
        if not encoded.packed:
            raise bad_request("the prompt is empty", param)
        return Prompt(encoded.packed, encoded)


def numbered(trace: TraceId, prompt: int) -> TraceId:
    """The trace of a call's prompt: prompts that share nothing but a call are traces of their own."""
    return trace if prompt == 0 else TraceId(f"{trace}.{prompt}")


def said(prompt: Prompt, answer: Answer) -> Said | None:
    """What a step that ended is remembered by; None where the client sent tokens."""
    if prompt.encoded is None:
        return None
    if answer.matched:
        # The client has the text up to the stop string, which may end inside a token.
        return Said(prompt.encoded)
    return Said(prompt.encoded, answer.text, pack_tokens(answer.generated))


def split(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts in ``prompt``'s four forms: a string, strings, ids, lists of ids.

    Raises:
        ApiError: it mixes them, or is or holds an empty list.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or any(item == [] for item in prompt):
        raise bad_request("the prompt is empty", "prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    several = [item for item in prompt if not isinstance(item, int)]
    if len({type(item) for item in prompt}) > 1:
        raise bad_request("prompt must be all strings, all token ids, or all lists of token ids", "prompt")
    return several


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError if one is not the model's: an engine would read outside its tables."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise bad_request(f"token ids must be from 0 to {vocab_size - 1}", param, "invalid_value")


def output_budget(prompt_tokens: int, max_tokens: int | None, card: ModelCard, param: str) -> int:
    """Output tokens that a step may have: what was asked for, or the rest of the window.

    Raises:
        ApiError: it does not fit the window.
    """
    left = card.context_max - prompt_tokens
    if left < (max_tokens or 1):
        wanted = f" and asks for {max_tokens} more" if max_tokens else ", which leaves no room for output"
        raise bad_request(
            f"this model's context is {card.context_max} tokens; the prompt has {prompt_tokens}{wanted}",
            param,
            "context_length_exceeded",
        )
    return max_tokens or left

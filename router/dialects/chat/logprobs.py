"""Logprobs as clients read them: chat completions and completions each have a shape. Pure."""

from collections.abc import Sequence

import msgspec

from router.api.responses import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob
from router.api.text import Text
from tracehaul.wire.steps import TokenLogprobs

LOGPROB_MIN = -9999.0
"""What OpenAI's API says of what is all but impossible; JSON has no infinity."""


class Mark(msgspec.Struct, frozen=True):
    """One token, where its text starts in the choice, and how likely it was; None where nothing precedes it."""

    token: int
    offset: int
    logprobs: TokenLogprobs | None


def chat_logprobs(text: Text, marks: Sequence[Mark]) -> ChatLogprobs:
    """For a chat completion, or a chunk of one."""
    content: list[TokenLogprob] = []
    for mark in marks:
        assert mark.logprobs is not None
        data = text.token_bytes(mark.token)
        top = [
            TopLogprob(_shown(piece), max(logprob, LOGPROB_MIN), list(piece))
            for piece, logprob in ((text.token_bytes(token), logprob) for token, logprob in mark.logprobs.top)
        ]
        content.append(TokenLogprob(_shown(data), max(mark.logprobs.logprob, LOGPROB_MIN), list(data), top))
    return ChatLogprobs(content)


def text_logprobs(text: Text, marks: Sequence[Mark]) -> TextLogprobs:
    """For a completion, or a chunk of one. The token itself is among its likeliest even where it is less likely."""
    tops: list[dict[str, float] | None] = []
    logprobs: list[float | None] = []
    for mark in marks:
        if mark.logprobs is None:
            logprobs.append(None)
            tops.append(None)
            continue
        own = max(mark.logprobs.logprob, LOGPROB_MIN)
        logprobs.append(own)
        top = {_named(text.token_bytes(token)): max(logprob, LOGPROB_MIN) for token, logprob in mark.logprobs.top}
        tops.append(top | {_named(text.token_bytes(mark.token)): own})
    tokens = [_named(text.token_bytes(mark.token)) for mark in marks]
    return TextLogprobs(tokens, logprobs, tops, [mark.offset for mark in marks])


def _shown(data: bytes) -> str:
    return data.decode(errors="replace")


def _named(data: bytes) -> str:
    """A name that no other token has: OpenAI's, for a token that is no whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

"""Logprobs as completions tell them. Pure."""

from collections.abc import Sequence

from router.calls.events import Mark
from router.calls.text import Text
from router.dialects.completions.responses import TextLogprobs
from router.dialects.openai.logprobs import told


def text_logprobs(text: Text, marks: Sequence[Mark]) -> TextLogprobs:
    """For a completion, or a chunk of one. The token itself is among its likeliest even where it is less likely."""
    tops: list[dict[str, float] | None] = []
    logprobs: list[float | None] = []
    for mark in marks:
        if mark.logprobs is None:
            logprobs.append(None)
            tops.append(None)
            continue
        own = told(mark.logprobs.logprob)
        logprobs.append(own)
        top = {_named(text.token_bytes(token)): told(logprob) for token, logprob in mark.logprobs.top}
        tops.append(top | {_named(text.token_bytes(mark.token)): own})
    tokens = [_named(text.token_bytes(mark.token)) for mark in marks]
    return TextLogprobs(tokens, logprobs, tops, [mark.offset for mark in marks])


def _named(data: bytes) -> str:
    """A name that no other token has: OpenAI's, for a token that is no whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

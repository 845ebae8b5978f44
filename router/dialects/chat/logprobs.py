"""Logprobs as chat completions tell them. Pure."""

from collections.abc import Sequence

from router.calls.events import Mark
from router.calls.text import Text
from router.dialects.chat.responses import ChatLogprobs, TokenLogprob, TopLogprob
from router.dialects.openai.logprobs import told


def chat_logprobs(text: Text, marks: Sequence[Mark]) -> ChatLogprobs:
    """For a chat completion, or a chunk of one."""
    content: list[TokenLogprob] = []
    for mark in marks:
        assert mark.logprobs is not None
        data = text.token_bytes(mark.token)
        top = [
            TopLogprob(_shown(piece), told(logprob), list(piece))
            for piece, logprob in ((text.token_bytes(token), logprob) for token, logprob in mark.logprobs.top)
        ]
        content.append(TokenLogprob(_shown(data), told(mark.logprobs.logprob), list(data), top))
    return ChatLogprobs(content)


def _shown(data: bytes) -> str:
    return data.decode(errors="replace")

"""A tokenizer and chat template of a simulated model: every text has one spelling in tokens, and a model many.

Two tokens have the same text, so what a model says is mostly not what its text is tokenized to: a router that loses
track of what was generated asks for other tokens, and its prompt is told from the right one. Implements the HTTP
surface's ``Text``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

VOCAB = 256
END = 0
"""Ends a turn, and a text."""
SYSTEM, USER, ASSISTANT = 253, 254, 255
"""Begin a message."""
_SPECIAL = {END: "\u2400", SYSTEM: "\u2401", USER: "\u2402", ASSISTANT: "\u2403"}
_SPELLED = 126
"""Tokens 1 to 126 are what a text is tokenized to; 127 to 252 have the same texts."""
_LETTERS = [chr(0x100 + at) for at in range(_SPELLED)]
_TEXTS = [_SPECIAL.get(token) or _LETTERS[(token - 1) % _SPELLED] for token in range(VOCAB)]
_IDS = {text: token for token, text in reversed(list(enumerate(_TEXTS)))}
_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


def shown(tokens: Sequence[int]) -> str:
    """Their text as a client sees it."""
    return "".join(_TEXTS[token] for token in tokens if token not in _SPECIAL)


def spelled(text: str) -> list[int]:
    """The tokens of a text."""
    return [_IDS[character] for character in text]


def render(messages: Sequence[tuple[str, str]]) -> str:
    """The prompt of a conversation, roles and contents."""
    turns = [_TEXTS[_ROLES[role]] + content + _TEXTS[END] for role, content in messages]
    return "".join([*turns, _TEXTS[ASSISTANT]])


class SimTextStream:
    """Reads one step's output."""

    def push(self, tokens: Sequence[int]) -> str:
        return shown(tokens)

    def finish(self) -> str:
        return ""


class SimText:
    """The served model's."""

    vocab_size = VOCAB
    eos_tokens: tuple[int, ...] = (END,)
    revision = "sim"
    chat_template: str | None = None

    def token_text(self, token: int) -> str:
        return _TEXTS[token]

    def token_bytes(self, token: int) -> bytes:
        return _TEXTS[token].encode()

    def encode(self, text: str, special: bool = False) -> list[int]:
        return spelled(text)

    def tokens_min(self, characters: int) -> int:
        return characters

    def tokens_at_least(self, text: str, enough: int) -> int:
        return len(text)

    def special_token(self, text: str) -> int | None:
        token = _IDS.get(text)
        return token if token in _SPECIAL else None

    def stream(self, shown: Sequence[str] | None = ()) -> SimTextStream:
        return SimTextStream()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        now_s: float | None = None,
    ) -> str:
        return render([(message["role"], message["content"]) for message in messages])

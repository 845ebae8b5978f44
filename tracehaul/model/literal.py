"""Text of strangers that spells a special token stays text. Pure.

Only what a chat template writes itself makes control tokens. So before it is rendered, each special token spelled out
in a message, a tool's result or a tool's description is marked: a character that no text holds follows its first one,
and neither a tokenizer nor a search for the end of a turn takes it for the token.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MARK = "\ufdd0"
"""One of Unicode's noncharacters, which are for use inside a program."""


class Literals:
    """Knows the special tokens of a tokenizer, by their texts."""

    def __init__(self, specials: Iterable[str]) -> None:
        texts = sorted({text for text in specials if len(text) > 1}, key=lambda text: (-len(text), text))
        self._spelled = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._marked = re.compile("|".join(re.escape(_marked(text)) for text in texts)) if texts else None

    def mark(self, value: Any) -> Any:
        """``value``, of JSON's types, with the special tokens in its strings marked; itself where there are none."""
        match value:
            case str():
                if self._spelled is None or self._spelled.search(value) is None:
                    return value
                return self._spelled.sub(lambda found: _marked(found.group()), value)
            case dict():
                return {self.mark(key): self.mark(item) for key, item in value.items()}
            case list() | tuple():
                return [self.mark(item) for item in value]
            case _:
                return value

    def encode(
        self, text: str, plain: Callable[[str], Sequence[int]], special: Callable[[str], int | None]
    ) -> list[int]:
        """Tokens of a marked text: ``plain`` encodes what lies between special tokens without looking for any,
        ``special`` tells the id of one."""
        if self._spelled is None or self._marked is None:
            return list(plain(text))
        ids: list[int] = []
        at = 0
        for found in self._spelled.finditer(text):
            token = special(found.group())
            if token is not None:
                ids += self._plain(text[at : found.start()], plain)
                ids.append(token)
                at = found.end()
        return ids + self._plain(text[at:], plain)

    def _plain(self, text: str, plain: Callable[[str], Sequence[int]]) -> list[int]:
        assert self._marked is not None
        text = self._marked.sub(lambda found: _unmarked(found.group()), text)
        return list(plain(text)) if text else []


def _marked(text: str) -> str:
    return text[0] + MARK + text[1:]


def _unmarked(text: str) -> str:
    return text[0] + text[1 + len(MARK) :]

"""What calls ask of a model's tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class TextStream(Protocol):
    """Turns one step's output ids into text as they come."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` complete, special ones left out; never a part of a character."""
        ...

    def finish(self) -> str:
        """What is left: an unfinished character as U+FFFD."""
        ...


class Text(Protocol):
    """A model's tokenizer and chat template. Safe to call from another thread."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        """Ids that end a turn or a text."""
        ...

    @property
    def revision(self) -> str:
        """Which edition of the model's files it is of; empty: not known."""
        ...

    def token_text(self, token: int) -> str:
        """Text of one token, special or not."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of one token, special or not; of part of a character its part. Empty for ids without text."""
        ...

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of ``text``; with ``special``, with what the model wants around a plain prompt."""
        ...

    def tokens_min(self, characters: int) -> int:
        """So many tokens a text of that length has at least; 0 where that cannot be told."""
        ...

    def tokens_at_least(self, text: str, enough: int) -> int:
        """So many tokens ``text`` has at least, counted from its beginning up to about ``enough``; takes about as long
        as tokenizing so many."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Its source; None if the model has none."""
        ...

    def special_token(self, text: str) -> int | None:
        """The special token of that text; None if there is none."""
        ...

    def stream(self, shown: Sequence[str] | None = ()) -> TextStream:
        """A new incremental reader of one step's output; of special tokens it shows those named in ``shown``, with None
        all."""
        ...

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        now_s: float | None = None,
    ) -> str:
        """The prompt that the chat template makes of a conversation. ``variables``: more that it may read.

        Raises:
            InvalidRequest: the model has no template, or the template does not take these messages.
        """
        ...

"""A prompt as its choices repeat it. Pure."""

from router.calls.events import Mark
from router.calls.prompts import Prompt
from router.calls.text import Text
from tracehaul.wire.steps import TokenLogprobs


class Echo:
    """One prompt, shared by its choices; :attr:`logprobs` grows while it is computed."""

    def __init__(self, text: Text, prompt: Prompt, *, scored: bool) -> None:
        self._scored = scored
        self._pieces = [text.token_bytes(token) for token in prompt.ids]
        self._ids = prompt.ids
        self._data = b"".join(self._pieces) if prompt.encoded is None else prompt.encoded.text.encode()
        self.text = self._data.decode(errors="replace")
        self.logprobs: list[TokenLogprobs] = []
        """Of every token but the first, which nothing precedes."""

    @property
    def marks(self) -> list[Mark]:
        """Of the whole prompt, once all its logprobs are known; none if they are not asked for."""
        if not self._scored:
            return []
        logprobs = [None, *self.logprobs]
        return [
            Mark(token, offset, told) for token, offset, told in zip(self._ids, self._offsets(), logprobs, strict=True)
        ]

    def _offsets(self) -> list[int]:
        """Characters before each token. A tokenizer may add tokens that are not in the text, or a leading space."""
        offsets: list[int] = []
        at, characters = 0, 0
        for piece in self._pieces:
            offsets.append(characters)
            found = piece if self._data.startswith(piece, at) else piece.removeprefix(b" ")
            if self._data.startswith(found, at):
                at += len(found)
                characters += sum(byte & 0xC0 != 0x80 for byte in found)
        return offsets

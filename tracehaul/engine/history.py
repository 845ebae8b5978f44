"""Which tokens a sequence holds, and how often: what penalties look at."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tracehaul.wire.steps import Sampling


class History:
    """Counts of a sequence's tokens. Grows by one output token at a time, at a cost that does not grow with it."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        ids = list(dict.fromkeys((*prompt, *output)))
        self._slots = {token: slot for slot, token in enumerate(ids)}
        self._ids: NDArray[np.intp] = np.array(ids, dtype=np.intp)
        self._counts: NDArray[np.float32] = np.zeros(len(ids), dtype=np.float32)
        for token in output:
            self._counts[self._slots[token]] += 1

    @classmethod
    def of(cls, sampling: Sampling, tokens: Sequence[int], emitted: int) -> Self | None:
        """Of a sequence whose last ``emitted`` tokens are output; None if no rule looks at it."""
        if not sampling.penalizes:
            return None
        prompt_tokens = len(tokens) - emitted
        # Only the repetition penalty asks what the prompt holds.
        prompt = tokens[:prompt_tokens] if sampling.repetition_penalty != 1.0 else ()
        return cls(prompt, tokens[prompt_tokens:])

    @property
    def ids(self) -> NDArray[np.intp]:
        """Every token seen, once."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of :attr:`ids` is in the output; 0 where it is in the prompt alone."""
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        """One more output token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            room = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        self._ids[slot] = token
        self._counts[slot] += 1

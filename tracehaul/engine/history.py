"""Which tokens a sequence holds, and how often: what penalties look at."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tracehaul.wire.steps import Sampling


class History:
    """Counts of a sequence's tokens. Grows by one output token at a time, at a cost that does not grow with it."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        parts = [np.asarray(part, dtype=np.intp) for part in (prompt, output)]
        size = 1 + max(int(part.max(initial=-1)) for part in parts)
        seen = np.zeros(size, dtype=np.bool_)
        for part in parts:
            seen[part] = True
        self._ids: NDArray[np.intp] = np.flatnonzero(seen)
        self._counts: NDArray[np.float32] = np.bincount(parts[1], minlength=size)[self._ids].astype(np.float32)
        self._sorted = len(self._ids)
        self._later: dict[int, int] = {}
        """Places of tokens that were not among those."""

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
        return self._ids[: self._sorted + len(self._later)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of :attr:`ids` is in the output; 0 where it is in the prompt alone."""
        return self._counts[: self._sorted + len(self._later)]

    def add(self, token: int) -> None:
        """One more output token."""
        place = int(np.searchsorted(self._ids[: self._sorted], token))
        if place == self._sorted or self._ids[place] != token:
            place = self._later.setdefault(token, self._sorted + len(self._later))
        if place == len(self._ids):
            room = max(64, place)
            self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

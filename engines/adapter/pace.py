"""What a server's figures say of its speed. Pure."""

from engines.adapter.dialect import Figures
from tracehaul.wire.cluster import ASSUMED

TOKENS_MIN = 64
"""Fewer tokens of prompts, or steps, since the last look say nothing."""
NEW_SHARE = 0.3
"""Of a new figure in the one that is told."""


class Pace:
    """Rates as of now, from sums over a server's life."""

    def __init__(self) -> None:
        self.rates = ASSUMED
        self._before: Figures | None = None
        self._measured = [False, False]

    def begin(self, before: Figures, after: Figures) -> None:
        """Between these two a prompt was computed; what was before them is not of how it is now."""
        self._before = before
        self.look(after)

    def look(self, now: Figures) -> None:
        """The next figures; sums that have shrunk are those of another life."""
        before, rates = self._before or Figures(), self.rates
        if now.prefill_tokens < before.prefill_tokens or now.decode_steps < before.decode_steps:
            before = Figures()
        seen = now
        tokens, steps = now.prefill_tokens - before.prefill_tokens, now.decode_steps - before.decode_steps
        if tokens >= TOKENS_MIN and now.prefill_s > before.prefill_s:
            token_s = (now.prefill_s - before.prefill_s) / tokens
            rates = rates._replace(token_s=self._smooth(0, rates.token_s, token_s), pair_s=0.0)
        else:
            seen = seen._replace(prefill_s=before.prefill_s, prefill_tokens=before.prefill_tokens)
        if steps >= TOKENS_MIN and now.decode_s > before.decode_s:
            decode_s = (now.decode_s - before.decode_s) / steps
            rates = rates._replace(decode_s=self._smooth(1, rates.decode_s, decode_s))
        else:
            seen = seen._replace(decode_s=before.decode_s, decode_steps=before.decode_steps)
        self.rates, self._before = rates, seen

    def _smooth(self, which: int, old: float, new: float) -> float:
        share = NEW_SHARE if self._measured[which] else 1.0
        self._measured[which] = True
        return old + share * (new - old)

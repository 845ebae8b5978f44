"""How fast this worker computes, decodes and pulls, learned from what it does. Pure.

Computing ``n`` prompt tokens with ``c`` before each takes ``n * token_s + n * c * pair_s``. Both are fitted to the
iterations of late, by least squares over relative errors, drawn gently towards what was assumed: a worker that only
sees short contexts says nothing about long ones, and must not pretend to.
"""

from collections.abc import Sequence

from tracehaul.wire.cluster import ASSUMED, Rates

TOKENS_MIN = 16
"""Smaller prompts take as long as an iteration takes anyhow."""
PULL_PRIOR_TOKENS = 1024
"""For so many what is assumed of pulls counts."""
PULL_HALF_LIFE_S = 20.0
"""What pulls took is worth half after so long. Nobody pulls where it is thought to be slow: without that, one slow pull
would be the last."""
KEEP = 0.9
"""Weight of what was known, at each observation."""
PRIOR = 0.03
"""Weight of what was assumed, in observations."""
STRETCH = 5.0
"""A prompt lets others go first until it has waited for so many times what it takes itself: a running trace's next few
tokens do not wait for a new trace's thousands, and those do not wait for ever."""
FACTOR_MIN = 1e-3
NOTHING = 1e-12


class RateMeter:
    """One worker's :class:`Rates`."""

    def __init__(self, assumed: Rates = ASSUMED) -> None:
        self._assumed = assumed
        # Normal equations in units of what is assumed: the sums over observations of x*x', and of x.
        self._aa = self._ab = self._bb = self._a = self._b = 0.0
        self._decode_s = assumed.decode_s
        self._decodes = 0
        self._pull_tokens = self._pull_s = 0.0
        self._pull_prior = 1.0
        self._pulls_as_of_s = 0.0
        self._has_pulled = False

    @property
    def rates(self) -> Rates:
        """As far as is known."""
        token, pair = self._factors()
        assumed = self._assumed
        prior = self._pull_prior * PULL_PRIOR_TOKENS
        pull_token_s = (prior * assumed.pull_token_s + self._pull_s) / (prior + self._pull_tokens)
        return Rates(assumed.token_s * token, assumed.pair_s * pair, self._decode_s, pull_token_s)

    def iterated(self, work: Sequence[tuple[int, int]], seconds: float) -> None:
        """An iteration took so long. ``work``: per sequence, the tokens that it had and those that were computed."""
        if seconds <= 0 or not work:
            return
        tokens = sum(count for _, count in work)
        if tokens == len(work):
            self._decode_s = _mean(self._decode_s, seconds, self._decodes)
            self._decodes += 1
        elif tokens >= TOKENS_MIN:
            pairs = sum(count * (length + count / 2) for length, count in work)
            a, b = tokens * self._assumed.token_s / seconds, pairs * self._assumed.pair_s / seconds
            self._aa = KEEP * self._aa + a * a
            self._ab = KEEP * self._ab + a * b
            self._bb = KEEP * self._bb + b * b
            self._a = KEEP * self._a + a
            self._b = KEEP * self._b + b

    def pulled(self, tokens: int, seconds: float, now_s: float) -> None:
        """A pull took so long. Long ones count for more: what a short one costs is hardly its tokens. The first counts
        for nothing: it maps the store's memory, too."""
        if tokens <= 0 or seconds <= 0:
            return
        if self._has_pulled:
            self.aged(now_s)
            self._pull_prior *= KEEP
            self._pull_tokens = KEEP * self._pull_tokens + tokens
            self._pull_s = KEEP * self._pull_s + seconds
        self._has_pulled = True

    def aged(self, now_s: float) -> None:
        """Time has passed; to be called now and then."""
        left = 0.5 ** ((now_s - self._pulls_as_of_s) / PULL_HALF_LIFE_S)
        self._pulls_as_of_s = now_s
        self._pull_prior = 1 - left * (1 - self._pull_prior)
        self._pull_tokens *= left
        self._pull_s *= left

    def _factors(self) -> tuple[float, float]:
        """By how much each assumption was wrong: least squares, with both drawn to the same factor, and that to 1."""
        # The factor that fits best if both were wrong by the same; nothing but what was assumed if nothing was seen.
        both = (self._a + self._b + NOTHING) / (self._aa + 2 * self._ab + self._bb + NOTHING)
        pull = PRIOR / (both * both)
        aa, bb = self._aa + pull, self._bb + pull
        a, b = self._a + pull * both, self._b + pull * both
        determinant = aa * bb - self._ab * self._ab
        token = (a * bb - b * self._ab) / determinant
        pair = (b * aa - a * self._ab) / determinant
        least = FACTOR_MIN * both
        if pair < least:
            token, pair = a / aa, least
        elif token < least:
            token, pair = least, b / bb
        return token, pair


def _mean(known: float, new: float, count: int) -> float:
    """A running mean that forgets; the first values count as in a plain one."""
    keep = min(KEEP, count / (count + 1))
    return keep * known + (1 - keep) * new


def compute_s(rates: Rates, start: int, end: int) -> float:
    """Computing the tokens from ``start`` to ``end`` of a sequence."""
    return (end - start) * rates.token_s + (end * end - start * start) / 2 * rates.pair_s


def token_s(rates: Rates, length: int) -> float:
    """Computing one token of a sequence of that length."""
    return rates.token_s + length * rates.pair_s

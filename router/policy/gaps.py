"""How long the gaps between a trace's steps last: learned from those that ended. Pure.

A gap is known by the tools that ran in it and by the kind of agent. What is not known well yet is mixed with what is
known of more gaps: those of any agent's use of these tools, those of this agent, all of them, and at last a guess. With
:data:`ENOUGH` samples of its own a kind of gap is judged by these alone.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import msgspec
import numpy as np
from blake3 import blake3

WINDOW = 256
"""Gaps of one kind that count: the last ones."""
ENOUGH = 100
"""Samples from which on a kind of gap is judged by its own."""
KINDS_MAX = 1024
"""Kinds that are told apart; the least recently seen is forgotten."""

Tools = tuple[str, ...] | None
"""What ran: names of tools; none of them (a person, or a program that reads what was said); or None: not known yet."""

Kind = tuple[str | None, Tools]
"""An agent or any, tools or any."""

TOOLS_GUESS = ((0.0, 0.05), (0.5, 1.1), (0.9, 2.0), (0.99, 20.0), (1.0, 600.0))
"""Quantiles of tools' durations in seconds, for a cluster that has seen none."""
PEOPLE_GUESS = ((0.0, 1.0), (0.5, 60.0), (0.9, 300.0), (0.99, 1800.0), (1.0, 3600.0))


class Gap:
    """The distribution of one gap's length, as samples of equal weight, sorted."""

    def __init__(self, samples: Sequence[float], seen: int) -> None:
        assert samples
        self._samples = sorted(samples)
        self.seen = seen
        """Gaps of this very kind that it rests on."""

    def quantile(self, share: float) -> float:
        """When that share of gaps has ended."""
        return self._samples[min(len(self._samples) - 1, int(share * len(self._samples)))]


def certain(seconds: float) -> Gap:
    """A gap whose length somebody has told."""
    return Gap([seconds], 0)


class Gaps:
    """What was seen of gaps."""

    def __init__(self) -> None:
        # In blocks, and kinds as digests: small things here and there keep all that is around them from being freed.
        self._kinds = np.zeros(KINDS_MAX, np.uint64)
        self._used = np.zeros(KINDS_MAX, np.int64)
        """When each kind was seen last; 0: its row is free."""
        self._seen = np.zeros(KINDS_MAX, np.int64)
        """Gaps of each kind so far."""
        self._seconds = np.zeros((KINDS_MAX, WINDOW))
        self._turn = 0

    def saw(self, agent: str, tools: Tools, seconds: float) -> None:
        """A gap has ended."""
        for kind in dict.fromkeys(((agent, tools), (None, tools), (agent, None), (None, None))):
            digest = _digest(kind)
            row = self._row(digest)
            if row is None:
                row = int(self._used.argmin())
                self._kinds[row], self._seen[row] = digest, 0
            self._turn += 1
            self._used[row] = self._turn
            self._seconds[row, self._seen[row] % WINDOW] = seconds
            self._seen[row] += 1

    def expect(self, agent: str, tools: Tools) -> Gap:
        """What is to be expected of a gap."""
        samples: Sequence[float] = _guess(PEOPLE_GUESS if tools == () else TOOLS_GUESS)
        seen = 0
        for kind in dict.fromkeys(((None, None), (agent, None), (None, tools), (agent, tools))):
            window = self._window(kind)
            seen = len(window)
            if seen == 0 and len(samples) == ENOUGH:
                continue
            samples = [*window, *_thinned(samples, ENOUGH - seen)] if seen < ENOUGH else window
        return Gap(samples, seen)

    def _row(self, digest: int) -> int | None:
        rows = np.flatnonzero((self._kinds == digest) & (self._used > 0))
        return int(rows[0]) if len(rows) else None

    def _window(self, kind: Kind) -> list[float]:
        row = self._row(_digest(kind))
        return [] if row is None else self._seconds[row, : self._seen[row]].tolist()


def _digest(kind: Kind) -> int:
    return int.from_bytes(blake3(msgspec.msgpack.encode(kind)).digest(8), "little")


@cache
def _guess(quantiles: tuple[tuple[float, float], ...]) -> tuple[float, ...]:
    """Samples at the middle of each of :data:`ENOUGH` equal shares."""
    samples: list[float] = []
    for at in range(ENOUGH):
        share = (at + 0.5) / ENOUGH
        (low, least), (high, most) = next(pair for pair in pairwise(quantiles) if pair[0][0] <= share <= pair[1][0])
        samples.append(least * (most / least) ** ((share - low) / (high - low)))
    return tuple(samples)


def _thinned(samples: Sequence[float], count: int) -> list[float]:
    """``count`` of them, evenly over their order."""
    ordered = sorted(samples)
    return [ordered[int((at + 0.5) * len(ordered) / count)] for at in range(count)]

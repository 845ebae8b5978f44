"""How many lines may be asked at once, and how that rises towards a deadline. Pure."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

LINE_S = 10.0
"""What a line is taken to last before any has ended."""
KEEP = 0.9
"""Weight of what was known of that, with each line that ends."""
AHEAD = 2.0
"""By so much a batch is ahead of its deadline, when it is run whatever else runs."""


class Cap(NamedTuple):
    """A grant."""

    lines: int
    """In progress, below everything else."""
    until_s: float
    """When it ends: it is none then."""


Grants = Callable[[], Cap]
"""What is granted now."""


def fixed(lines: int) -> Grants:
    """So many for ever."""
    return lambda: Cap(lines, math.inf)


class Left(NamedTuple):
    """What is left of a batch."""

    lines: int
    left_s: float
    """Until its deadline."""


def needed(batches: Iterable[Left], line_s: float) -> int:
    """How many lines must be in progress for every deadline to be met.

    Args:
        batches: the earliest deadline first.
        line_s: what a line lasts.
    """
    lines, most = 0, 0
    for batch in batches:
        lines += batch.lines
        if batch.left_s > 0:
            most = max(most, min(lines, int(AHEAD * lines * line_s / batch.left_s)))
    return most


def lasts(known_s: float, took_s: float) -> float:
    """What a line lasts, now that one more has ended."""
    return KEEP * known_s + (1 - KEEP) * took_s

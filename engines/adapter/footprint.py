"""What a stock server that its worker starts takes of its host's memory for KV, as its options say. Pure."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Footprint(NamedTuple):
    """Of one server, all its ranks together."""

    computed_bytes: int = 0
    """Where it computes: in a GPU's memory, if it has one; 0: its options do not say."""
    host_bytes: int = 0
    """In its host's memory, whatever it computes on."""
    ranks: int = 1
    option: str = ""
    """What makes it smaller."""


def last_said(args: Sequence[str], *names: str) -> str | None:
    """What an option was given last, by any of its names; None: it was not said."""
    found: str | None = None
    for word, following in pairwise([*args, ""]):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else following
    return found


def number(text: str | None, default: float = 0.0) -> float:
    """As engines read it, with a unit behind it or none; ``default`` for what is not said, or is no number."""
    if not text:
        return default
    unit = _UNITS.get(text[-1], 1)
    try:
        return float(text[:-1] if text[-1] in _UNITS else text) * unit
    except ValueError:
        return default


def ranks(args: Sequence[str], *options: Sequence[str]) -> int:
    """How many processes have a part of the model each: the product of these options."""
    count = 1
    for names in options:
        count *= max(1, int(number(last_said(args, *names), 1)))
    return count

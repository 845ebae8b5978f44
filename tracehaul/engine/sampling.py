"""Choosing the next token: a pure function of the logits, the request's parameters and the position.

The same row gives the same token whatever else is in the batch and wherever the step runs: randomness is
``uniform(seed, position)``, and the inverse CDF walks candidates in a decided order (probability falling, id rising).
"""

import struct

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from tracehaul.wire.steps import Sampling

_CANDIDATES = (256, 4096)
"""How many of the likeliest tokens are tried, in turn, before the whole vocabulary is sorted."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), decided by its arguments alone: 53 bits of a hash."""
    digest = blake3(struct.pack("<QQ", seed & 0xFFFF_FFFF_FFFF_FFFF, position)).digest(8)
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def is_plain_greedy(sampling: Sampling, emitted: int) -> bool:
    """Whether the token is the arg max of the untouched logits."""
    return sampling.temperature <= 0.0 and not _stops_masked(sampling, emitted)


def sample(logits: NDArray[np.float32], sampling: Sampling, position: int, emitted: int) -> int:
    """The token at ``position`` of the sequence, after ``emitted`` output tokens of its step.

    ``logits`` is one row over the vocabulary. Order of rules: ``min_tokens`` masks stop tokens, then temperature,
    then ``top_k``, then ``top_p`` of what ``top_k`` left.
    """
    if _stops_masked(sampling, emitted):
        logits = logits.copy()
        logits[[token for token in sampling.stop_tokens if token < len(logits)]] = -np.inf
    if sampling.temperature <= 0.0 or sampling.top_k == 1:
        return int(np.argmax(logits))  # the first of equals, by numpy's contract
    # Shifted before it is divided, so that the smallest temperature cannot overflow.
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    u = uniform(sampling.seed, position)
    for count in _CANDIDATES:
        if len(weights) > 2 * count:
            cut = np.partition(weights, len(weights) - count)[len(weights) - count]
            found = _walk(weights, np.flatnonzero(weights >= cut), sampling, u)
            if found is not None:
                return found
    found = _walk(weights, np.arange(len(weights)), sampling, u)
    assert found is not None
    return found


def _walk(weights: NDArray[np.float64], ids: NDArray[np.intp], sampling: Sampling, u: float) -> int | None:
    """Inverse CDF over ``ids`` (rising, and no weight outside is larger than one inside).

    None if the answer might lie outside. Sums run in the same order for any such ``ids``: so does the result.
    """
    order = ids[np.argsort(-weights[ids], kind="stable")]
    closed = len(order) == len(weights)
    if sampling.top_k > 0:
        if sampling.top_k > len(order) and not closed:
            return None
        order, closed = order[: sampling.top_k], True
    mass = np.cumsum(weights[order])
    # The plain sum, not the walk's end: it is the same for every ``ids``, and differs by rounding alone.
    total = float(mass[-1]) if sampling.top_k > 0 else float(weights.sum())
    keep = len(order)
    if sampling.top_p < 1.0:
        inside = int(np.searchsorted(mass, sampling.top_p * total, side="left")) + 1
        if inside > keep and not closed:
            return None
        keep, closed = min(inside, keep), True
        total = float(mass[keep - 1])
    at = int(np.searchsorted(mass[:keep], u * total, side="right"))
    if at < keep:
        return int(order[at])
    # Rounding at the far end: the last candidate that has any weight.
    return int(order[np.searchsorted(mass, mass[keep - 1], side="left")]) if closed else None


def _stops_masked(sampling: Sampling, emitted: int) -> bool:
    return emitted < sampling.min_tokens and len(sampling.stop_tokens) > 0

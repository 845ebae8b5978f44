"""Choosing the next token: a pure function of the logits, the request's parameters, the history and the position.

The same row gives the same token whatever else is in the batch and wherever the step runs: randomness is
``uniform(seed, position)``, and the inverse CDF walks candidates in a decided order (probability falling, id rising).
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from tracehaul.engine.base import Guide, Mask, Result, Work
from tracehaul.engine.history import History
from tracehaul.wire.steps import Sampling, TokenLogprobs

Logits = NDArray[np.float32]

_CANDIDATES = (128, 2048)
"""How many of the likeliest tokens are tried, in turn, before the whole vocabulary is sorted."""
_TEMPERATURE_MIN = 1e-5
"""Below it the likeliest token takes all: float32 could not tell the others' weights from nothing."""


_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_MASK_SCORES: Logits = np.where(_BITS == 1, np.float32(0), np.float32(-np.inf))
"""What a byte of a mask adds to the logits of its eight tokens: looking it up is the fastest way to apply one."""


class Row(NamedTuple):
    """What, beside its logits, decides the token at one place."""

    sampling: Sampling
    position: int
    """The token's place in the sequence."""
    emitted: int
    """Output tokens of the step before it."""
    history: History | None = None
    """The tokens before it; needed where the sampling penalizes them."""
    mask: Mask | None = None
    """The tokens that may come; None: any."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), decided by its arguments alone: 53 bits of a hash."""
    digest = blake3(struct.pack("<QQ", seed & 0xFFFF_FFFF_FFFF_FFFF, position)).digest(8)
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def is_plain_greedy(row: Row) -> bool:
    """Whether the token is the arg max of the untouched logits, and nothing else is asked for."""
    return _is_greedy(row.sampling) and not _touches(row) and row.sampling.logprobs is None


def choose(logits: Logits, rows: Sequence[Row]) -> list[Result]:
    """The token that follows each row of ``logits`` (``[rows, vocab]``), by that row's own rules.

    Order of rules: penalties, ``logit_bias`` and masks change the logits; then temperature, ``min_p``, ``top_k``, and
    ``top_p`` of what those left. Equals rank by rising id.
    """
    likeliest: list[int] = logits.argmax(axis=1).tolist()  # the first of equals, by numpy's contract
    return [_choose(logits[at], row, likeliest[at]) for at, row in enumerate(rows)]


def _choose(logits: Logits, row: Row, likeliest: int) -> Result:
    sampling = row.sampling
    touched = logits
    if _touches(row):
        touched = adjusted(logits, row)
        likeliest = int(touched.argmax())
    token = likeliest
    if not _is_greedy(sampling):
        token = _draw(touched, float(touched[likeliest]), sampling, uniform(sampling.seed, row.position))
    return Result(token, None if sampling.logprobs is None else logprobs(logits, token, sampling.logprobs))


def follow(results: Sequence[Result], guides: Sequence[Guide | None]) -> list[Result]:
    """Let each guide know its row's token; what a guide with an error allows is nothing."""
    followed: list[Result] = []
    for result, guide in zip(results, guides, strict=True):
        if guide is not None and guide.error:
            result = Result(error=guide.error)
        elif guide is not None:
            assert result.token is not None
            guide.accept(result.token)
        followed.append(result)
    return followed


# --- before the choice --------------------------------------------------------------------------------------


def _touches(row: Row) -> bool:
    """Whether :func:`adjusted` would change anything."""
    return row.sampling.penalizes or bool(row.sampling.logit_bias) or _masks_stops(row) or row.mask is not None


def adjusted(logits: Logits, row: Row) -> Logits:
    """One row of logits as the request wants it changed before the choice; a copy."""
    sampling = row.sampling
    result = logits.copy()
    if sampling.penalizes:
        assert row.history is not None, "penalties need the history"
        _penalize(result, sampling, row.history)
    for token, bias in sampling.logit_bias:
        if token < len(result):
            result[token] += bias
    if _masks_stops(row):
        result[[token for token in sampling.stop_tokens if token < len(result)]] = -np.inf
    if row.mask is not None:
        result += _MASK_SCORES.take(row.mask.view(np.uint8), axis=0).reshape(-1)[: len(result)]
    return result


def _penalize(logits: Logits, sampling: Sampling, history: History) -> None:
    seen = logits[history.ids]
    if sampling.repetition_penalty != 1.0:
        penalty = np.float32(sampling.repetition_penalty)
        seen = np.where(seen > 0, seen / penalty, seen * penalty)
    seen -= np.float32(sampling.frequency_penalty) * history.counts
    seen -= np.float32(sampling.presence_penalty) * (history.counts > 0)
    logits[history.ids] = seen


def _masks_stops(row: Row) -> bool:
    return row.emitted < row.sampling.min_tokens and len(row.sampling.stop_tokens) > 0


# --- the choice ---------------------------------------------------------------------------------------------


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _TEMPERATURE_MIN or sampling.top_k == 1


def _draw(logits: Logits, peak: float, sampling: Sampling, u: float) -> int:
    """The token at ``u`` of the inverse CDF; ``peak`` is the largest of ``logits``."""
    # Shifted before it is divided, so that no temperature overflows.
    depths = (np.float32(peak) - logits) / np.float32(sampling.temperature)
    weights = np.exp(-depths)
    if sampling.min_p > 0.0:
        weights[weights < sampling.min_p] = 0.0  # the likeliest weighs 1
    total = float(weights.sum(dtype=np.float64))
    for count in _CANDIDATES:
        ids = _shallow(depths, count)
        found = None if ids is None else _walk(depths, weights, ids, total, sampling, u)
        if found is not None:
            return found
    found = _walk(depths, weights, None, total, sampling, u)
    assert found is not None
    return found


def _walk(
    depths: Logits, weights: Logits, ids: NDArray[np.intp] | None, total: float, sampling: Sampling, u: float
) -> int | None:
    """Inverse CDF over ``ids``, of which none outside is likelier than one inside; None: over all of any weight.

    None if the answer might lie outside. Sums run in the same order for any such ``ids``: so does the result.
    """
    closed = ids is None
    order = _falling(depths, np.flatnonzero(weights) if ids is None else ids)
    if sampling.top_k > 0:
        if sampling.top_k > len(order) and not closed:
            return None
        order, closed = order[: sampling.top_k], True
    mass = np.cumsum(weights[order], dtype=np.float64)
    if sampling.top_k > 0:
        total = float(mass[-1])
    # Else the plain sum, not the walk's end: it is the same for any ``ids``, and differs by rounding alone.
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


def _shallow(depths: Logits, count: int) -> NDArray[np.intp] | None:
    """``count`` ids or some more, rising, of the smallest depths: no id left out has a smaller one than one inside.

    None where that would not be quicker than to look at all. Of the minima of many short columns, the ``count``-th
    bounds that many depths, and hardly more: far less work than to partition the whole row.
    """
    width = 8 * count
    if len(depths) < 2 * width:
        return None
    minima = depths[: len(depths) // width * width].reshape(-1, width).min(axis=0)
    bound = np.partition(minima, count - 1)[count - 1]
    return np.flatnonzero(depths <= bound) if bound < np.inf else None


def _falling(depths: Logits, ids: NDArray[np.intp]) -> NDArray[np.intp]:
    """``ids`` by rising depth (0 or more), then rising id; as one sort of integers, which is much the fastest."""
    keys = depths[ids].view(np.uint32).astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFF_FFFF)).astype(np.intp)


# --- logprobs -----------------------------------------------------------------------------------------------


def logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Of ``token`` and the ``count`` likeliest, in the distribution that one untouched row of ``logits`` gives."""
    peak = logits.max()
    depths = peak - logits
    # float32 for the exponentials, float64 for their sum: the vocabulary is long.
    norm = math.log(float(np.exp(-depths).sum(dtype=np.float64)))
    top = _likeliest(depths, count)
    return TokenLogprobs(-float(depths[token]) - norm, tuple((int(at), -float(depths[at]) - norm) for at in top))


def add_scores(results: Sequence[Result], work: Sequence[Work], logits: Logits) -> list[Result]:
    """``results`` with the scores that their items ask for; ``logits`` has a row for each target, item by item."""
    scored: list[Result] = []
    row = 0
    for result, item in zip(results, work, strict=True):
        if item.scoring is not None:
            targets, top = item.scoring
            told = tuple(logprobs(logits[row + place], target, top) for place, target in enumerate(targets))
            result, row = result._replace(scores=told), row + len(targets)
        scored.append(result)
    assert row == len(logits)
    return scored


def _likeliest(depths: Logits, count: int) -> NDArray[np.intp]:
    if count == 0:
        return np.empty(0, dtype=np.intp)
    ids = _shallow(depths, count)
    return _falling(depths, np.arange(len(depths)) if ids is None else ids)[:count]

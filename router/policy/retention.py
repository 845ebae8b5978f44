"""What becomes of a trace's context between two of its steps. Pure.

All of it is in the stores already when a step ends, so giving it up on the worker costs a pull, not a computation. What
is decided is how long it is worth the worker's memory, how long the stores should keep it rather than others', and when
it should start to come back.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from router.policy.gaps import Gap
from worker.rates import Rates

KEEP_MAX_S = 600.0
PIN_MARGIN_S = 5.0
"""Longer than the gap is expected to last at most."""
HALF_LIFE_S = 60.0
"""Of the stores' soft pins: a pin of priority 2**n lasts n of them."""
OCTAVES_MAX = 4
"""Of pins for learned gaps: what comes back late must not outlast what comes back soon by more than that."""
OCTAVES_TOLD_MAX = 32
"""Of pins for suspensions: the client has said that it comes back."""
RETURN_SHARE = 0.4
"""The context is to be back when that share of gaps has ended."""
CERTAIN_MARGIN_S = 0.2
RECALLED_KEEP_S = 15.0
"""How long a context that came back is worth its worker's memory at least: what comes back for others must not push it
out again just before its step. Steps still do."""
SHORT_TOKENS = 64
WAIT_WEIGHT = 0.1


class RetentionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each mechanism can be switched off."""

    keep: bool = True
    """Workers keep a context while it is worth its memory, and give it up after that before others."""
    pins: bool = True
    """Stores keep an idle trace's blocks rather than others, for as long as it is likely to come back."""
    recall: bool = True
    """Contexts come back to their workers shortly before they are needed, where memory is free."""
    pin_max_s: Annotated[float, Meta(gt=0)] = 3600.0
    """The longest pin that is asked for."""
    margin_s: Annotated[float, Meta(ge=0)] = 0.1
    """How much earlier than needed a context starts to come back."""


class Situation(msgspec.Struct, frozen=True):
    """What a decision rests on. Times in seconds."""

    tokens: int
    """Length of the context."""
    reload_s: float
    """What bringing it back from a store is expected to take."""
    recompute_s: float
    queue_s: float
    """Mean time that a step waits for its turn."""
    eta: float
    """How much less is left of a trace for each step done: see :func:`progress`."""


class Retention(msgspec.Struct, frozen=True):
    """A decision, counted from the step's end."""

    keep_s: float
    """How long the context is worth its worker's memory."""
    pin_s: float
    """How long the stores are asked to keep it; 0: not at all."""
    priority: float
    """Of that pin."""
    recall_s: float | None
    """When it should start to come back; None: not by itself."""


def decide(gap: Gap, now: Situation, config: RetentionConfig, *, told_s: float | None = None) -> Retention:
    """What to do with a context in a gap.

    Args:
        gap: how long it may last.
        now: what keeping and losing it costs.
        config: what may be done.
        told_s: the client says that the gap ends by then; None: it says nothing.
    """
    longest_s = gap.quantile(0.99) if told_s is None else told_s
    octaves = min(
        max(1.0, (longest_s + PIN_MARGIN_S) / HALF_LIFE_S), OCTAVES_MAX if told_s is None else OCTAVES_TOLD_MAX
    )
    pin_s = min(longest_s + PIN_MARGIN_S, octaves * HALF_LIFE_S, config.pin_max_s)
    margin_s = now.reload_s + (config.margin_s if told_s is None else CERTAIN_MARGIN_S)
    recall_s = max(0.0, gap.quantile(RETURN_SHARE) - margin_s)
    return Retention(
        keep_s=_keep(gap, now) if config.keep else 0.0,
        pin_s=pin_s if config.pins else 0.0,
        priority=2.0**octaves,
        recall_s=recall_s if config.recall and recall_s > now.reload_s else None,
    )


def _keep(gap: Gap, now: Situation) -> float:
    """argmax over t of P(gap <= t) * (queue * eta + min(reload, recompute)) - t: Continuum's rule."""
    worth_s = now.queue_s * max(0.0, now.eta) + min(now.reload_s, now.recompute_s)
    best, kept_s = 0.0, 0.0
    for after_s in gap.candidates:
        if after_s > min(worth_s, KEEP_MAX_S):
            break
        gain = gap.ended(after_s) * worth_s - after_s
        if gain > best:
            best, kept_s = gain, after_s
    return kept_s


def progress(lengths: list[int]) -> float:
    """-Corr(steps done, steps left) over all moments of traces of these many steps; 0 where it is not defined.

    1: all are equally long, so that each step done is one less to do. About 0: how much is left does not depend on it.
    """
    moments = [(done, length - done) for length in lengths for done in range(1, length + 1)]
    count = len(moments)
    if count < 2:
        return 0.0
    mean_done = sum(done for done, _ in moments) / count
    mean_left = sum(left for _, left in moments) / count
    covariance = sum((done - mean_done) * (left - mean_left) for done, left in moments)
    spread = sum((done - mean_done) ** 2 for done, _ in moments) * sum((left - mean_left) ** 2 for _, left in moments)
    return -covariance / spread**0.5 if spread > 0 else 0.0


def situation(tokens: int, rates: Rates, queue_s: float, eta: float) -> Situation:
    """For a context of that length, at a worker's rates."""
    recompute_s = tokens * rates.token_s + 0.5 * tokens * tokens * rates.pair_s
    return Situation(tokens, tokens * rates.pull_token_s, recompute_s, queue_s, eta)


def mean_wait(mean_s: float, computed_tokens: int, first_s: float, pull_s: float) -> float:
    """The mean time that steps wait for their turn, after one more: that of steps that computed next to nothing."""
    if computed_tokens > SHORT_TOKENS:
        return mean_s
    return mean_s + WAIT_WEIGHT * (max(0.0, first_s - pull_s) - mean_s)

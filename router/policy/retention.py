"""What becomes of a trace's context between two of its steps. Pure.

All of it is in the stores already when a step ends, so giving it up on the worker costs a pull, not a computation. What
is decided is how long the stores should keep it rather than others', and when it should start to come back.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from router.policy.gaps import Gap

PIN_MARGIN_S = 5.0
"""Longer than the gap is expected to last at most."""
HALF_LIFE_S = 60.0
"""Of the stores' soft pins: a pin of priority 2**n lasts n of them."""
OCTAVES_MAX = 4
"""Of pins for learned gaps: what comes back late must not outlast what comes back soon by more than that."""
OCTAVES_HINTED_MAX = 8
"""Of pins for contexts that their client marked as worth keeping: it need not come back."""
OCTAVES_TOLD_MAX = 32
"""Of pins for suspensions: the client has said that it comes back."""
RETURN_SHARE = 0.4
"""The context is to be back when that share of gaps has ended."""
CERTAIN_MARGIN_S = 0.2
RECALLED_KEEP_S = 15.0
"""How long a context that came back is worth its worker's memory: what comes back for others must not push it
out again just before its step. Steps still do."""


class RetentionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each mechanism can be switched off."""

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


class Retention(msgspec.Struct, frozen=True):
    """A decision, counted from the step's end."""

    pin_s: float
    """How long the stores are asked to keep it; 0: not at all."""
    priority: float
    """Of that pin."""
    recall_s: float | None
    """When it should start to come back; None: not by itself."""


def decide(
    gap: Gap,
    now: Situation,
    config: RetentionConfig,
    *,
    returns: bool = True,
    told_s: float | None = None,
    keep_s: float = 0.0,
) -> Retention:
    """What to do with a context in a gap.

    Args:
        gap: how long it may last.
        now: what losing it costs.
        config: what may be done.
        returns: something says that there is a next step at all. Gaps are learned from traces that had one; of those
            that have none, contexts brought back would push out others' that are waited for.
        told_s: the client says that the gap ends by then; None: it says nothing.
        keep_s: the client means the context to be kept for so long; 0: it does not say.
    """
    longest_s, octaves_max = gap.quantile(0.99), OCTAVES_MAX
    if told_s is not None:
        longest_s, octaves_max = told_s, OCTAVES_TOLD_MAX
    elif keep_s > longest_s:
        longest_s, octaves_max = keep_s, OCTAVES_HINTED_MAX
    octaves = min(max(1.0, (longest_s + PIN_MARGIN_S) / HALF_LIFE_S), octaves_max)
    pin_s = min(longest_s + PIN_MARGIN_S, octaves * HALF_LIFE_S, config.pin_max_s)
    margin_s = now.reload_s + (config.margin_s if told_s is None else CERTAIN_MARGIN_S)
    recall_s = max(0.0, gap.quantile(RETURN_SHARE) - margin_s)
    return Retention(
        pin_s=pin_s if config.pins else 0.0,
        priority=2.0**octaves,
        recall_s=recall_s if returns and config.recall and recall_s > now.reload_s else None,
    )

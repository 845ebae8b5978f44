"""Where a step's context could have come from, where it came from, and why the difference. Pure.

Four counts of leading prompt tokens, each of which should be no less than the next. What silently falls out between
two of them is the first thing that goes wrong with a cache, so each step says where its tokens were lost, and why.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

LossReason = Literal[
    "evicted",
    "store_lost",
    "never_published",
    "worker_gone",
    "placement",
    "index_stale",
    "missed",
    "prefill_failed",
    "worker_failed",
    "partial_block",
]
"""Why tokens that the trace had were computed again:

* nobody held them any more: ``evicted`` by who did; ``store_lost`` or ``worker_gone`` with the node that did;
  ``never_published``, so that the worker that had them was the only one;
* somebody held them, and the ``placement`` chose a worker that was to compute them;
* they were expected where the step ran, and were not there: ``index_stale``; ``missed`` in the transfer; the
  ``prefill_failed``; or the ``worker_failed`` that ran the step at first;
* less than a block, that no other prompt can share: ``partial_block``.
"""


class Changed(msgspec.Struct, frozen=True, gc=False):
    """Where a prompt parts from what its trace has run: what the trace had after that is of no use to it. The reason is
    ``prompt_changed``, and the client's alone."""

    section: Literal["tools", "variables", "system", "messages"]
    """What differs: the tools; a variable of the template; a message of the system; or another one."""
    message: int | None
    """Its number from 0; None for the first two."""
    offset: int
    """Characters of the prompt up to there."""
    characters: int
    """What the trace had run after that."""
    tokens: int = 0
    """The same in tokens."""


class Hits(msgspec.Struct, frozen=True):
    """One step's hits in leading prompt tokens, and what was lost on the way."""

    theoretical: int = 0
    """What the trace's earlier steps, or its parent's, left of this prompt: all of it with caches without limits."""
    indexed: int = 0
    """What the stores were said to hold, in full blocks."""
    chosen: int = 0
    """What the placement expected where it put the step."""
    delivered: int = 0
    """What nobody computed again. More than theoretical where another trace has left the same."""
    losses: dict[str, int] = {}
    """Tokens by :data:`LossReason`; they add up to what is missing from ``theoretical``."""
    changed: Changed | None = None
    """What is not in ``theoretical`` because the client changed it; None if it only added to the prompt."""


class Expected(msgspec.Struct, frozen=True):
    """What was known before the step ran, in leading prompt tokens."""

    theoretical: int
    published: int
    """Of these, what the earlier steps had got into the store."""
    indexed: int
    warm: int
    """Of these, what the worker that ran the last step kept; 0 if it is gone or kept nothing."""
    chosen: int
    block_tokens: int


class Outcome(msgspec.Struct, frozen=True):
    """What happened to it."""

    delivered: int
    missed_blocks: int = 0
    prefill_failed: bool = False
    worker_failed: bool = False
    """It was moved to another worker before it was through."""
    home_lost: bool = False
    """The store node that took the trace's blocks is gone."""
    warm_gone: bool = False
    """So is the worker that ran its last step."""


def attribute(expected: Expected, outcome: Outcome) -> Hits:
    """What was delivered, and for each run of lost tokens the point at which it was lost."""
    delivered, theoretical = outcome.delivered, expected.theoretical
    known = min(theoretical, max(expected.indexed, expected.warm))
    chosen = min(known, expected.chosen)
    losses: dict[str, int] = {}

    def lose(start: int, end: int, reason: LossReason) -> None:
        count = end - max(start, delivered)
        if count > 0:
            losses[reason] = losses.get(reason, 0) + count

    full = theoretical - theoretical % max(1, expected.block_tokens)
    if delivered >= full:
        lose(0, theoretical, "partial_block")
    else:
        lose(0, chosen, _failure(expected, outcome))
        lose(chosen, known, "placement")
        published = min(theoretical, max(known, expected.published))
        lose(known, published, "store_lost" if outcome.home_lost else "evicted")
        lose(published, theoretical, "worker_gone" if outcome.warm_gone else "never_published")
    return Hits(theoretical, expected.indexed, expected.chosen, delivered, losses)


def together(parts: Sequence[Hits]) -> Hits:
    """The sums."""
    losses: Counter[str] = Counter()
    for part in parts:
        losses.update(part.losses)
    return Hits(
        sum(part.theoretical for part in parts),
        sum(part.indexed for part in parts),
        sum(part.chosen for part in parts),
        sum(part.delivered for part in parts),
        dict(losses),
        next((part.changed for part in parts if part.changed is not None), None),
    )


def _failure(expected: Expected, outcome: Outcome) -> LossReason:
    """Why what was expected at the chosen worker was not there."""
    if outcome.worker_failed:
        return "worker_failed"
    if outcome.prefill_failed:
        return "prefill_failed"
    if outcome.missed_blocks:
        return "missed"
    # Nobody tells the router what a worker gives up to make room.
    return "evicted" if expected.chosen > expected.indexed else "index_stale"

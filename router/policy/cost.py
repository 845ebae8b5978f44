"""What a step costs on each worker, in seconds. Pure; vectors over workers throughout.

``cost = fetch + compute + queue + interference + decoding + what gives way``. Fetching is pulling from the store, or
computing where that is faster. A prompt's missing rest is computed either on the decode worker, where it delays every
step that decodes there, or on a prefill worker, from where it is pulled.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.policy.fleet import Column, Fleet

OUTPUT_TOKENS = 64
"""What a step is expected to generate."""
CROWD_SHARE = 0.15
"""By how much one more sequence slows an iteration that decodes."""
LOCAL_MARGIN = 0.7
"""A decode worker computes more than a short rest itself only if that is so much faster: what it computes delays steps
that nobody knows of yet, too."""


class Need(NamedTuple):
    """A step, in tokens, as far as its costs go."""

    prompt: int
    stored: int
    """The prompt's leading run in the store."""
    warm: int
    """What the warm worker kept of it."""
    local_max: int
    """A decode worker computes up to this many missing tokens itself in any case."""


class Costs(NamedTuple):
    """Per decode worker."""

    seconds: Column
    """All in all."""
    own_s: Column
    """Computing what is missing, if it does that itself."""
    local: NDArray[np.bool_]
    """Whether it computes what is missing itself."""
    reach: Column
    """Leading tokens that nobody computes."""


def compute_s(fleet: Fleet, start: Column | float, end: Column | float) -> Column:
    """Computing the tokens from ``start`` to ``end``, on each worker."""
    return (end - start) * fleet.token_s + (end * end - start * start) / 2 * fleet.pair_s


def fetch_s(fleet: Fleet, start: Column | float, end: Column | float) -> Column:
    """Getting tokens that the store has: pulled, or computed where that takes less."""
    return np.minimum((end - start) * fleet.pull_token_s, compute_s(fleet, start, end))


def prefill_s(prefills: Fleet, need: Need, predicted: Column, now_s: float) -> tuple[Column, Column]:
    """Until each prefill worker has all of the prompt, and how much of that is its own computing.

    ``predicted``: leading tokens that each is about to have computed for another step.
    """
    start = np.maximum(predicted, float(need.stored))
    own = compute_s(prefills, start, float(need.prompt))
    return prefills.queue_s(now_s) + fetch_s(prefills, 0.0, float(need.stored)) + own, own


def decode_costs(
    decodes: Fleet, need: Need, warm_row: int | None, prefilled_s: float | None, helper_work_s: float, now_s: float
) -> Costs:
    """Of the step on each decode worker.

    ``prefilled_s``: when the best prefill worker would be done; None if there is none that could help.
    ``helper_work_s``: what that would compute for this step alone.
    """
    have = np.zeros(len(decodes))
    if warm_row is not None:
        have[warm_row] = need.warm
    prompt = float(need.prompt)
    reach = np.maximum(have, float(need.stored))
    fetch = fetch_s(decodes, have, reach)
    own = compute_s(decodes, reach, prompt)
    waited = fetch + decodes.queue_s(now_s) + own
    seconds = waited + own * decodes.decoding
    local = np.ones(len(decodes), dtype=np.bool_)
    if prefilled_s is not None:
        remote = np.maximum(prefilled_s, fetch) + (prompt - reach) * decodes.pull_token_s
        again = np.maximum(own - helper_work_s, 0.0)  # a prefix that is computed there for others already
        local = (prompt - reach <= need.local_max) | (seconds + again < LOCAL_MARGIN * remote)
        seconds = np.where(local, seconds, remote)
    decoding = OUTPUT_TOKENS * decodes.decode_s * (1 + CROWD_SHARE * decodes.decoding)
    gives_way = np.maximum(prompt - have - decodes.free_tokens, 0.0) * decodes.pull_token_s
    return Costs(seconds + decoding + gives_way, own, local, reach)

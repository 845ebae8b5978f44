"""What a step costs on each worker, in seconds. Pure; vectors over workers throughout.

``cost = fetch + compute + queue + interference + decoding + what gives way + wait for memory``. Fetching is pulling
from the store, as far as that is faster than computing: blocks of a slow tier may not be worth it. A prompt's missing
rest is computed either on the decode worker, where it delays every step that decodes there, or on a prefill worker,
from where it is pulled; then all that the store has is pulled, since what it has in a slow tier is not written to it
anew.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.fleet.load import Column, WorkerTable
from router.policy.knobs import DEFAULT, Knobs

OUTPUT_TOKENS = 64
"""What a step is expected to generate, where its place is compared with others."""
CROWD_SHARE = 0.15
"""By how much one more sequence slows an iteration that decodes."""
OUTPUTS_COUNT = 64
"""Steps of late whose outputs say what the next one generates, about."""
PULL_ENDS_MAX = 4
"""Points considered at which pulling may end."""


class OutputLengths:
    """What steps generate."""

    def __init__(self) -> None:
        self.tokens = float(OUTPUT_TOKENS)
        """On the mean, of late."""

    def ended(self, tokens: int) -> None:
        """A step has, after so many."""
        self.tokens += (tokens - self.tokens) / OUTPUTS_COUNT


class StoredRun(NamedTuple):
    """A stretch of a prompt that the store has; the first begins with the prompt, each other where one ends."""

    end: int
    """In tokens."""
    raise_token_s: float
    """What each of its tokens takes to come into the store's memory."""


class Need(NamedTuple):
    """A step, in tokens, as far as its costs go."""

    prompt: int
    runs: Sequence[StoredRun]
    """The prompt's leading run in the store, and what it is made of."""
    warm: int
    """What the warm worker kept of it."""
    under_way: int = 0
    """The prompt's leading tokens that some worker is about to have computed for other steps."""
    output: float = OUTPUT_TOKENS
    """What steps have generated of late, on the mean."""

    @property
    def stored(self) -> int:
        """All of them."""
        return self.runs[-1].end if self.runs else 0

    def raise_s(self, start: int) -> float:
        """Bringing up all tokens from ``start`` on."""
        return raise_s(self.runs, start, self.stored)


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
    pull: Column
    """Leading tokens of the store that are worth pulling."""
    held_s: Column
    """For so long it keeps others from all of the memory, where they wait for it."""


def compute_s(workers: WorkerTable, start: Column | float, end: Column | float) -> Column:
    """Computing the tokens from ``start`` to ``end``, on each worker."""
    return (end - start) * workers.token_s + (end * end - start * start) / 2 * workers.pair_s


def raise_s(runs: Sequence[StoredRun], start: int, end: int) -> float:
    """Bringing the tokens from ``start`` to ``end`` into the store's memory."""
    seconds, begin = 0.0, 0
    for run in runs:
        seconds += max(0, min(end, run.end) - max(start, begin)) * run.raise_token_s
        begin = run.end
    return seconds


def pull_ends(runs: Sequence[StoredRun]) -> list[int]:
    """Where pulling may end, in tokens, the farthest first: after all of it, before what is slower, or before any."""
    if not runs:
        return [0]
    ends = [run.end for run, after in pairwise(runs) if after.raise_token_s > run.raise_token_s]
    return [runs[-1].end, *reversed(ends[: PULL_ENDS_MAX - 2]), 0]


class Prefilled(NamedTuple):
    """Per prefill worker."""

    done_s: Column
    """Until it has all of the prompt."""
    own_s: Column
    """How much of that is its own computing."""
    lost_s: Column
    """What others lose by it: what is computed twice is lost to all, and who shares cores waits for them."""


def prefill_s(prefills: WorkerTable, need: Need, predicted: Column, busy: float, now_s: float) -> Prefilled:
    """What it takes on each prefill worker.

    ``predicted``: leading tokens that each is about to have computed for another step. ``busy``: the share of the
    decode workers that have something to do, and room for the step.
    """
    start = np.maximum(predicted, float(need.stored))
    own = compute_s(prefills, start, float(need.prompt))
    done_s = prefills.queue_s(now_s) + need.stored * prefills.pull_token_s + need.raise_s(0) + own
    return Prefilled(done_s, own, again_s(prefills, need, start) + busy * prefills.shared * own)


def again_s(workers: WorkerTable, need: Need, start: Column) -> Column:
    """Computing from ``start`` on what is under way elsewhere, on each worker."""
    if not need.under_way:
        return np.zeros(len(workers))
    return compute_s(workers, start, np.maximum(start, float(need.under_way)))


def decode_costs(
    decodes: WorkerTable,
    need: Need,
    warm_row: int | None,
    predicted: Column,
    prefilled_s: float | None,
    now_s: float,
    knobs: Knobs = DEFAULT,
) -> Costs:
    """Of the step on each decode worker.

    ``predicted``: leading tokens that each is about to have computed for another step.
    ``prefilled_s``: when the best prefill worker would be done, and what others lose by it; None if there is none that
    could help.
    """
    have = np.zeros(len(decodes))
    if warm_row is not None:
        have[warm_row] = need.warm
    farthest, *nearer = pull_ends(need.runs)
    costs = _costs_here(decodes, need, have, warm_row, predicted, farthest, now_s)
    for end in nearer:
        other = _costs_here(decodes, need, have, warm_row, predicted, end, now_s)
        worth = other.seconds < knobs.pull_margin * costs.seconds
        if worth.any():
            costs = Costs(*[np.where(worth, new, old) for new, old in zip(other, costs, strict=True)])
    seconds = costs.seconds
    if prefilled_s is not None:
        reach = np.maximum(have, float(need.stored))
        remote = np.maximum(prefilled_s, _fetch_s(decodes, need, have, warm_row, need.stored))
        remote += (need.prompt - reach) * decodes.pull_token_s
        local = (need.prompt - costs.reach <= decodes.local_tokens) | (seconds < knobs.local_margin * remote)
        seconds = np.where(local, seconds, remote)
        costs = costs._replace(
            local=local, reach=np.where(local, costs.reach, reach), pull=np.where(local, costs.pull, need.stored)
        )
    iteration_s = decodes.decode_s * (1 + CROWD_SHARE * decodes.decoding)
    gives_way = np.maximum(need.prompt - have - decodes.free_tokens, 0.0) * decodes.pull_token_s
    held_s = OUTPUT_TOKENS * decodes.decode_s * _share(need.prompt, decodes.held_tokens)
    seconds += OUTPUT_TOKENS * iteration_s + gives_way + _turnover(decodes, need) * need.output * iteration_s
    return costs._replace(seconds=seconds, held_s=held_s)


def _turnover(decodes: WorkerTable, need: Need) -> Column:
    """The share of the steps in progress that must have ended before there is memory for this one. 1 at most: where all
    of them must, everybody waits for long, and a context that is left behind gains nothing."""
    short = np.where(decodes.kv_tokens > 0, decodes.sent_tokens + need.prompt - decodes.kv_tokens, 0.0)
    held = np.minimum(decodes.sent_tokens, decodes.kv_tokens)
    return np.clip(short, 0.0, held) / np.maximum(held, 1.0)


def _share(tokens: int, held_tokens: Column) -> Column:
    """Of memory that others wait for."""
    return np.where(held_tokens > 0, np.minimum(tokens / np.maximum(held_tokens, 1.0), 1.0), 0.0)


def _fetch_s(decodes: WorkerTable, need: Need, have: Column, warm_row: int | None, end: int) -> Column:
    """Pulling what the store has up to ``end``."""
    raised_s = np.full(len(decodes), raise_s(need.runs, 0, end))
    if warm_row is not None:
        raised_s[warm_row] = raise_s(need.runs, need.warm, end)
    return np.maximum(end - have, 0.0) * decodes.pull_token_s + raised_s


def _costs_here(
    decodes: WorkerTable, need: Need, have: Column, warm_row: int | None, predicted: Column, end: int, now_s: float
) -> Costs:
    """Pulling up to ``end`` and computing the rest on the decode worker, decoding left out."""
    reach = np.maximum(have, float(end))
    start = np.maximum(reach, predicted)
    own = compute_s(decodes, start, float(need.prompt))
    seconds = _fetch_s(decodes, need, have, warm_row, end) + (start - reach) * decodes.pull_token_s
    seconds += decodes.queue_s(now_s) + own * (1 + decodes.decoding) + again_s(decodes, need, start)
    here, pull = np.ones(len(decodes), dtype=np.bool_), np.full(len(decodes), float(end))
    return Costs(seconds, own, here, reach, pull, np.zeros(len(decodes)))

"""What a pool would do with other numbers of prefill and decode workers, as a closed network of queues. Pure.

As many traces as go on now go on being under way: a step of theirs runs, or a tool does. Prompts are computed by
prefill workers, as far as these have the time, and by decode workers beyond that (:mod:`router.policy.cost` sends them
there); what a decode worker computes, its decoding waits for. Everything else follows from how many steps end in a
second, which is found by halving.
"""

from collections.abc import Sequence
from typing import NamedTuple

FULL = 0.9
"""Share of its time that a prefill worker computes at most: prompts do not come one by one."""
HALVINGS = 40
NEVER_S = 1e9
FIT_MAX = 4.0
KEEP = 0.9
SHARE_ASSUMED, SHARE_MAX = 0.15, 0.5
"""By how much one more sequence slows an iteration, until that was seen."""
ASSUMED = 36.0
"""What is assumed counts like six sequences more or less."""


class Roles(NamedTuple):
    """Workers by role."""

    prefills: int
    decodes: int


class Demand(NamedTuple):
    """What there is to do. Of a step on the mean, in seconds and tokens."""

    rate: float
    """Steps that end in a second."""
    step_s: float
    gap_s: float
    """Between two steps of a trace."""
    prompt_s: float
    output: float
    iteration_s: float
    """Of a worker that decodes one sequence."""
    sequence_share: float
    """By how much each further one slows it."""
    places: float
    """Sequences that a decode worker has room for."""


class Expected(NamedTuple):
    """What would come of it."""

    rate: float
    step_s: float


def fit(demand: Demand, roles: Roles) -> float:
    """By how much longer steps take with these workers, as they are, than the model says; within bounds."""
    said_s = _step_s(demand, roles, demand.rate)
    return 1.0 if said_s >= NEVER_S else min(FIT_MAX, max(1 / FIT_MAX, demand.step_s / max(said_s, 1e-9)))


def expected(demand: Demand, roles: Roles, factor: float = 1.0) -> Expected:
    """Of those numbers of workers, if steps take so many times as long as the model says."""
    traces = demand.rate * (demand.step_s + demand.gap_s)
    low, high = 0.0, traces / max(1e-6, demand.gap_s + factor * demand.output * demand.iteration_s)
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        if rate * (demand.gap_s + factor * _step_s(demand, roles, rate)) < traces:
            low = rate
        else:
            high = rate
    return Expected(low, max(0.0, traces / max(low, 1e-9) - demand.gap_s))


def _step_s(demand: Demand, roles: Roles, rate: float) -> float:
    """What a step takes where so many end in a second."""
    wanted = rate * demand.prompt_s
    helped = min(wanted, FULL * roles.prefills)
    computing = (wanted - helped) / roles.decodes
    if computing >= 1:
        return NEVER_S
    load = helped / roles.prefills if roles.prefills else 0.0
    share = helped / wanted if wanted else 1.0
    prompt_s = demand.prompt_s * (share / (1 - FULL * load) + (1 - share) / (1 - computing))
    # How many decode at once follows from how long they do, which follows from how many do.
    alone_s = demand.output * demand.iteration_s / (1 - computing)
    each = rate * alone_s / roles.decodes
    slope = each * demand.sequence_share
    batch = max(1.0, each * (1 - demand.sequence_share) / (1 - slope)) if slope < 1 else NEVER_S
    if batch > demand.places:
        return NEVER_S
    return prompt_s + alone_s * (1 + demand.sequence_share * (batch - 1))


def in_time(ratios: Sequence[float], slower: float) -> float:
    """The share of steps that would meet their deadlines if each took so many times as long."""
    return sum(ratio * slower <= 1 for ratio in ratios) / len(ratios) if ratios else 1.0


class Pace:
    """How iterations depend on how many sequences decode in them: a line through what workers said of late."""

    def __init__(self) -> None:
        self._weight = self._batch = self._square = self._seconds = self._product = 0.0

    def saw(self, batch: float, decode_s: float) -> None:
        """A worker decodes so many, and says what an iteration takes."""
        values = (1.0, batch, batch * batch, decode_s, batch * decode_s)
        sums = (self._weight, self._batch, self._square, self._seconds, self._product)
        self._weight, self._batch, self._square, self._seconds, self._product = (
            KEEP * kept + new for kept, new in zip(sums, values, strict=True)
        )

    def line(self) -> tuple[float, float]:
        """What an iteration of one sequence takes, and the share that each further one adds."""
        if not self._weight:
            return 0.02, SHARE_ASSUMED
        batch, seconds = self._batch / self._weight, self._seconds / self._weight
        spread = self._square / self._weight - batch * batch
        # What workers say is smoothed, and their sequences come and go: much of what is seen is by chance.
        assumed = SHARE_ASSUMED * seconds / (1 + SHARE_ASSUMED * max(0.0, batch - 1))
        slope = (self._product / self._weight - batch * seconds + ASSUMED * assumed) / (spread + ASSUMED)
        one_s = max(seconds * 0.05, seconds - slope * (batch - 1))
        return one_s, min(SHARE_MAX, max(0.0, slope / one_s))

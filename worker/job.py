"""A sequence that is being extended, and what its owner is told."""

import asyncio
from array import array
from dataclasses import dataclass, field

from tracehaul.engine.base import Guide, Scoring, SequenceId
from tracehaul.engine.history import History
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.steps import FinishReason, Sampling, TokenLogprobs
from worker.meter import Account
from worker.pressure import Arrival


@dataclass(frozen=True)
class Computed:
    """KV of the first ``length`` tokens is in place."""

    length: int


@dataclass(frozen=True)
class Sampled:
    """A new token, the last one of the step where ``reason`` says why."""

    token: int
    reason: FinishReason | None
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Scored:
    """How likely the next known tokens were that the job scores."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Published:
    """The first ``tokens`` can be pulled from the store."""

    tokens: int


@dataclass(frozen=True)
class Written:
    """Nothing more will be published."""


@dataclass(frozen=True)
class Suspended:
    """The job left the loop because others need its memory: it may come back when there is some."""


@dataclass(frozen=True)
class Failed:
    """The job left the loop without finishing."""

    error: ClusterError


Event = Computed | Sampled | Scored | Published | Written | Suspended | Failed


@dataclass
class Job:
    """A sequence being extended. ``tokens`` grows with each sampled one; KV is held for the first ``computed``."""

    arrival: Arrival
    """Its step's place, which no other job in the loop has."""
    came_s: float
    """When it counts as having come."""
    sequence: SequenceId
    tokens: "array[int]"
    sampling: Sampling
    emitted: int
    """Output tokens at the end of ``tokens`` when the job starts, and since."""
    samples_max: int
    """Leave after this many sampled tokens even if the step is not finished; 0 means compute only."""
    computed: int
    deadline_s: float | None = None
    """When it leaves the loop, whatever it has; None: never."""
    scores_top: int | None = None
    """Score the known tokens before ``scores_end``, each with so many of the likeliest; None: none."""
    scores_end: int = 0
    guide: Guide | None = None
    """Of the sampling's constraint, where there is one."""
    account: Account | None = None
    """Who is charged for it; None: nobody."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue[Event])
    """Bounded by what a step can produce: one event for each token and chunk."""
    samples: int = 0
    copying: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who copies the sequence out: it must not grow, which may move it, meanwhile."""

    def __post_init__(self) -> None:
        self.history = History.of(self.sampling, self.tokens, self.emitted)

    def scoring(self, end: int) -> Scoring | None:
        """What to score where the tokens up to ``end`` are computed next."""
        targets = self.tokens[self.computed + 1 : min(end + 1, self.scores_end)]
        return Scoring(targets, self.scores_top) if self.scores_top is not None and targets else None

    def accept(self, token: int, context_max: int) -> FinishReason | None:
        """Append a sampled token; says whether the step ends with it."""
        self.tokens.append(token)
        if self.history is not None:
            self.history.add(token)
        self.emitted += 1
        self.samples += 1
        return self.sampling.finish_reason(token, self.emitted, len(self.tokens), context_max)

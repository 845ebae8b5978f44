"""What was decided for each trace, with what it was decided on. Pure; bounded; the oldest is forgotten first."""

from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec

from router.policy.retention import Retention, Situation
from router.traces.hits import Hits
from router.traces.registry import TraceKey
from tracehaul.wire.ids import NodeId, StepId, TraceId

DECISIONS_MAX = 128
"""Of one trace."""
NODES_MAX = 16
"""Nodes whose load is written down with a decision."""


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """A step was given its places. Tokens are leading ones of its prompt."""

    step: StepId
    decode: NodeId
    reason: str
    prompt_tokens: int
    indexed_tokens: int
    """What the stores were said to hold."""
    warm: NodeId | None
    """The worker that ran the step before, if it kept anything."""
    warm_tokens: int
    expected_tokens: int
    """What was expected to be cached at ``decode``."""
    prefill: NodeId | None
    home: NodeId | None
    running: dict[str, int]
    """Steps in progress on each decode worker that could be chosen."""
    cost_s: float = 0.0
    """What the step was expected to cost there, delays of others included."""
    warm_cost_s: float | None = None
    """And at ``warm``, if that lives."""
    pull_tokens: int | None = None
    """Up to where the store's tokens are pulled, where the rest would come up more slowly than it is computed."""


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """An attempt failed, and the step goes on elsewhere."""

    step: StepId
    decode: NodeId | None
    error: str
    emitted_tokens: int
    """What the client has; never sampled again."""


class Replaced(msgspec.Struct, frozen=True, tag="replaced"):
    """A step leaves the prefill worker where it waits for another place."""

    step: StepId
    prefill: NodeId | None
    wait_s: float
    """Until its prompt would have been computed there."""
    cost_s: float
    """Of all of the step elsewhere."""


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A step ended."""

    step: StepId
    ending: str
    prompt_tokens: int
    output_tokens: int
    seconds: float
    hits: Hits | None


class Retained(msgspec.Struct, frozen=True, tag="retained"):
    """What becomes of its context until the next step. Times in seconds."""

    tools: tuple[str, ...] | None
    """What runs, as far as is known."""
    seen: int
    """Gaps of just this kind that it rests on."""
    median_s: float
    """Expected length of the gap."""
    longest_s: float
    """99 of 100 are shorter."""
    situation: Situation
    retention: Retention


class Recalled(msgspec.Struct, frozen=True, tag="recalled"):
    """Its context was brought back to a worker."""

    decode: NodeId
    why: str
    gained_tokens: int
    tokens: int
    """There now."""
    seconds: float


class Asked(msgspec.Struct, frozen=True, tag="asked"):
    """The client said something of the trace."""

    what: str
    """``suspend``, ``resume``, ``pin`` or ``delete``."""
    inputs: dict[str, float | str | None]


Decision = Placed | Moved | Replaced | Ended | Retained | Recalled | Asked


class Entry(msgspec.Struct, frozen=True):
    """A decision and when it was made, by the router's clock."""

    at_s: float
    decision: Decision


class Decisions:
    """The log, at most ``decisions_max`` of all traces; those of the trace least recently decided on go first."""

    def __init__(self, decisions_max: int) -> None:
        self._max = decisions_max
        self._entries: OrderedDict[TraceKey, deque[Entry]] = OrderedDict()
        self._count = 0
        self.told: Callable[[TraceId, Entry], None] = lambda trace, entry: None
        """Told of each decision as it is made."""

    def __len__(self) -> int:
        return self._count

    def add(self, key: TraceKey, at_s: float, decision: Decision) -> None:
        """Write one down."""
        entry = Entry(at_s, decision)
        entries = self._entries.setdefault(key, deque(maxlen=DECISIONS_MAX))
        self._entries.move_to_end(key)
        before = len(entries)
        entries.append(entry)
        self._count += len(entries) - before
        while self._count > self._max:
            self._count -= len(self._entries.popitem(last=False)[1])
        self.told(key[1], entry)

    def of(self, key: TraceKey) -> list[Entry]:
        """A trace's, the oldest first."""
        return list(self._entries.get(key, ()))

    def forget(self, key: TraceKey) -> None:
        """The trace is gone."""
        self._count -= len(self._entries.pop(key, ()))

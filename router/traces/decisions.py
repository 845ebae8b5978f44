"""What is decided for traces, with what it is decided on. Pure."""

from collections.abc import Mapping
from typing import get_args

import msgspec

from router.policy.retention import Retention, Situation
from router.traces.hits import Hits
from router.traces.rows import Rows, named, packed, unpacked
from tracehaul.wire.ids import NodeId, StepId

DECISIONS_MAX = 128
"""Of one trace; the oldest is forgotten first."""
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
    pool: str = ""
    """Whose workers there were to choose from."""
    waited_s: float = 0.0
    """In the router, for its turn."""


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """An attempt failed, and the step goes on elsewhere."""

    step: StepId
    decode: NodeId | None
    error: str
    emitted_tokens: int
    """What the client has; never sampled again."""


class Replaced(msgspec.Struct, frozen=True, tag="replaced"):
    """A step leaves the worker where it waits for another place."""

    step: StepId
    worker: NodeId | None
    wait_s: float
    """Until it would have been its turn there."""
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
    """``suspend``, ``resume`` or ``pin``."""
    inputs: Mapping[str, int | float | str | None]


Decision = Placed | Moved | Replaced | Ended | Retained | Recalled | Asked


class Entry(msgspec.Struct, frozen=True):
    """A decision and when it was made, by the router's clock."""

    at_s: float
    decision: Decision


KINDS: tuple[type[Decision], ...] = get_args(Decision)


def log_with(log: Rows, entry: Entry) -> Rows:
    """A trace's decisions, with one more."""
    row = packed(entry.decision, KINDS.index(type(entry.decision)), entry.at_s)
    return log.added(row, DECISIONS_MAX)


def entry_of(row: bytes) -> Entry:
    """One of them."""
    number, at_s, *values = unpacked(row)
    kind = KINDS[number]
    return Entry(at_s, msgspec.convert(named(kind, values), kind))

"""Where a step runs. Pure.

Sticky with a limit: a trace goes back to the decode worker that has its context, unless that one has clearly more to
do than the least loaded. A prefill worker is named for each step; the decode worker asks it if, once it has looked,
enough is missing to be worth the hop.
"""

from collections.abc import Sequence

import msgspec

from router.traces import Warm
from tracehaul.wire.hashing import weight
from tracehaul.wire.ids import Generation, NodeId, TraceId


class Candidate(msgspec.Struct, frozen=True):
    """A worker or store node that can be chosen now."""

    node: NodeId
    generation: Generation
    running: int
    """Steps in progress there, by the router's own count."""


class Placement(msgspec.Struct, frozen=True):
    """A decision, with what it was based on."""

    decode: Candidate
    prefill: NodeId | None
    home: NodeId | None
    expected_tokens: int
    """Tokens of the prompt that are expected to be warm there or in the store."""
    reason: str


STICKY_MARGIN = 2
"""Steps that a warm worker may be behind the least loaded one before the trace leaves it."""


def choose_home(stores: Sequence[Candidate], trace: TraceId, current: NodeId | None) -> NodeId | None:
    """The store node that takes a trace's blocks: the one it has, else by rendezvous hashing; None without stores."""
    if any(store.node == current for store in stores):
        return current
    return max(stores, key=lambda store: weight(store.node, trace)).node if stores else None


def _least_loaded(nodes: Sequence[Candidate], key: str) -> Candidate:
    """Ties are spread by the key, not by name, so that idle workers share traces."""
    return min(nodes, key=lambda node: (node.running, weight(node.node, key)))


def place(
    *,
    trace: TraceId,
    prompt_tokens: int,
    stored_tokens: int,
    warm: Warm | None,
    home: NodeId | None,
    decodes: Sequence[Candidate],
    prefills: Sequence[Candidate],
    stores: Sequence[Candidate],
    asked: bool = False,
    avoided: bool = False,
) -> Placement | None:
    """Choose the workers of one step; None if there is no decode worker.

    ``stored_tokens`` is the prompt's leading run in the store, ``warm.retained_tokens`` what its last worker kept.
    ``asked``: the caller named the worker, the only one of ``decodes``. ``avoided``: the warm one failed this step.
    """
    if not decodes:
        return None
    least = _least_loaded(decodes, trace)
    decode, reason = least, "asked for" if asked else "least loaded"
    warm_tokens = 0
    if warm is not None:
        sticky = next((d for d in decodes if (d.node, d.generation) == (warm.node, warm.generation)), None)
        if sticky is None and not asked:
            reason = "its worker failed it" if avoided else "its worker is gone"
        elif sticky is None:
            pass
        elif sticky.running > least.running + STICKY_MARGIN:
            reason = "its worker is busy"
        else:
            decode, reason = sticky, "warm"
            warm_tokens = min(warm.retained_tokens, prompt_tokens)
    expected = max(stored_tokens, warm_tokens)
    # Without a store there is no way from there to here: the decode worker would compute all of it once more.
    prefill = _least_loaded(prefills, trace).node if prefills and stores else None
    return Placement(decode, prefill, choose_home(stores, trace, home), expected, reason)

"""Where a step runs. Pure.

By cost: the decode worker where it costs the fewest seconds, all others' delays included; the one that has the trace's
context keeps it unless another is clearly cheaper. Beside that the rules that it is measured against: round-robin, and
sticky, where a trace never leaves its worker.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from router.fleet.load import Column, Key, Warm, WorkerTable
from router.policy.cost import OUTPUT_TOKENS, Costs, Need, StoredRun, decode_costs, prefill_s
from router.policy.knobs import DEFAULT, Knobs
from tracehaul.wire.hashing import weight
from tracehaul.wire.ids import NodeId, TraceId

Policy = Literal["cost", "sticky", "round-robin"]

MOVE_MARGIN = 0.7
"""A prompt that waits is taken elsewhere if that costs at most this share of its waiting, past and to come: what it has
waited shows how far the estimates can be trusted, and bounds what waiting on can lose."""
SOON_SHARE = 0.5
"""It stays if it is expected to wait for less than this share of that cost."""
TIE_SHARE = 0.02
"""Costs that are this close count as equal: estimates are no better."""


class Ask(msgspec.Struct, frozen=True):
    """A step that wants a place."""

    trace: TraceId
    prompt_tokens: int
    stored: Sequence[StoredRun]
    """The prompt's leading run in the store."""
    warm: Warm | None
    """Who ran the trace's last step, and what it kept of this prompt."""
    home: NodeId | None
    predicted: Mapping[NodeId, int] = {}
    """Leading tokens that workers are about to have computed for other steps."""
    avoided: frozenset[Key] = frozenset()
    """Workers that failed this step: chosen if there is no other."""
    unable: frozenset[Key] = frozenset()
    """Workers that cannot do it: never chosen."""
    left: frozenset[Key] = frozenset()
    """Workers that it does not wait for any more: no prefill worker of them is chosen, and a decode worker if there is
    no other."""
    begun: NodeId | None = None
    """The worker that has said the beginning of its answer."""
    asked: NodeId | None = None
    """The worker that the caller wants."""
    turn: int = 0
    """Counts the fleet's steps, for round-robin."""
    output_tokens: float = OUTPUT_TOKENS
    """What steps have generated of late, on the mean."""


class Placement(msgspec.Struct, frozen=True):
    """A decision, with what it was based on."""

    decode: Key
    helper: Key | None
    """The prefill worker that computes what is missing, if that is more than the decode worker computes itself."""
    home: NodeId | None
    expected_tokens: int
    """Leading tokens of the prompt that are expected to be warm there or pulled from the store."""
    pull_tokens: int | None
    """Leading tokens of the store that are worth pulling; None for all that it has by then."""
    reason: str
    cost_s: float
    """Of the step there, all in all."""
    warm_cost_s: float | None
    """Of the step on the worker that has its context, if that lives."""
    decode_work_s: float
    """Computing that the decode worker is expected to do, and for how long others wait for the step's memory there."""
    prefill_work_s: float
    holds: bool = False
    """Steps wait for memory at the decode worker until others have ended."""

    @property
    def prefill(self) -> NodeId | None:
        """The helper's name."""
        return None if self.helper is None else self.helper.node

    @property
    def queued(self) -> Key | None:
        """The helper, if it has more than next to nothing to compute: there the prompt may wait for others."""
        return self.helper if self.prefill_work_s else None

    @property
    def waits_at(self) -> tuple[Key, float] | None:
        """Where the step may have to wait before anything is told of it, and what it is to that worker, in seconds."""
        if self.queued is not None:
            return self.queued, self.prefill_work_s
        return (self.decode, self.decode_work_s) if self.holds else None

    @property
    def computes(self) -> NodeId | None:
        """Who computes what is missing; None if that is next to nothing."""
        if self.prefill_work_s:
            return self.prefill
        return self.decode.node if self.decode_work_s and self.helper is None else None


def choose_home(stores: Sequence[NodeId], trace: TraceId, current: NodeId | None) -> NodeId | None:
    """The store node that takes a trace's blocks: the one it has, else by rendezvous hashing; None without stores."""
    if current in stores:
        return current
    return max(stores, key=lambda store: weight(store, trace)) if stores else None


def place(
    policy: Policy,
    ask: Ask,
    decodes: WorkerTable,
    prefills: WorkerTable,
    stores: Sequence[NodeId],
    now_s: float,
    knobs: Knobs = DEFAULT,
) -> Placement | None:
    """Choose the workers of one step; None if there is no decode worker for it. Without a store there is no way from
    prefill to decode: the decode worker computes all that it lacks."""
    allowed = _allowed(ask, decodes)
    if not allowed:
        return None
    helpers = prefills if len(prefills) and stores else None
    need = Need(
        prompt=ask.prompt_tokens,
        runs=ask.stored if stores else (),
        warm=min(ask.warm.retained_tokens, ask.prompt_tokens) if ask.warm is not None else 0,
        under_way=min(max(ask.predicted.values(), default=0), ask.prompt_tokens),
        output=ask.output_tokens,
    )
    warm_row = decodes.rows.get(Key(ask.warm.node, ask.warm.generation)) if ask.warm is not None else None
    # Where memory is short, what is decoded sooner frees it sooner: that is worth what sharing cores costs.
    busy = float(np.mean((decodes.running_steps > 0) & (decodes.free_tokens >= need.prompt)))
    helper, prefilled_s, helper_work_s = _best_prefill(policy, ask, need, helpers, busy, now_s)
    costs = decode_costs(decodes, need, warm_row, _predicted(ask, decodes), prefilled_s, now_s, knobs)
    row, reason = _choose(policy, ask, decodes, costs, allowed, warm_row, knobs.sticky_margin)
    reach = float(costs.reach[row])
    short = need.prompt - reach <= float(decodes.local_tokens[row])
    if policy == "cost" and costs.local[row] and not short:
        helper = None
    alone = helper is None or short
    return Placement(
        decode=decodes.keys[row],
        helper=helper,
        home=choose_home(stores, ask.trace, ask.home),
        expected_tokens=int(reach),
        pull_tokens=None if costs.pull[row] == need.stored else int(costs.pull[row]),
        reason=reason,
        cost_s=float(costs.seconds[row]),
        warm_cost_s=float(costs.seconds[warm_row]) if warm_row is not None else None,
        decode_work_s=(float(costs.own_s[row]) if alone else 0.0) + float(costs.held_s[row]),
        prefill_work_s=0.0 if alone else helper_work_s,
        holds=bool(decodes.held_tokens[row]),
    )


def relieves(other: Placement, wait_s: float, waited_s: float) -> bool:
    """Whether a step that has waited, and still waits for so long until its prompt is computed, should go elsewhere."""
    return other.cost_s < min(MOVE_MARGIN * (wait_s + waited_s), wait_s / SOON_SHARE)


def _allowed(ask: Ask, decodes: WorkerTable) -> list[int]:
    """Rows that may be chosen: none only if none can do it."""
    rows: Sequence[int] = range(len(decodes))
    if ask.unable:
        rows = [row for row in rows if decodes.keys[row] not in ask.unable]
    left = ask.left if ask.asked is None else frozenset[Key]()  # who wants that worker waits for it
    for unwanted in (left, ask.avoided):
        if unwanted:
            rows = [row for row in rows if decodes.keys[row] not in unwanted] or rows
    for node in (ask.begun, ask.asked):
        if node is not None:
            rows = [row for row in rows if decodes.keys[row][0] == node] or rows
    return list(rows)


def _predicted(ask: Ask, workers: WorkerTable) -> Column:
    """Leading tokens of the prompt that each of them is about to have."""
    predicted = np.zeros(len(workers))
    for row, (node, _) in enumerate(workers.keys) if ask.predicted else ():
        predicted[row] = min(ask.predicted.get(node, 0), ask.prompt_tokens)
    return predicted


def _best_prefill(
    policy: Policy, ask: Ask, need: Need, prefills: WorkerTable | None, busy: float, now_s: float
) -> tuple[Key | None, float | None, float]:
    """Who would compute what is missing; its cost: until it is done, and what others lose; and its computing."""
    rows = np.arange(len(prefills) if prefills is not None else 0)
    if ask.left and prefills is not None:
        rows = rows[[key not in ask.left for key in prefills.keys]]
    if prefills is None or not len(rows):
        return None, None, 0.0
    there = prefill_s(prefills, need, _predicted(ask, prefills), busy, now_s)
    cost_s = there.done_s + there.lost_s
    row = _lowest(cost_s if policy == "cost" else prefills.running_steps, rows, ask.trace)
    return prefills.keys[row], float(cost_s[row]), float(there.own_s[row])


def _choose(
    policy: Policy,
    ask: Ask,
    decodes: WorkerTable,
    costs: Costs,
    allowed: list[int],
    warm_row: int | None,
    sticky_margin: float,
) -> tuple[int, str]:
    if ask.asked is not None and decodes.keys[allowed[0]][0] == ask.asked:
        return allowed[0], "asked for"
    if ask.begun is not None and decodes.keys[allowed[0]][0] == ask.begun:
        return allowed[0], "its answer has begun there"
    if policy == "round-robin":
        return allowed[ask.turn % len(allowed)], "its turn"
    by = costs.seconds if policy == "cost" else decodes.running_steps
    best = _lowest(by, np.asarray(allowed), ask.trace)
    if warm_row is None or ((ask.avoided or ask.unable) and warm_row not in allowed):
        if ask.warm is None:
            return best, "cheapest" if policy == "cost" else "least loaded"
        if warm_row is not None and decodes.keys[warm_row] in ask.unable:
            return best, "its worker cannot do it"
        failed = (ask.warm.node, ask.warm.generation) in ask.avoided
        return best, "its worker failed it" if failed else "its worker is gone"
    if policy == "sticky" or (1 - sticky_margin) * costs.seconds[warm_row] <= costs.seconds[best]:
        return warm_row, "warm"
    return best, "cheaper than its own worker"


def _lowest(by: Column, rows: "np.ndarray[tuple[int], np.dtype[np.intp]]", trace: TraceId) -> int:
    """The row with the lowest figure; ties are spread by the trace, so that idle workers share traces."""
    figures = by[rows]
    least = float(figures.min())
    ties = rows[figures <= least + TIE_SHARE * abs(least)]
    return int(ties[int.from_bytes(weight(NodeId(""), trace), "big") % len(ties)])

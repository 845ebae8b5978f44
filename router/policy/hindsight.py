"""Decisions that were written down, made anew: what another policy would have done with the same steps. Pure.

Each step is placed once more, by the router's own :func:`place`, among the workers as they were when it came. What the
other policy did with the steps before is followed: where it put a trace's last step is where the trace's context is,
and a step that it put elsewhere is work there, not where it was, until the step ended in fact. What that would have
changed in what others took, or in what was evicted, nobody knows: all seconds are those that were expected.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from router.fleet.load import FIGURES, Key, Row, Warm, WorkerTable
from router.policy.knobs import DEFAULT, Knobs
from router.policy.placement import Ask, Placement, Policy, place
from tracehaul.wire.ids import NodeId, StepId

ROWS_MAX = 16
"""Workers of a role that are written down with a decision."""


class Priced(msgspec.Struct, frozen=True, tag="priced", omit_defaults=True):
    """What a step was placed on, and where."""

    step: StepId
    ask: Ask
    policy: Policy
    decodes: list[Row]
    prefills: list[Row]
    stores: list[NodeId]
    now_s: float
    """By the router's clock."""
    placement: Placement
    knobs: Knobs = DEFAULT
    pool: str = ""


def priced(
    step: StepId,
    ask: Ask,
    policy: Policy,
    decodes: WorkerTable,
    prefills: WorkerTable,
    stores: Sequence[NodeId],
    now_s: float,
    placement: Placement,
    knobs: Knobs,
    pool: str = "",
) -> Priced:
    """Of a decision: with all workers, or, where there are many, those that have the least to do, the one that was
    chosen, and the one that has the trace's context."""
    warm = None if ask.warm is None else _key(ask.warm)
    return Priced(
        step,
        ask,
        policy,
        _rows(decodes, (placement.decode, warm)),
        _rows(prefills, (placement.helper,)),
        list(stores[:ROWS_MAX]),
        now_s,
        placement,
        knobs,
        pool,
    )


def _rows(table: WorkerTable, wanted: Sequence[Key | None]) -> list[Row]:
    if len(table) <= ROWS_MAX:
        return table.written(range(len(table)))
    must = [table.rows[key] for key in wanted if key is not None and key in table.rows]
    least = np.argpartition(table.running_steps, ROWS_MAX)[:ROWS_MAX].tolist()
    return table.written(sorted(set(must + least)))


class Ended(NamedTuple):
    """A step has."""

    step: StepId
    output_tokens: int


class Redone(msgspec.Struct, frozen=True):
    """One decision, as it was and as it would have been."""

    step: StepId
    trace: str
    was: Placement
    would: Placement
    prompt_tokens: int
    again: bool
    """The policy that was in force chooses the same again: what was written down is enough."""

    @property
    def differs(self) -> bool:
        """It would have run elsewhere, or its prompt would have been computed elsewhere."""
        return (self.was.decode, self.was.queued) != (self.would.decode, self.would.queued)


@dataclass
class _Open:
    """A step that goes on."""

    trace: tuple[str, str]
    redone: Redone
    since_s: float


@dataclass
class Hindsight:
    """Goes through a log once."""

    policy: Policy
    knobs: Mapping[str, float] = field(default_factory=dict[str, float])
    """Those that are not as they were."""
    _open: dict[StepId, _Open] = field(default_factory=dict[StepId, _Open])
    _left: dict[tuple[str, str], tuple[Redone, Warm]] = field(
        default_factory=dict[tuple[str, str], tuple[Redone, Warm]]
    )
    """Where each trace's last step went, and what it leaves there."""
    _turn: int = 0

    def placed(self, salt: str, one: Priced) -> Redone | None:
        """A step came. None if nobody could do it, or a router of another version wrote it down."""
        if any(len(row.figures) != FIGURES for row in (*one.decodes, *one.prefills)):
            return None
        trace = (salt, one.ask.trace)
        self._turn += 1
        knobs = msgspec.structs.replace(one.knobs, **self.knobs)
        ask = msgspec.structs.replace(one.ask, warm=self._warm(trace, one.ask), turn=self._turn)
        would = self._place(one, ask, knobs, self._shifted(one))
        same = self._place(one, one.ask, one.knobs, _tables(one), one.policy)
        if would is None or same is None:
            return None
        redone = Redone(
            one.step, one.ask.trace, one.placement, would, one.ask.prompt_tokens, same.decode == one.placement.decode
        )
        self._open[one.step] = _Open(trace, redone, one.now_s)
        return redone

    def ended(self, step: Ended) -> None:
        """A step that was placed has ended."""
        done = self._open.pop(step.step, None)
        if done is not None:
            node, generation = done.redone.would.decode
            left = Warm(node, generation, done.redone.prompt_tokens + step.output_tokens - 1)
            self._left[done.trace] = (done.redone, left)

    def _warm(self, trace: tuple[str, str], ask: Ask) -> Warm | None:
        """Who would have the context: as it was, where the trace's last step would have gone where it went."""
        if trace not in self._left:
            return ask.warm
        before, left = self._left[trace]
        if before.was.decode == _key(left):
            return ask.warm
        # As much of the prompt as was kept of it where it was; all that was said to be had, if nothing was.
        kept = ask.warm.retained_tokens if ask.warm is not None else 0
        had = max((run.end for run in ask.stored), default=0)
        return Warm(left.node, left.generation, min(left.retained_tokens, kept or had))

    def _shifted(self, one: Priced) -> tuple[WorkerTable, WorkerTable]:
        """The workers, with what would have gone elsewhere there."""
        decodes, prefills = _tables(one)
        for step in self._open.values():
            was, would = step.redone.was, step.redone.would
            if not step.redone.differs:
                continue
            computing = one.now_s < step.since_s + would.cost_s
            tokens = step.redone.prompt_tokens
            for key, work_s, sign in (
                (was.decode, was.decode_work_s, -1),
                (would.decode, would.decode_work_s, 1),
            ):
                left_s = work_s if computing else 0.0
                _shift(decodes, key, left_s, sign, one.now_s, decoding=not computing, tokens=tokens)
            for key, work_s, sign in ((was.queued, was.prefill_work_s, -1), (would.queued, would.prefill_work_s, 1)):
                if key is not None and computing:
                    _shift(prefills, key, work_s, sign, one.now_s, decoding=False)
        return decodes, prefills

    def _place(
        self,
        one: Priced,
        ask: Ask,
        knobs: Knobs,
        tables: tuple[WorkerTable, WorkerTable],
        policy: Policy | None = None,
    ) -> Placement | None:
        if not len(tables[0]):
            return None
        return place(policy or self.policy, ask, *tables, one.stores, one.now_s, knobs)


def _key(warm: Warm) -> Key:
    return Key(warm.node, warm.generation)


def _tables(one: Priced) -> tuple[WorkerTable, WorkerTable]:
    return WorkerTable.read(one.decodes), WorkerTable.read(one.prefills)


def _shift(
    table: WorkerTable, key: Key, work_s: float, sign: int, now_s: float, *, decoding: bool, tokens: int = 0
) -> None:
    """A step more there, or one less, if that worker was written down and has one."""
    if key not in table.rows:
        return
    if sign > 0:
        table.sent(key, work_s, now_s, tokens)
        if decoding:
            table.computed(key, 0.0, now_s)
        return
    row = table.rows[key]
    has = table.decoding[row] if decoding else table.running_steps[row] - table.decoding[row]
    if has > 0:
        table.ended(key, work_s, computed=decoding, tokens=min(tokens, table.sent_tokens[row]))


class Summary(msgspec.Struct, frozen=True):
    """One policy's figures over a log. Of the busiest worker: its share of all steps."""

    steps: int
    stays: float
    """Share of steps on the worker that had their trace's context, of those whose trace had one."""
    cost_s: float
    """Expected of a step on the mean."""
    cost_p95_s: float
    cached: float
    """Share of prompt tokens that were expected to be cached."""
    helped: float
    """Share of steps whose prompts are computed by prefill workers."""
    busiest: float


def summary(redone: Sequence[Redone], would: bool) -> Summary:
    """Of one side; there must be one decision."""
    sides = [one.would if would else one.was for one in redone]
    costs = np.array([side.cost_s for side in sides])
    on = np.unique([side.decode.node for side in sides], return_counts=True)[1]
    returning = [side for side in sides if side.warm_cost_s is not None]
    stays = sum(side.warm_cost_s == side.cost_s for side in returning)
    return Summary(
        len(sides),
        stays / max(1, len(returning)),
        float(costs.mean()),
        float(np.quantile(costs, 0.95)),
        sum(side.expected_tokens for side in sides) / max(1, sum(one.prompt_tokens for one in redone)),
        sum(side.queued is not None for side in sides) / len(sides),
        float(on.max()) / len(sides),
    )


def through(log: Iterable[tuple[str, Priced | Ended]], policy: Policy, knobs: Mapping[str, float]) -> list[Redone]:
    """All of a log's decisions made anew, in its order; each with its trace's salt."""
    hindsight = Hindsight(policy, knobs)
    found: list[Redone] = []
    for salt, one in log:
        if isinstance(one, Ended):
            hindsight.ended(one)
        elif (redone := hindsight.placed(salt, one)) is not None:
            found.append(redone)
    return found

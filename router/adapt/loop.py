"""One pool's loop: looks, proposes at most one change, waits, and judges it by what came of it. Pure.

A change is proposed when the model (:mod:`router.adapt.model`) has foretold a gain several times in a row. Afterwards
the objective is compared with what it was: steps that end in time, per second; where that is the same, what a step
takes. A gain that did not come is taken back, and the same is not tried again for a while that doubles each time,
unless the work has become another: then nothing is concluded. Nor is it where anything seen is old, or a node is about
to change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from router.adapt.model import FULL, Demand, Pace, Roles, expected, fit, in_time
from router.adapt.window import PLAIN, Window, Work, another, gained
from tracehaul.wire.ids import NodeId

LOOK_S = 8.0
"""Of the past that a proposal rests on."""
LOOK_MAX_S = 24.0
"""The same, where the work was the same before."""
LATE_LOOKS = 3.0
"""Who has not looked for so many times its turn stood still, or had nothing to look at: it begins anew."""
STREAK = 3
"""Looks in a row that must foretell the same."""
SETTLE_S = 2.0
"""After a change nothing counts for so long, or for as long as a step takes: what was under way began before it."""
JUDGE_MIN_S, JUDGE_MAX_S = 6.0, 16.0
"""So long the outcome is looked at, or for one and two steps: less where it is plain."""
STEP_MAX_S = 40.0
"""As if no step took longer."""
MORE_LOOKING = 2.0
"""So many times as long where the error is as large as what was foretold."""
SHARE_OF_GAIN = 0.25
"""Of what was foretold at least so much must have come."""
QUICKER = 0.1
"""Where as much is done, by so much less a step must take."""
MISSED, HOPED_MAX = 0.12, 0.4
"""Where so many steps come too late a change is tried that means do not tell: more prefill workers where these have
more to compute than they can, more decode workers else. So much is hoped for at most; more than chance must come."""
HOPE_S = 16.0
"""After so long of the same: where work has just begun, much comes too late by chance."""
BARRED_S, BARRED_MAX_S = 60.0, 960.0
OWED_S = 60.0
"""What cannot be taken back for so long stays as it is."""
STEPS_MIN = 8
"""Fewer say nothing."""

Positive = Annotated[float, Meta(gt=0)]


class AdaptConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the loop that adapts the fleet."""

    enabled: bool = False
    every_s: Annotated[float, Meta(ge=0.5)] = 2.0
    gain_min: Positive = 0.15
    """Less is not worth a change."""
    pause_s: Positive = 4.0
    """After a change was judged, before the next one."""


class Seat(NamedTuple):
    """A worker that could take the other role."""

    node: NodeId
    running: int


class View(NamedTuple):
    """A pool as of now."""

    now_s: float
    sure: bool
    """All of it was heard of just now, and nobody changes, joins or leaves."""
    roles: Roles
    paces: tuple[tuple[int, float], ...]
    """Of each decode worker that decodes: sequences, and what an iteration takes."""
    places: float
    """Sequences that a decode worker has room for."""
    to_decode: tuple[Seat, ...] = ()
    """Prefill workers that may become decode workers now."""
    to_prefill: tuple[Seat, ...] = ()
    seen: float = 1.0
    """The share of what the pool does that is counted here; the rest is other routers'."""


class Change(msgspec.Struct, frozen=True, tag="change"):
    """What is to be done, and why."""

    number: int
    node: NodeId
    role: Literal["prefill", "decode"]
    """That it is to have."""
    foretold: float
    """Of the objective, as a share; of what a step takes, where ``quicker``."""
    quicker: bool
    inputs: Mapping[str, float]
    undoes: int | None = None
    """The change that it takes back."""
    hoped: bool = False
    """The model does not tell the gain."""


class Verdict(msgspec.Struct, frozen=True, tag="verdict"):
    """What came of a change."""

    number: int
    node: NodeId
    outcome: Literal["kept", "in vain", "unclear", "refused"]
    why: str
    foretold: float = 0.0
    measured: float = 0.0
    error: float = 0.0
    step_s: tuple[float, float] = (0.0, 0.0)
    """What a step took, before and after."""


Direction = Literal["prefill", "decode"]


class _Gain(NamedTuple):
    """What a change would bring."""

    role: Direction
    share: float
    quicker: bool = False
    """It is in what a step takes."""
    hoped: bool = False
    """The model does not tell it."""


@dataclass
class _Trial:
    change: Change
    before: Work
    landed_s: float | None = None
    spoiled: str = ""
    """Why it can prove nothing."""


@dataclass
class _Bar:
    until_s: float
    length_s: float
    work: Work


class Loop:
    """Of one pool. ``told`` hears of each change and verdict."""

    def __init__(self, config: AdaptConfig, told: Callable[[Change | Verdict], None]) -> None:
        self._config = config
        self._told = told
        self.window = Window()
        self._pace = Pace()
        self._trial: _Trial | None = None
        self._undoing: Change | None = None
        self._owed: tuple[Change, float] | None = None
        """A change that is to be taken back as soon as that may be, and until when."""
        self._streak: tuple[Direction, int] | None = None
        self._bars: dict[Direction, _Bar] = {}
        self._quiet_until_s = 0.0
        self._sure_since_s: float | None = None
        self._looked_s = 0.0
        self._count = 0
        self._step_s = 0.0
        """What steps took when that was looked at last."""

    @property
    def busy(self) -> bool:
        """A change is under way, or not judged yet."""
        return self._trial is not None or self._undoing is not None or self._owed is not None

    def look(self, view: View) -> Change | None:
        """Time has passed. What is to be done now, if anything: to be answered by :meth:`done`."""
        late, self._looked_s = view.now_s - self._looked_s > LATE_LOOKS * self._config.every_s, view.now_s
        if not view.sure:
            self._streak, self._sure_since_s = None, None
            return None
        if late:
            self._streak, self._sure_since_s = None, None
        if self._sure_since_s is None:
            self._sure_since_s = view.now_s
        for batch, decode_s in view.paces:
            self._pace.saw(batch, decode_s)
        if self._undoing is not None:
            return None
        if self._trial is not None:
            return self._judge(self._trial, view)
        if self._owed is not None:
            return self._take_back(*self._owed, view)
        return self._propose(view)

    def done(self, change: Change, now_s: float, refused: str = "") -> None:
        """It was carried out; or not, and why."""
        if self._undoing is change:
            self._undoing = None
            self._rest(now_s)
            if refused:
                self._told(Verdict(change.number, change.node, "refused", refused))
            else:
                self._owed = None
            return
        trial = self._trial
        if trial is None or trial.change is not change:
            return
        if refused:
            self._trial = None
            self._bar(change.role, trial.before, now_s)
            self._rest(now_s)
            self._told(Verdict(change.number, change.node, "refused", refused, change.foretold))
        elif trial.spoiled:
            self._trial = None
            self._told(Verdict(change.number, change.node, "unclear", trial.spoiled, change.foretold))
        else:
            trial.landed_s = now_s

    def disturbed(self, why: str) -> None:
        """The pool has become another, and not by this loop: what is on trial proves nothing."""
        self._streak, self._sure_since_s, self._owed = None, None, None
        trial = self._trial
        if trial is None:
            return
        if trial.landed_s is None:
            trial.spoiled = why
            return
        self._trial = None
        self._told(Verdict(trial.change.number, trial.change.node, "unclear", why, trial.change.foretold))

    # --- proposing ------------------------------------------------------------------------------------------------

    def _propose(self, view: View) -> Change | None:
        assert self._sure_since_s is not None
        now_s = view.now_s
        since_s = max(now_s - max(LOOK_S, self._step_s), self._sure_since_s)
        work = self.window.over(since_s, now_s)
        if work is not None:
            self._step_s = min(STEP_MAX_S, work.step_s)
        if work is None or work.ended < STEPS_MIN or not view.roles.decodes or not self.window.steady(since_s, now_s):
            self._streak = None
            return None
        work = self.window.reaching_back(work, since_s, now_s, LOOK_S, max(self._sure_since_s, now_s - LOOK_MAX_S))
        demand = self._demand(work, view)
        best = max(self._foretold(demand, work, view), key=lambda one: one.share, default=None)
        if best is None or best.share < self._config.gain_min:
            self._streak = None
            return None
        role = best.role
        count = self._streak[1] + 1 if self._streak is not None and self._streak[0] == role else 1
        self._streak = (role, count)
        if count < STREAK or now_s < self._quiet_until_s:
            return None
        seats = view.to_decode if role == "decode" else view.to_prefill
        node = min(seats, key=lambda seat: (seat.running, seat.node)).node
        self._count += 1
        self._streak = None
        inputs = {name: round(float(value), 6) for name, value in demand._asdict().items()}
        inputs |= {"prefills": view.roles.prefills, "decodes": view.roles.decodes, "in_time": in_time(work.ratios, 1.0)}
        change = Change(self._count, node, role, best.share, best.quicker, inputs, hoped=best.hoped)
        self._trial = _Trial(change, work)
        self._told(change)
        return change

    def _demand(self, work: Work, view: View) -> Demand:
        iteration_s, share = self._pace.line()
        return Demand(
            rate=work.ended / work.seconds / view.seen,
            step_s=work.step_s,
            gap_s=work.gap_s,
            prompt_s=work.prompt_s,
            output=work.output,
            iteration_s=iteration_s,
            sequence_share=share,
            places=max(1.0, view.places),
        )

    def _foretold(self, demand: Demand, work: Work, view: View) -> list[_Gain]:
        """For each direction."""
        roles, found = view.roles, list[_Gain]()
        factor = fit(demand, roles)
        now = expected(demand, roles, factor)
        met = max(in_time(work.ratios, 1.0), 1e-3)
        spills = demand.rate * demand.prompt_s > FULL * roles.prefills
        candidates: list[tuple[Direction, Roles]] = []
        if view.to_decode and roles.prefills > 1:
            candidates.append(("decode", Roles(roles.prefills - 1, roles.decodes + 1)))
        if view.to_prefill and roles.decodes > 1:
            candidates.append(("prefill", Roles(roles.prefills + 1, roles.decodes - 1)))
        for role, other in candidates:
            if self._barred(role, work, view.now_s):
                continue
            then = expected(demand, other, factor)
            gain = then.rate * in_time(work.ratios, then.step_s / max(now.step_s, 1e-9)) / (now.rate * met) - 1
            if gain >= self._config.gain_min:
                found.append(_Gain(role, gain))
            elif work.seconds >= HOPE_S and 1 - met > MISSED and role == ("prefill" if spills else "decode"):
                found.append(_Gain(role, min(HOPED_MAX, 1 / met - 1), hoped=True))
            elif gain > -0.01 and 1 - then.step_s / max(now.step_s, 1e-9) > 2 * self._config.gain_min:
                found.append(_Gain(role, 1 - then.step_s / now.step_s, quicker=True))
        return found

    # --- judging --------------------------------------------------------------------------------------------------

    def _judge(self, trial: _Trial, view: View) -> Change | None:
        if trial.landed_s is None:
            return None
        assert self._sure_since_s is not None
        step_s = min(STEP_MAX_S, trial.before.step_s)
        since_s = max(trial.landed_s + max(SETTLE_S, step_s), self._sure_since_s)
        most_s = max(JUDGE_MAX_S, 2 * step_s)
        work = self.window.over(since_s, view.now_s)
        waited_s = view.now_s - since_s
        if work is None:
            # Nothing ends any more: that may be the change, or the end of the work.
            if waited_s <= 2 * most_s:
                return None
            if self.window.any_missed(since_s, view.now_s):
                return self._end(trial, None, view, "in vain", "no step ends in time any more")
            return self._end(trial, None, view, "unclear", "nothing ended")
        if waited_s < max(JUDGE_MIN_S, step_s):
            return None
        before, change = trial.before, trial.change
        measured, error = gained(before, work)
        if another(before, work):
            if measured < 0:
                return self._end(trial, work, view, "in vain", "the work has become another, and less is done")
            return self._end(trial, work, view, "unclear", "the work has become another")
        if measured > PLAIN * error and measured > 0:
            return self._end(trial, work, view, "kept", "more is done")
        if measured < -PLAIN * error:
            return self._end(trial, work, view, "in vain", "less is done")
        if waited_s < most_s * (MORE_LOOKING if error > change.foretold else 1.0):
            return None
        if not change.quicker and measured >= (error if change.hoped else SHARE_OF_GAIN * change.foretold):
            return self._end(trial, work, view, "kept", "more is done")
        if not change.hoped and measured > -error and work.step_s < (1 - QUICKER) * before.step_s:
            return self._end(trial, work, view, "kept", "as much is done, in less time each")
        return self._end(trial, work, view, "in vain", "the gain did not come")

    def _end(
        self,
        trial: _Trial,
        work: Work | None,
        view: View,
        outcome: Literal["kept", "in vain", "unclear"],
        why: str,
    ) -> Change | None:
        change, before, self._trial = trial.change, trial.before, None
        verdict = Verdict(change.number, change.node, outcome, why, change.foretold)
        if work is not None:
            verdict = msgspec.structs.replace(
                verdict,
                measured=gained(before, work)[0],
                error=gained(before, work)[1],
                step_s=(before.step_s, work.step_s),
            )
        self._told(verdict)
        self._rest(view.now_s)
        if outcome != "in vain":
            # To go back at once would be to go to and fro.
            opposite: Direction = "prefill" if change.role == "decode" else "decode"
            if outcome == "kept":
                self._bars.pop(change.role, None)
                self._bar(opposite, work or before, view.now_s)
            return None
        self._bar(change.role, before, view.now_s)
        self._owed = change, view.now_s + OWED_S
        return self._take_back(*self._owed, view)

    def _take_back(self, change: Change, until_s: float, view: View) -> Change | None:
        """A change that was in vain, once its worker may have its former role."""
        back: Direction = "prefill" if change.role == "decode" else "decode"
        seats = view.to_prefill if back == "prefill" else view.to_decode
        if view.now_s > until_s:
            self._owed = None
        if self._owed is None or not any(seat.node == change.node for seat in seats):
            return None
        self._count += 1
        undo = Change(self._count, change.node, back, 0.0, quicker=False, inputs={}, undoes=change.number)
        self._undoing = undo
        self._told(undo)
        return undo

    def _rest(self, now_s: float) -> None:
        self._quiet_until_s = now_s + self._config.pause_s

    def _bar(self, role: Direction, work: Work, now_s: float) -> None:
        """Not again for a while, with such work."""
        before = self._bars.get(role)
        again = before is not None and not another(before.work, work)
        length_s = min(BARRED_MAX_S, 2 * before.length_s) if again and before is not None else BARRED_S
        self._bars[role] = _Bar(now_s + length_s, length_s, work)

    def _barred(self, role: Direction, work: Work, now_s: float) -> bool:
        bar = self._bars.get(role)
        return bar is not None and now_s < bar.until_s and not another(bar.work, work)

"""The loop over plants whose answer to a change is known: it finds what helps, takes back what does not, stays where
nothing does, and does nothing on what it does not know."""

import random
from collections.abc import Callable

import pytest

from router.adapt.loop import BARRED_S, JUDGE_MAX_S, LOOK_S, AdaptConfig, Change, Loop, Seat, Verdict, View
from router.adapt.model import Demand, Roles, expected
from router.adapt.window import Ended, Window
from tracehaul.wire.ids import NodeId

CONFIG = AdaptConfig(enabled=True, gain_min=0.08)
ANSWERS = Demand(
    rate=6.0, step_s=8.0, gap_s=1.0, prompt_s=0.05, output=400, iteration_s=0.01, sequence_share=0.1, places=1e6
)
PROMPTS = Demand(
    rate=4.0, step_s=8.0, gap_s=1.0, prompt_s=1.2, output=20, iteration_s=0.01, sequence_share=0.1, places=1e6
)
IDLE = Demand(
    rate=2.0, step_s=0.5, gap_s=9.0, prompt_s=0.01, output=40, iteration_s=0.01, sequence_share=0.1, places=1e6
)

Plant = Callable[[float, Roles], Demand]
"""What is asked of such workers at that time, with how many steps end and how long one takes."""


def modelled(demand: Demand) -> Plant:
    """One that does as the model says."""

    def plant(now_s: float, roles: Roles) -> Demand:
        found = expected(demand, roles)
        return demand._replace(rate=found.rate, step_s=found.step_s)

    return plant


class Fleet:
    """A pool of eight, second by second."""

    def __init__(self, plant: Plant, prefills: int, noise: float = 0.1, seed: int = 1) -> None:
        self.plant = plant
        self.roles = Roles(prefills, 8 - prefills)
        self.now_s = 0.0
        self.told: list[Change | Verdict] = []
        self.loop = Loop(CONFIG, self.told.append)
        self.random = random.Random(seed)
        self.noise = noise
        self.sure: Callable[[float], bool] = lambda now_s: True
        self.pending: tuple[float, Change] | None = None
        self.names = {f"w{number}": "prefill" if number < prefills else "decode" for number in range(8)}
        self.refuses = ""
        self.held = False
        """No worker may change now."""
        self.deadline_s: float | None = None
        self.late: Callable[[Roles], bool] = lambda roles: False
        self._carry = 0.0

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 1.0
            self._second()
            if self.pending is not None and self.now_s >= self.pending[0]:
                self._land(self.pending[1])
            if self.now_s % 2 == 0:
                change = self.loop.look(self.view())
                if change is not None:
                    assert self.pending is None, "one at a time"
                    self.pending = (self.now_s + 1.0, change)

    def _second(self) -> None:
        demand = self.plant(self.now_s, self.roles)
        self._carry += max(0.0, demand.rate * self.random.gauss(1.0, self.noise))
        for _ in range(int(self._carry)):
            self._carry -= 1
            self.loop.window.placed(self.now_s, demand.prompt_s, demand.gap_s)
            new = round(demand.prompt_s * 1000)
            if self.late(self.roles):
                self.loop.window.missed(self.now_s)
            else:
                ended = Ended(new, round(demand.output), demand.step_s, self.deadline_s)
                self.loop.window.ended(self.now_s, ended)

    def _land(self, change: Change) -> None:
        self.pending = None
        if not self.refuses:
            assert self.names[change.node] != change.role
            self.names[change.node] = change.role
            prefills = sum(role == "prefill" for role in self.names.values())
            self.roles = Roles(prefills, 8 - prefills)
            assert 1 <= prefills <= 7, "at least one of each"
        self.loop.done(change, self.now_s, self.refuses)

    def view(self) -> View:
        def seats(role: str) -> tuple[Seat, ...]:
            names = [name for name, has in self.names.items() if has == role]
            return tuple(Seat(NodeId(name), 1) for name in names) if len(names) > 1 and not self.held else ()

        sure = self.sure(self.now_s) and self.pending is None
        return View(self.now_s, sure, self.roles, ((1, 0.01), (31, 0.04)), 1e6, seats("prefill"), seats("decode"))

    @property
    def changes(self) -> list[Change]:
        return [one for one in self.told if isinstance(one, Change)]

    @property
    def outcomes(self) -> list[str]:
        return [one.outcome for one in self.told if isinstance(one, Verdict)]


@pytest.mark.parametrize("seed", range(5))
def test_too_many_prefill_workers_become_decode_workers_one_by_one(seed: int) -> None:
    fleet = Fleet(modelled(ANSWERS), 6, seed=seed)
    before = fleet.plant(0.0, fleet.roles).rate
    fleet.run(400)
    assert fleet.roles.prefills <= 4
    assert fleet.plant(0.0, fleet.roles).rate > 1.3 * before
    assert set(fleet.outcomes) <= {"kept"}
    assert all(change.inputs["prefills"] for change in fleet.changes)


@pytest.mark.parametrize("seed", range(5))
def test_a_gain_that_does_not_come_is_taken_back_and_not_tried_at_once_again(seed: int) -> None:
    def stubborn(now_s: float, roles: Roles) -> Demand:
        """As if decoding was what took long; but it is as quick whatever is done, and one worker less is a loss."""
        slower = 1.0 if roles.prefills >= 6 else 0.8
        return ANSWERS._replace(rate=6.0 * slower, step_s=8.0 / slower)

    fleet = Fleet(stubborn, 6, seed=seed)
    fleet.run(BARRED_S + 20)
    first, back = fleet.changes[:2]
    assert (first.role, back.role, back.node, back.undoes) == ("decode", "prefill", first.node, first.number)
    assert fleet.roles.prefills == 6
    assert fleet.outcomes == ["in vain"]
    fleet.run(600)
    tries = [change for change in fleet.changes if change.undoes is None]
    assert len(tries) <= 5, "each time later"
    assert fleet.roles.prefills == 6 or fleet.loop.busy


def test_what_cannot_be_taken_back_at_once_is_later() -> None:
    fleet = Fleet(lambda now_s, roles: ANSWERS._replace(rate=6.0 if roles.prefills >= 6 else 4.0), 6)
    while not fleet.changes:
        fleet.run(1)
    fleet.run(2)
    fleet.held = True
    while not fleet.outcomes:
        fleet.run(1)
    fleet.run(20)
    assert (fleet.outcomes, len(fleet.changes), fleet.roles.prefills) == (["in vain"], 1, 5)
    fleet.held = False
    fleet.run(4)
    assert fleet.changes[-1].undoes == 1
    assert fleet.roles.prefills == 6
    assert not fleet.loop.busy


def test_a_change_after_which_every_step_is_late_is_taken_back() -> None:
    fleet = Fleet(modelled(ANSWERS), 6)
    fleet.late = lambda roles: roles.prefills < 6
    while not fleet.changes:
        fleet.run(1)
    while not fleet.outcomes:
        fleet.run(1)
        assert fleet.now_s < 400
    fleet.run(4)
    assert fleet.outcomes == ["in vain"]
    assert fleet.roles.prefills == 6


def test_where_nothing_is_to_be_gained_nothing_is_changed() -> None:
    for seed in range(10):
        fleet = Fleet(modelled(IDLE), 2, noise=0.3, seed=seed)
        fleet.run(600)
        assert fleet.changes == []


@pytest.mark.parametrize("seed", range(5))
def test_it_comes_to_rest_and_does_not_go_to_and_fro(seed: int) -> None:
    fleet = Fleet(modelled(ANSWERS), 5, noise=0.2, seed=seed)
    fleet.run(300)
    settled = len(fleet.changes)
    fleet.run(1800)
    assert len(fleet.changes) - settled <= 4


def test_it_follows_the_work_when_that_becomes_another() -> None:
    def shifting(now_s: float, roles: Roles) -> Demand:
        return modelled(PROMPTS if now_s < 200 or now_s >= 400 else ANSWERS)(now_s, roles)

    fleet = Fleet(shifting, 4)
    fleet.run(200)
    prompts = fleet.roles
    fleet.run(200)
    answers = fleet.roles
    assert answers.decodes > prompts.decodes


def test_on_stale_views_nothing_is_decided_and_a_trial_waits_until_all_is_known_again() -> None:
    fleet = Fleet(modelled(ANSWERS), 6)
    fleet.sure = lambda now_s: False
    fleet.run(120)
    assert fleet.changes == []
    fleet.sure = lambda now_s: now_s < 140 or now_s > 240
    fleet.run(20)
    (first,) = fleet.changes
    fleet.run(100)
    assert fleet.changes == [first]
    assert fleet.outcomes == []
    fleet.run(10)
    assert fleet.outcomes == [], "nothing of before counts"
    fleet.run(JUDGE_MAX_S)
    assert fleet.outcomes[0] == "kept"


def test_views_that_come_and_go_lead_to_nothing() -> None:
    fleet = Fleet(modelled(ANSWERS), 6)
    fleet.sure = lambda now_s: now_s % 4 == 0
    fleet.run(300)
    assert fleet.changes == []


def test_who_is_refused_rests() -> None:
    fleet = Fleet(modelled(ANSWERS), 6)
    fleet.refuses = "a role has changed"
    fleet.run(50)
    assert fleet.outcomes == ["refused"]
    assert fleet.roles.prefills == 6


@pytest.mark.parametrize(("rate", "outcome"), [(50.0, "unclear"), (2.0, "in vain")])
def test_work_that_becomes_another_under_trial_proves_nothing(rate: float, outcome: str) -> None:
    fleet = Fleet(modelled(ANSWERS), 6)
    while not fleet.changes:
        fleet.run(1)
    assert fleet.roles.prefills >= 5
    fleet.plant = lambda now_s, roles: PROMPTS._replace(rate=rate)
    while not fleet.outcomes:
        fleet.run(1)
    assert fleet.outcomes == [outcome]
    assert (fleet.changes[-1].undoes == 1) == (outcome == "in vain")


def test_work_that_ends_under_trial_is_no_verdict_and_holds_nothing_up() -> None:
    fleet = Fleet(modelled(ANSWERS), 6)
    while not fleet.changes:
        fleet.run(1)
    fleet.plant = lambda now_s, roles: IDLE._replace(rate=0.0)
    fleet.run(8 * JUDGE_MAX_S)
    assert fleet.outcomes == ["unclear"]
    assert not fleet.loop.busy


def test_who_stood_still_during_a_trial_counts_from_when_it_goes_on() -> None:
    fleet = Fleet(modelled(ANSWERS), 6)
    while not fleet.changes:
        fleet.run(1)
    fleet.run(3)
    fleet.now_s += 100.0  # nothing is seen of these
    fleet.run(10)
    assert fleet.outcomes == []
    fleet.run(4 * JUDGE_MAX_S)
    assert fleet.outcomes[0] == "kept"


def test_where_many_are_late_a_change_is_tried_though_the_model_tells_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Fleet:
        demand = IDLE._replace(rate=6.0, prompt_s=0.1, step_s=1.0)
        fleet = Fleet(lambda now_s, roles: demand, 3, noise=0.02)
        first, dice = fleet.roles, random.Random(5)
        fleet.deadline_s, fleet.late = 1.5, lambda roles: roles == first and dice.random() < 0.3
        return fleet

    fleet = made()
    fleet.run(120)
    assert [(change.role, change.hoped) for change in fleet.changes] == [("decode", True)], "prefill workers have time"
    assert fleet.outcomes == ["kept"]
    monkeypatch.setattr("router.adapt.loop.MISSED", 1.0)
    fleet = made()
    fleet.run(120)
    assert fleet.changes == []


def test_what_is_hoped_for_is_taken_back_where_no_more_is_in_time_though_steps_are_quicker() -> None:
    demand, dice = IDLE._replace(rate=6.0, prompt_s=0.1, step_s=1.0), random.Random(5)
    fleet = Fleet(lambda now_s, roles: demand._replace(step_s=1.0 if roles.prefills == 3 else 0.8), 3, noise=0.02)
    fleet.deadline_s, fleet.late = 1.5, lambda roles: dice.random() < 0.3
    fleet.run(BARRED_S)
    assert fleet.outcomes == ["in vain"]
    assert fleet.roles.prefills == 3


def test_what_has_just_begun_is_not_hoped_to_become_better() -> None:
    demand = IDLE._replace(rate=6.0, prompt_s=0.1, step_s=1.0)
    fleet = Fleet(lambda now_s, roles: demand, 3, noise=0.02)
    dice = random.Random(5)
    fleet.deadline_s, fleet.late = 1.5, lambda roles: fleet.now_s < LOOK_S + 4 and dice.random() < 0.3
    fleet.run(120)
    assert fleet.changes == []


@pytest.mark.parametrize(("before", "seconds"), [(100, 24), (300, 8)])
def test_a_window_reaches_back_as_far_as_the_work_was_the_same(before: int, seconds: int) -> None:
    window = Window()
    for second in range(40):
        window.ended(second, Ended(100 if second >= 32 else before, 50, 1.0, None))
    late = window.over(32.0, 40.0)
    assert late is not None
    assert window.reaching_back(late, 32.0, 40.0, 8.0, 16.0).seconds == seconds

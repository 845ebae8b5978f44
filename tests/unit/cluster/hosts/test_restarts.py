"""When a node that ended is started again: by its code, its age, and how often it has died."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.hosts.restarts import Again, History, Leave, RestartPolicy, judge
from cluster.rundir import FAULT_EXIT, FENCED_EXIT

POLICY = RestartPolicy()
codes = st.one_of(st.none(), st.integers(-64, 255))
lives = st.floats(0, 1000, allow_nan=False)


def deaths(count: int, *, lived_s: float, policy: RestartPolicy = POLICY, code: int | None = 1) -> list[Again | Leave]:
    """What becomes of a node each of whose lives is that long, waiting as it is told to."""
    history, now_s, verdicts = History(), 0.0, list[Again | Leave]()
    for _ in range(count):
        now_s += lived_s
        history, verdict = judge(history, policy, exit_code=code, lived_s=lived_s, now_s=now_s, told=False)
        verdicts.append(verdict)
        if isinstance(verdict, Leave):
            break
        now_s += verdict.delay_s
    return verdicts


def test_one_that_dies_at_once_waits_longer_each_time_and_is_given_up():
    assert deaths(99, lived_s=0.1) == [
        *(Again(delay_s, "backoff") for delay_s in (1.0, 2.0, 4.0, 8.0, 16.0)),
        Leave("given up"),
    ]


def test_one_that_is_never_to_be_started_again_is_left_alone_whatever_it_ended_with():
    never = RestartPolicy(again=False)
    for code in (None, 0, 1, FAULT_EXIT, -9):
        assert deaths(3, lived_s=500.0, policy=never, code=code) == [Leave("given up")]


def test_one_that_lives_for_a_while_between_deaths_begins_with_the_first_delay():
    assert deaths(20, lived_s=90.0) == [Again(1.0, "backoff")] * 20
    assert deaths(4, lived_s=59.0)[-1] == Again(8.0, "backoff")


def test_what_an_operator_must_mend_is_tried_for_ever_and_ever_slower():
    said = deaths(200, lived_s=0.1, code=FAULT_EXIT)
    assert said[:6] == [Again(delay_s, "faulty") for delay_s in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)]
    assert said[-1] == Again(30.0, "faulty")
    assert len(said) == 200


def test_faults_do_not_count_as_deaths():
    history = History()
    for at_s in range(9):
        history, _ = judge(history, POLICY, exit_code=FAULT_EXIT, lived_s=1, now_s=at_s, told=False)
    assert history.died_s == ()


@given(codes, lives, st.floats(0, 1e6), st.lists(st.floats(0, 1e6), max_size=6))
def test_one_that_was_told_to_stop_stays_stopped_and_is_forgiven(
    code: int | None, lived_s: float, now_s: float, died_s: list[float]
):
    history = History(tuple(sorted(died_s)), 3)
    assert judge(history, POLICY, exit_code=code, lived_s=lived_s, now_s=now_s, told=True) == (
        History(),
        Leave("stopped"),
    )


@given(lives, st.floats(0, 1e6))
def test_one_whose_name_another_has_is_left_alone(lived_s: float, now_s: float):
    _, verdict = judge(History(), POLICY, exit_code=FENCED_EXIT, lived_s=lived_s, now_s=now_s, told=False)
    assert verdict == Leave("fenced")


@given(st.lists(st.tuples(codes.filter(lambda code: code != FENCED_EXIT), lives), max_size=60), st.integers(0, 8))
def test_delays_and_deaths_stay_within_their_bounds(ends: list[tuple[int | None, float]], deaths_max: int):
    policy = RestartPolicy(deaths_max=deaths_max)
    history, now_s, at_s = History(), 0.0, list[float]()
    for code, lived_s in ends:
        now_s += lived_s
        history, verdict = judge(history, policy, exit_code=code, lived_s=lived_s, now_s=now_s, told=False)
        counts = code != FAULT_EXIT
        at_s += [now_s] * counts
        recent = [died_s for died_s in at_s if died_s > now_s - policy.window_s]
        match verdict:
            case Leave(state):
                assert state == "given up"
                assert counts
                assert len(recent) == deaths_max + 1
                at_s.clear()
            case Again(delay_s, state):
                assert state == ("backoff" if counts else "faulty")
                assert policy.delay_s <= delay_s <= policy.delay_max_s
                assert len(recent) <= deaths_max
                assert all(a <= b for a, b in pairwise(history.died_s))
                assert len(history.died_s) <= deaths_max
                now_s += delay_s

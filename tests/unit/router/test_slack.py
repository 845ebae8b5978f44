"""What room there is for the background."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy.slack import PLACES, QUEUE_S_MAX, STALE_S, Seen, places, slack

IDLE = Seen(heard_s=100.0, front=0, own=0, background=0, waiting=0, queue_s=0.0)


def test_an_idle_worker_has_all_its_places_and_a_busier_one_ever_fewer() -> None:
    found = [places(IDLE._replace(front=front)) for front in range(PLACES + 2)]
    assert found[0] == PLACES
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


@pytest.mark.parametrize("change", [{"waiting": 1}, {"queue_s": QUEUE_S_MAX + 0.1}])
def test_there_is_none_while_steps_wait(change: dict[str, float]) -> None:
    assert places(IDLE._replace(**change)) == 0


def test_it_falls_to_nothing_when_nobody_was_heard_of_late() -> None:
    granted = slack([IDLE, IDLE._replace(heard_s=101.0)], 101.5)
    assert granted == (2 * PLACES, 100.0 + STALE_S)
    assert slack([IDLE, IDLE._replace(heard_s=101.0)], granted.until_s).steps == PLACES, "that of the other"
    assert slack([IDLE], granted.until_s).steps == 0
    assert slack([], 0.0).steps == 0


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 3))
def test_routers_share_what_there_is_and_each_gets_on(own: int, others: int, front: int) -> None:
    room = places(IDLE._replace(front=front))
    mine = places(IDLE._replace(front=front, own=own, background=own + others))
    assert min(1, room) <= mine <= room
    if own + others <= room:
        assert mine == room


def test_two_routers_that_took_all_each_give_half_back() -> None:
    assert places(IDLE._replace(own=PLACES, background=2 * PLACES)) == PLACES // 2

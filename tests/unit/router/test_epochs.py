from hypothesis import given
from hypothesis import strategies as st

from router.fleet.epochs import Epochs, Mark
from tracehaul.wire.ids import Epoch, Generation, NodeId

N = NodeId("store-0")
ONE, TWO, THREE = Generation(30), Generation(20), Generation(10)


def test_each_life_gets_a_higher_one_whatever_the_clock_says() -> None:
    epochs = Epochs()
    assert epochs.issue(N, ONE, 1000.9) == 1000
    assert epochs.issue(N, TWO, 400.0) == 1001, "the clock was set back"
    assert epochs.issue(N, THREE, 2000.0) == 2000
    assert epochs.issue(N, THREE, 3000.0) == 2000, "its answer was lost, and it asks again"
    assert epochs.issue(NodeId("other"), ONE, 7.0) == 7


def test_a_lower_rank_is_fenced_and_a_higher_one_is_learned() -> None:
    epochs = Epochs()
    first = epochs.issue(N, ONE, 5.0)
    second = epochs.issue(N, TWO, 5.0)
    assert epochs.shown(N, first, ONE) is None
    assert epochs.shown(N, second, TWO) == second
    assert epochs.shown(N, Epoch(9), THREE) == 9
    assert epochs.shown(N, second, TWO) is None
    assert epochs.issue(N, ONE, 5.0) == 10


def test_a_life_is_told_the_highest_that_was_issued_to_it() -> None:
    epochs = Epochs()
    assert epochs.issue(N, ONE, 5.0) == 5
    assert epochs.shown(N, Epoch(3), ONE) == 5


@given(st.permutations([(Epoch(5), ONE), (Epoch(5), TWO), (Epoch(4), THREE)]))
def test_routers_agree_on_lives_with_one_epoch_in_whatever_order_they_hear_of_them(
    order: list[tuple[Epoch, Generation]],
) -> None:
    epochs = Epochs()
    for epoch, generation in order:
        epochs.shown(N, epoch, generation)
    assert epochs.marks() == [Mark(N, Epoch(5), ONE)]


def test_marks_outlive_a_router() -> None:
    epochs = Epochs()
    epochs.issue(N, ONE, 5.0)
    epochs.issue(N, TWO, 5.0)
    again = Epochs(epochs.marks())
    assert again.shown(N, Epoch(5), ONE) is None
    assert again.issue(N, THREE, 0.0) == 7


def test_names_are_bounded_and_the_oldest_is_forgotten() -> None:
    epochs = Epochs(names_max=2)
    for number, name in enumerate(("a", "b", "c")):
        epochs.issue(NodeId(name), ONE, 10.0 + number)
    assert [mark.node for mark in epochs.marks()] == ["b", "c"]
    epochs.issue(NodeId("old"), ONE, 1.0)
    assert [mark.node for mark in epochs.marks()] == ["c", "old"], "who was just issued one is not forgotten"

"""Which line comes next, when a failed one comes again, and what a window is."""

import msgspec
import pytest

from jobs.queue import Claim, Queue
from jobs.retries import FAULTS_MAX, PAUSE_S_MAX, Answer, NoAnswer, Tried, again_in_s
from jobs.windows import window_s
from tests.opcodes import opcodes


def claims(queue: Queue, now_s: float) -> list[Claim]:
    found: list[Claim] = []
    while (claim := queue.claim(now_s)) is not None:
        found.append(claim)
    return found


def named(found: list[Claim]) -> list[tuple[str, int]]:
    return [(claim.batch, claim.line) for claim in found]


def test_the_earliest_deadline_goes_first() -> None:
    queue = Queue()
    queue.add("day", 86_400, [[0], [1]])
    queue.add("hour", 3600, [[0], [1]])
    assert named(claims(queue, 0)) == [("hour", 0), ("hour", 1), ("day", 0), ("day", 1)]


def test_nothing_of_a_batch_is_asked_after_its_deadline() -> None:
    queue = Queue()
    queue.add("hour", 3600, [[0]])
    assert queue.claim(3600) is None


def test_steps_of_a_chain_follow_each_other_at_once() -> None:
    queue = Queue()
    queue.add("b", 100, [[0, 3], [1], [2]])
    first, second = queue.claim(0), queue.claim(0)
    assert first is not None
    assert second is not None
    assert (first.line, second.line) == (0, 1)
    queue.over(first)
    assert named(claims(queue, 0)) == [("b", 3), ("b", 2)]


def test_a_line_that_failed_holds_up_its_own_chain_alone() -> None:
    queue = Queue()
    queue.add("b", 100, [[0, 3], [1], [2]])
    first = queue.claim(0)
    assert first is not None
    queue.later(first, 5.0)
    rest = claims(queue, 0)
    assert named(rest) == [("b", 1), ("b", 2)]
    assert queue.wake_s(0.0) == 5.0
    assert queue.claim(4.9) is None
    again = queue.claim(5.0)
    assert again == first
    for claim in (*rest, again):
        assert claim is not None
        queue.over(claim)
    last = queue.claim(5.0)
    assert last is not None
    assert last.line == 3
    assert not queue.drained("b")
    queue.over(last)
    assert queue.claim(6) is None
    assert queue.drained("b")


def test_lines_that_have_ended_are_not_asked() -> None:
    queue = Queue()
    queue.add("b", 100, [[0, 1, 2], [3]], ended={0, 1, 3})
    assert named(claims(queue, 0)) == [("b", 2)]


def test_a_batch_has_drained_though_a_nearer_one_is_asked_for() -> None:
    queue = Queue()
    queue.add("day", 86_400, [[0]])
    last = queue.claim(0)
    assert last is not None
    queue.add("hour", 3600, [[0], [1]])
    queue.over(last)
    assert queue.drained("day")
    queue.add("again", 9000, [[0], [1]], ended={0, 1})
    assert queue.drained("again")


def test_nobody_wakes_for_a_batch_whose_time_is_over() -> None:
    queue = Queue()
    queue.add("b", 100, [[0]])
    claim = queue.claim(0)
    assert claim is not None
    queue.later(claim, 50.0)
    assert queue.wake_s(60.0) == 50.0
    assert queue.wake_s(100.0) is None


def test_nothing_is_claimed_of_a_batch_that_was_dropped() -> None:
    queue = Queue()
    queue.add("b", 100, [[0], [1]])
    claim = queue.claim(0)
    assert claim is not None
    queue.drop("b")
    queue.later(claim, 1.0)
    assert queue.claim(2) is None
    assert queue.wake_s(0.0) is None
    queue.add("b", 100, [[0]])
    assert queue.claim(2) is not None


def crowd(calls: int) -> Queue:
    """So many wait, some are claimed, and a batch has a line that is asked again."""
    queue = Queue()
    queue.add("batch", 1000, [[0], [1]])
    again = queue.claim(0)
    assert again is not None
    queue.later(again, 500.0)
    for at in range(calls):
        queue.add(f"call {at}", 100.0 + at, [[0]], presses=False)
    for _ in range(4):
        assert queue.claim(0) is not None
    return queue


def look(queue: Queue) -> int:
    """What one costs, and that a call leaves."""
    looks = (lambda: queue.left(1.0), lambda: queue.wake_s(1.0), lambda: queue.claim(1.0), lambda: queue.drop("call 7"))
    return sum(map(opcodes, looks))


def test_a_look_costs_what_may_go_and_not_what_waits() -> None:
    cost: list[int] = []
    for calls in (10, 1000):
        queue = crowd(calls)
        cost.append(look(queue))
        assert [left.lines for left in queue.left(1.0)] == [2]
        assert len(claims(queue, 1.0)) == calls - 5, "those that wait, but one that left, and the batch's other line"
    assert cost[0] > 100
    assert cost[1] < cost[0] + 100, "as a search by halves costs more"


def test_those_whose_time_is_over_cost_the_others_nothing() -> None:
    queue = crowd(1000)
    queue.add("last", 5000.0, [[0]], presses=False)
    assert opcodes(lambda: queue.claim(1500.0)) < 500
    queue = crowd(1000)
    queue.add("last", 5000.0, [[0]], presses=False)
    assert named(claims(queue, 1500.0)) == [("last", 0)]


def failed(status: int, code: str | None = None, retry_after_s: float | None = None) -> Answer:
    return Answer(status, msgspec.json.encode({"error": {"code": code}}), retry_after_s=retry_after_s)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_stays_wrong_is_not_asked_again(status: int) -> None:
    assert again_in_s(failed(status), Tried(), 1000, 0.5) is None


def test_what_the_error_says_is_honoured() -> None:
    assert again_in_s(failed(429, "insufficient_quota"), Tried(), 1000, 0.5) is None
    assert again_in_s(Answer(500, b"", should_retry=False), Tried(), 1000, 0.5) is None
    assert again_in_s(Answer(400, b"{}", should_retry=True), Tried(), 1000, 0.5) is not None
    assert again_in_s(failed(503, retry_after_s=77.0), Tried(), 1000, 0.0) == 77.0


def test_a_deadline_bounds_retries() -> None:
    assert again_in_s(failed(503, retry_after_s=77.0), Tried(), 76.0, 0.0) is None


def test_who_is_busy_is_asked_until_the_deadline_ever_more_rarely() -> None:
    tried = Tried()
    pauses = [again_in_s(failed(503), tried, 1e6, 1.0) for _ in range(100)]
    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert pauses[-1] == PAUSE_S_MAX
    unreached = [again_in_s(NoAnswer("refused", reached=False), tried, 1e6, 1.0) for _ in range(100)]
    assert None not in unreached


@pytest.mark.parametrize("said", [failed(500), failed(504), NoAnswer("it went away")])
def test_poison_is_given_up(said: Answer | NoAnswer) -> None:
    tried = Tried()
    told = [again_in_s(said, tried, 1e6, 0.5) for _ in range(FAULTS_MAX)]
    assert told[-1] is None
    assert None not in told[:-1]


@pytest.mark.parametrize(("text", "seconds"), [("1h", 3600), ("24h", 86_400), ("30m", 1800), ("7d", 604_800)])
def test_windows(text: str, seconds: int) -> None:
    assert window_s(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "0h", "1", "-1h", "1 h", "24H", "59s", "31d", "9999999h"])
def test_no_windows(text: str) -> None:
    with pytest.raises(ValueError, match="completion window"):
        window_s(text)

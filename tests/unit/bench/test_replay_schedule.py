"""When steps are sent, without a clock; and what their records say."""

import msgspec

from bench.replay.hits import Bound
from bench.replay.recording import Blocks, Step, Trace
from bench.replay.records import LAG_DEGRADED_S, StepRecord, degraded, hits, summary
from bench.replay.schedule import Completed, Pacing, Scheduler

PROMPT = Blocks("s", (1,), 4, 4)


def trace(name: str, *gaps_s: float, start_s: float | None = None, parent: str | None = None) -> Trace:
    return Trace(name, tuple(Step(PROMPT, 1, gap_s) for gap_s in gaps_s), parent, start_s)


def sent(schedule: Scheduler, now_s: float) -> list[tuple[str, int, float]]:
    return [(sending.trace.trace, sending.index, sending.due_s) for sending in schedule.due(now_s)]


def test_steps_follow_each_other_after_their_gaps() -> None:
    schedule = Scheduler([trace("a", 0, 8, 100)], Pacing(time_scale=4, gap_max_s=5))
    assert sent(schedule, 0) == [("a", 0, 0)]
    assert schedule.next_s is None
    schedule.ended("a", 1)
    assert schedule.next_s == 3
    assert sent(schedule, 2.9) == []
    assert sent(schedule, 3.5) == [("a", 1, 3)], "late by half a second"
    schedule.ended("a", 4)
    assert schedule.next_s == 9, "the longest gap is limited, after scaling"
    assert sent(schedule, 9) == [("a", 2, 9)]
    assert not schedule.done
    schedule.ended("a", 10)
    assert schedule.done
    assert schedule.completed == [Completed("a", None, 3, 0, 10)]


def test_lanes_start_one_after_the_other_and_take_the_next_trace_when_they_are_free() -> None:
    schedule = Scheduler([trace(name, 0) for name in "abc"], Pacing(concurrency=2, stagger_s=2))
    assert sent(schedule, 0) == [("a", 0, 0)]
    assert sent(schedule, 2) == [("b", 0, 2)]
    schedule.ended("b", 5)
    assert sent(schedule, 5) == [("c", 0, 5)]
    schedule.ended("a", 6)
    schedule.ended("c", 6)
    assert schedule.done


def test_children_run_beside_each_other_and_their_parent_waits_for_gap_and_children() -> None:
    children = (trace("p.a", 0, 0, parent="p"), trace("p.b", 0, parent="p"))
    parent = Trace("p", (Step(PROMPT, 1, 0, children), Step(PROMPT, 1, 10)))
    schedule = Scheduler([parent, trace("q", 0)], Pacing(concurrency=1, stagger_s=0))
    assert schedule.steps == 6
    sent(schedule, 0)
    schedule.ended("p", 1)
    sendings = schedule.due(1)
    assert [(sending.trace.trace, sending.root) for sending in sendings] == [("p.a", "p"), ("p.b", "p")]
    schedule.ended("p.b", 4)
    schedule.ended("p.a", 5)
    assert sent(schedule, 5) == [("p.a", 1, 5)]
    schedule.ended("p.a", 20)
    assert sent(schedule, 20) == [("p", 1, 20)], "the gap was over at 11"
    schedule.ended("p", 21)
    assert sent(schedule, 21) == [("q", 0, 21)], "children take no lane of their own"
    schedule.ended("q", 22)
    assert schedule.done
    assert [(one.trace, one.parent, one.ended_s) for one in schedule.completed] == [
        ("p.b", "p", 4),
        ("p.a", "p", 20),
        ("p", None, 21),
        ("q", None, 22),
    ]


def test_a_trace_that_ends_in_children_ends_with_the_last_of_them() -> None:
    parent = Trace("p", (Step(PROMPT, 1, 0, (trace("p.a", 0, parent="p"),)),))
    schedule = Scheduler([parent], Pacing())
    sent(schedule, 0)
    schedule.ended("p", 1)
    sent(schedule, 1)
    assert not schedule.done
    schedule.ended("p.a", 7)
    assert schedule.completed[-1] == Completed("p", None, 1, 0, 7)


def test_recorded_starts_are_kept_and_waiting_for_a_lane_is_lag() -> None:
    traces = [trace("b", 0, start_s=4), trace("a", 0, start_s=2), trace("c", 0, start_s=6)]
    schedule = Scheduler(traces, Pacing(concurrency=2, time_scale=2, stagger_s=9))
    assert sent(schedule, 0) == []
    assert schedule.next_s == 1
    assert sent(schedule, 1) == [("a", 0, 1)]
    assert sent(schedule, 2) == [("b", 0, 2)]
    schedule.ended("a", 8)
    assert sent(schedule, 8) == [("c", 0, 3)], "it should have been sent at 3, and no lane was free"


def record(trace: str, sent_s: float, *, lag_s: float = 0.0, cached: int | None = 4, error: str | None = None):
    return StepRecord(
        trace=trace,
        parent=None,
        index=0,
        due_s=sent_s - lag_s,
        sent_s=sent_s,
        recorded_tokens=10,
        asked_tokens=2,
        ended_s=sent_s + 1,
        ttft_s=None if error else 0.5,
        itl_s=[0.1],
        prompt_tokens=10,
        cached_tokens=cached,
        output_tokens=2,
        error=error,
    )


def test_hits_are_compared_over_the_steps_that_told() -> None:
    records = [record("a", 0), record("a", 1, cached=8), record("b", 2, cached=None), record("b", 3, error="timeout")]
    bounds = [Bound(0, 0), Bound(8, 8), Bound(8, 0), Bound(8, 8)]
    found = hits(records, bounds, [10] * 4)
    assert found is not None
    assert (found.delivered, found.shared, found.session) == (0.6, 0.4, 0.4)
    assert hits(records[2:], bounds[2:], [10] * 2) is None


def test_a_summary_counts_errors_by_kind_and_says_when_the_schedule_was_not_kept() -> None:
    records = [record("a", 0), record("b", 1, error="http 503"), record("c", 2, error="timeout")]
    figures = {r.name: r.value for r in summary(records, [Completed("a", None, 1, 0.0, 30.0)], 36.0, None)}
    assert figures["replay.steps_per_h"] == 100
    assert figures["replay.traces_per_h"] == 100
    assert figures["replay.jct.p50"] == 30
    assert (figures["replay.errors"], figures["replay.errors.http_503"], figures["replay.errors.timeout"]) == (2, 1, 1)
    assert figures["replay.degraded"] == 0
    assert degraded([record("a", 5, lag_s=2 * LAG_DEGRADED_S)])
    assert not degraded([])


def test_a_task_costs_what_it_and_its_subagents_do_where_the_server_tells() -> None:
    replaced = msgspec.structs.replace
    records = [
        replaced(record("a", 0), cost=1.0, cost_unit="USD"),
        replaced(record("a", 1), cost=2.0, cost_unit="USD"),
        replaced(record("a/1", 2), parent="a", cost=4.0, cost_unit="USD"),
        replaced(record("b", 3), cost=1.0, cost_unit="USD"),
        record("c", 4),
    ]
    done = [Completed(name, None, 1, 0.0, 30.0) for name in "ab"]
    told = {r.name: (r.value, r.unit) for r in summary(records, done, 36.0, None)}
    assert told["replay.cost.task"] == (4.0, "USD")
    assert "replay.cost.task" not in {r.name for r in summary([record("a", 0)], done, 36.0, None)}

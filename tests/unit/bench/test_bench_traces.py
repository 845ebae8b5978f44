"""What the benches make of their records."""

from bench.replay.hits import Bound
from bench.replay.records import StepRecord
from bench.traces.hits import after_kill


def record(trace: str, sent_s: float, cached: int | None, error: str | None = None) -> StepRecord:
    return StepRecord(trace, None, 0, sent_s, sent_s, 100, 8, cached_tokens=cached, prompt_tokens=100, error=error)


def test_hits_after_a_kill_are_told_apart_by_the_step_that_each_trace_is_at() -> None:
    records = [
        record("a", 1.0, 10),
        record("a", 5.0, 20),
        record("b", 6.0, 30),
        record("a", 7.0, 40),
        record("a", 8.0, 50),
        record("a", 9.0, 60, "timeout"),
        record("b", 9.5, None),
    ]
    bounds = [Bound(100, 0)] * len(records)
    assert after_kill(records, bounds, 5.0) == ((50, 200), (40, 200), (50, 200))

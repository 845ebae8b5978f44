"""The life of a batch: no event at any time leads where it must not, and after a death it goes on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.batch import (
    AGE_S,
    OVER,
    OVER_MAX,
    Batch,
    Cancelled,
    Counts,
    Delivered,
    Drained,
    Effect,
    Event,
    Late,
    Refused,
    Stopped,
    Validated,
    handle,
    outlived,
    resumed,
)
from jobs.lines import LineError

NEW = Batch("batch_1", "", "/v1/completions", "file-1", "1h", created_at=100, expires_at=3700)
DONE = Delivered(Counts(3, 2, 1), 0, "file-o", "file-e")


def after(*events: tuple[int, Event]) -> tuple[Batch, Effect | None]:
    batch, effect = NEW, None
    for now, event in events:
        batch, effect = handle(batch, event, now)
    return batch, effect


def test_it_completes() -> None:
    batch, effect = after((101, Validated(3)))
    assert (batch.status, batch.in_progress_at, batch.counts.total, effect) == ("in_progress", 101, 3, "run")
    batch, effect = handle(batch, Drained(), 200)
    assert (batch.status, batch.finalizing_at, effect) == ("finalizing", 200, "deliver")
    batch, effect = handle(batch, DONE, 201)
    assert (batch.status, batch.completed_at, effect) == ("completed", 201, None)
    assert (batch.output_file_id, batch.error_file_id, batch.counts) == ("file-o", "file-e", Counts(3, 2, 1))


def test_a_wrong_file_fails_it() -> None:
    errors = (LineError("empty_file", "no lines"),)
    batch, effect = after((101, Refused(errors)))
    assert (batch.status, batch.failed_at, batch.errors, effect) == ("failed", 101, errors, None)


def test_what_there_is_is_delivered_when_it_is_cancelled() -> None:
    batch, effect = after((101, Validated(3)), (102, Cancelled()))
    assert (batch.status, batch.cancelling_at, effect) == ("cancelling", 102, "stop")
    batch, effect = handle(batch, Stopped(), 103)
    assert (batch.status, effect) == ("cancelling", "deliver")
    batch, _ = handle(batch, Delivered(Counts(3, 1, 2), 2, "file-o", "file-e"), 104)
    assert (batch.status, batch.cancelled_at, batch.output_file_id) == ("cancelled", 104, "file-o")


@pytest.mark.parametrize("begun", [True, False])
def test_what_there_is_is_delivered_when_its_time_is_over(begun: bool) -> None:
    events: list[tuple[int, Event]] = [(101, Validated(3))] if begun else []
    batch, effect = after(*events, (3699, Late()))
    assert effect != "stop"
    batch, effect = handle(batch, Late(), 3700)
    assert (batch.status, effect) == ("finalizing", "stop")
    batch, _ = handle(batch, Stopped(), 3701)
    batch, _ = handle(batch, Delivered(Counts(3, 1, 2), 2, "file-o", "file-e"), 3702)
    assert (batch.status, batch.expired_at, batch.output_file_id) == ("expired", 3702, "file-o")


def test_one_that_ended_as_its_time_was_over_is_complete() -> None:
    batch, _ = after((101, Validated(3)), (3700, Late()), (3701, Stopped()), (3702, DONE))
    assert batch.status == "completed"


EVENTS = st.sampled_from([Validated(3), Refused(()), Cancelled(), Late(), Drained(), Stopped(), DONE])


@given(st.lists(st.tuples(st.integers(0, 2000), EVENTS)))
def test_no_event_undoes_an_end_and_a_death_only_repeats(events: list[tuple[int, Event]]) -> None:
    batch, now = NEW, 100
    for later, event in events:
        now += later
        before = batch
        batch, effect = handle(batch, event, now)
        if before.status in OVER:
            assert (batch, effect) == (before, None)
        if batch.status in OVER:
            assert resumed(batch) is None
            ends = [batch.completed_at, batch.failed_at, batch.expired_at, batch.cancelled_at]
            assert sum(end is not None for end in ends) == 1
        elif effect is not None:
            # After a death before the effect, what is done instead leads there too.
            again = resumed(batch)
            assert again == effect or (effect, again) == ("deliver", "stop")
        else:
            assert resumed(batch) is not None, "it would be stuck"


def test_batches_that_are_over_are_forgotten_by_age_and_beyond_a_number_of_each_tenant() -> None:
    def ended(name: str, tenant: str, at: int) -> Batch:
        return Batch(
            name, tenant, "/v1/completions", "file-in", "1h", at, at + 3600, status="completed", completed_at=at
        )

    many = [ended(f"b{at}", "t", 10**9) for at in range(OVER_MAX + 2)]
    other, running = ended("o", "u", 10**9), Batch("r", "t", "/v1/completions", "file-in", "1h", 0, 3600)
    assert outlived([running, other, *many], 10**9) == [many[1], many[0]]
    assert outlived([running, other], 10**9 + AGE_S - 1) == []
    assert outlived([running, other], 10**9 + AGE_S) == [other]

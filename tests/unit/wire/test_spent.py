"""Sums of what was spent."""

import pytest

from tracehaul.wire.ids import StepId, TraceId
from tracehaul.wire.spent import NOTHING, Charge, Reading, Spent


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        (Spent(1.0, 2.0, 3.0, 4, 5.0), NOTHING, Spent(1.0, 2.0, 3.0, 4, 5.0)),
        (Spent(1.0), Spent(1.0), NOTHING),
        (Spent(1.0, moved_bytes=9), Spent(2.0), NOTHING),  # it was on its way for longer
        (Spent(decode_s=3.0, moved_bytes=4), Spent(decode_s=1.0, moved_bytes=4), Spent(decode_s=2.0)),
        (Spent(resident_byte_s=8.0), Spent(resident_byte_s=2.0), Spent(resident_byte_s=6.0)),
        (Spent(1.0, 2.0, 1.0), Spent(3.0), Spent(-2.0, 2.0, 1.0)),  # of its prefill two were recompute
    ],
)
def test_what_is_new_of_a_sum(now: Spent, before: Spent, expected: Spent) -> None:
    assert now.since(before) == expected


def test_a_worker_of_an_earlier_version_tells_no_total() -> None:
    charge = Charge("", TraceId("t"), StepId("s"), Reading(1, Spent(1.0)))
    assert charge.sum == Reading(1, Spent(1.0))

"""The life of a batch: events in, effects out. Pure.

What :func:`handle` returns is kept before its effects are carried out; after a death :func:`resumed` tells what to do
with what was kept. Every effect can be carried out twice.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from jobs.lines import LineError

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
OVER: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
AGE_S = 30 * 86_400
"""Batches that have been over for so long are forgotten, and what they were answered is deleted after as long."""
OVER_MAX = 1000
"""So many batches of a tenant that are over are known; the oldest are forgotten before their time."""


class Counts(msgspec.Struct, frozen=True):
    """Of lines."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True):
    """All that is known of one. Times are Unix seconds."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    errors: tuple[LineError, ...] = ()
    counts: Counts = Counts()
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_age_s: int | None = None
    """How long what it was answered is kept; None: as long as files are."""
    metadata: dict[str, str] | None = None
    key: str | None = None
    """The id of the API key that asked for it."""


class Validated(msgspec.Struct, frozen=True):
    """The file is right, and has so many lines."""

    total: int


class Refused(msgspec.Struct, frozen=True):
    """It is not, or cannot be read."""

    errors: tuple[LineError, ...]


class Cancelled(msgspec.Struct, frozen=True):
    """Its owner wants it to end."""


class Late(msgspec.Struct, frozen=True):
    """Its window may be over: looked at from time to time."""


class Drained(msgspec.Struct, frozen=True):
    """Every line has ended."""


class Stopped(msgspec.Struct, frozen=True):
    """None of its lines is being asked any more."""


class Delivered(msgspec.Struct, frozen=True):
    """What there is has become files."""

    counts: Counts
    unasked: int
    """Lines among the failed whose turn never came."""
    output_file_id: str | None
    error_file_id: str | None


Event = Validated | Refused | Cancelled | Late | Drained | Stopped | Delivered
Effect = Literal["validate", "run", "stop", "deliver"]
"""Read its file; ask its lines; ask none any more, and say :class:`Stopped`; tell of each line that has not ended why,
and make files of all."""


def handle(batch: Batch, event: Event, now: int) -> tuple[Batch, Effect | None]:
    """The batch as it is now, and what follows. Events that come too late change nothing."""
    change = msgspec.structs.replace
    match batch.status, event:
        case "validating", Validated(total):
            return change(batch, status="in_progress", in_progress_at=now, counts=Counts(total)), "run"
        case "validating", Refused(errors):
            return change(batch, status="failed", failed_at=now, errors=errors), None
        case (("validating" | "in_progress"), Cancelled()):
            return change(batch, status="cancelling", cancelling_at=now), "stop"
        case "in_progress", Drained():
            return change(batch, status="finalizing", finalizing_at=now), "deliver"
        case (("validating" | "in_progress"), Late()) if now >= batch.expires_at:
            return change(batch, status="finalizing", finalizing_at=now), "stop"
        case (("cancelling" | "finalizing"), Stopped()):
            return batch, "deliver"
        case (("cancelling" | "finalizing"), Delivered(counts, unasked, output, error)):
            batch = change(batch, counts=counts, output_file_id=output, error_file_id=error)
            if batch.status == "cancelling":
                return change(batch, status="cancelled", cancelled_at=now), None
            if unasked or batch.in_progress_at is None:
                return change(batch, status="expired", expired_at=now), None
            return change(batch, status="completed", completed_at=now), None
        case _:
            return batch, None


def resumed(batch: Batch) -> Effect | None:
    """What to go on with, of one that was kept."""
    match batch.status:
        case "validating":
            return "validate"
        case "in_progress":
            return "run"
        case "cancelling" | "finalizing":
            return "stop"
        case _:
            return None


def results_name(batch: str, *, ok: bool) -> str:
    """The file of its lines that ended so."""
    return f"file-{batch.removeprefix('batch_')}{'o' if ok else 'e'}"


def in_order(batches: Sequence[Batch]) -> dict[tuple[str, str], Batch]:
    """By tenant and id, the oldest first."""
    return {(each.tenant, each.id): each for each in sorted(batches, key=lambda each: (each.created_at, each.id))}


def outlived(batches: Sequence[Batch], now: int) -> list[Batch]:
    """Those to be forgotten, of all batches, the oldest first."""
    found: list[Batch] = []
    known: Counter[str] = Counter()
    for batch in reversed(batches):
        if batch.status in OVER:
            known[batch.tenant] += 1
            ends = (batch.completed_at, batch.failed_at, batch.expired_at, batch.cancelled_at)
            if known[batch.tenant] > OVER_MAX or max(end or 0 for end in ends) + AGE_S <= now:
                found.append(batch)
    return found

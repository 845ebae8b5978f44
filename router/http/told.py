"""What receivers of webhooks are told of."""

from jobs.batch import Batch
from jobs.webhooks.events import Event, kind_of
from jobs.webhooks.outbox import Outbox
from tracehaul.runtime.clock import wall_s


def note_batch(outbox: Outbox, batch: Batch) -> None:
    """It is over."""
    ends = (batch.completed_at, batch.failed_at, batch.expired_at, batch.cancelled_at)
    if (kind := kind_of("batch", batch.status)) is not None:
        outbox.note(Event(kind, batch.tenant, batch.id, max(end or 0 for end in ends)))


def note_response(outbox: Outbox, tenant: str, name: str, status: str) -> None:
    """One that ran in the background has ended so."""
    if (kind := kind_of("response", status)) is not None:
        outbox.note(Event(kind, tenant, name, int(wall_s())))

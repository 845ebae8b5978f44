"""Bills as they are written down, a page for each minute or so, and what pages say together. Pure.

What traces were billed is said once and added up. Of workers a page says how far their own clocks had come, so that it
makes no difference how many routers have heard them, or which of their minutes nobody has.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from router.policy.prices import FREE, Bill
from tracehaul.wire.ids import Generation, NodeId, TraceId


class TraceRow(msgspec.Struct, frozen=True, array_like=True):
    """What a trace was billed within a page."""

    salt: str
    trace: TraceId
    tenant: str
    """Whom it counts for."""
    steps: int
    """That ended."""
    bill: Bill


class WorkerRow(msgspec.Struct, frozen=True, array_like=True):
    """One life of a worker within a page. Seconds by its own clock, since it began."""

    node: NodeId
    generation: Generation
    role: str
    pool: str
    price_s: float
    """Of a second."""
    up_from: float
    up_to: float
    busy_from: float
    """Of the time that its iterations took."""
    busy_to: float
    unheard_s: float
    """After ``up_to``, until it was known to be gone."""


class Page(msgspec.Struct, frozen=True):
    """What a router has billed from then on."""

    at_us: int
    """Unix time, in microseconds."""
    unit: str
    rows: tuple[TraceRow, ...]
    workers: tuple[WorkerRow, ...]


class FleetLine(NamedTuple):
    """Workers' time that is no trace's."""

    what: str
    seconds: float
    amount: float


class Report(NamedTuple):
    """What pages say together."""

    unit: str
    rows: Sequence[TraceRow]
    """One for each trace, by tenant and name."""
    fleet: Sequence[FleetLine]
    """``idle``: nobody had anything to compute. ``lost``: with a worker that was not heard any more. ``unclaimed``: the
    rest, of steps that still run, or whose end nobody has told."""
    total: FleetLine
    """Of the workers that there were: traces and fleet together."""


def report(pages: Iterable[Page]) -> Report:
    """Of these, in any order."""
    unit = ""
    rows: dict[tuple[str, TraceId, str], TraceRow] = {}
    lives: dict[tuple[NodeId, Generation], WorkerRow] = {}
    for page in pages:
        unit = page.unit
        for row in page.rows:
            key = row.salt, row.trace, row.tenant
            known = rows.get(key)
            if known is not None:
                row = TraceRow(*key, known.steps + row.steps, known.bill + row.bill)
            rows[key] = row
        for worker in page.workers:
            life = worker.node, worker.generation
            lives[life] = _joined(lives[life], worker) if life in lives else worker
    billed = sum((row.bill for row in rows.values()), FREE)
    return _report(unit, [rows[key] for key in sorted(rows)], billed, list(lives.values()))


def _joined(one: WorkerRow, other: WorkerRow) -> WorkerRow:
    last = max(one, other, key=lambda row: (row.up_to, row.unheard_s))
    return msgspec.structs.replace(
        last,
        up_from=min(one.up_from, other.up_from),
        busy_from=min(one.busy_from, other.busy_from),
        busy_to=max(one.busy_to, other.busy_to),
    )


def _report(unit: str, rows: Sequence[TraceRow], billed: Bill, lives: Sequence[WorkerRow]) -> Report:
    def line(what: str, seconds: Sequence[float]) -> FleetLine:
        return FleetLine(what, sum(seconds), sum(s * w.price_s for s, w in zip(seconds, lives, strict=True)))

    busy = [worker.busy_to - worker.busy_from for worker in lives]
    up = [worker.up_to - worker.up_from for worker in lives]
    lost = [worker.unheard_s for worker in lives]
    busy_line = line("busy", busy)
    fleet = (
        line("idle", [u - b for u, b in zip(up, busy, strict=True)]),
        line("lost", lost),
        FleetLine("unclaimed", busy_line.seconds - billed.spent.worker_s, busy_line.amount - billed.worker_amount),
    )
    return Report(unit, rows, fleet, line("total", [u + s for u, s in zip(up, lost, strict=True)]))

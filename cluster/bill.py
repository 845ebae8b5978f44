"""``tracehaul bill``: what traces were billed within some time, from what routers have written down."""

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from rich.table import Table

from cluster.config import ClusterConfig
from cluster.journal import TIMEOUT_S, rows_of, url_of
from cluster.plan import Plan
from cluster.rundir import ClusterFault, RunDir
from records.base import RecordsLost
from records.documents import Documents, Mark
from router.dispatch.bill_keeper import SHELF
from router.policy.bill_pages import Page, Report, report

PAGES_AT_ONCE = 500
COLUMNS = (
    "tenant",
    "trace",
    "steps",
    "prefill_s",
    "recompute_s",
    "decode_s",
    "moved_bytes",
    "resident_byte_s",
    "memory_byte_s",
    "disk_byte_s",
    "worker_amount",
    "amount",
)
SHOWN = ("tenant", "trace", "steps", "prefill_s", "recompute_s", "decode_s", "amount")


def moment(text: str, now: datetime) -> datetime:
    """``2026-11-30``, ``2026-11-30T12:00``, with a zone or in UTC; or so long ago: ``90m``, ``24h``, ``7d``.

    Raises:
        ValueError: it is no such thing.
    """
    units = {"m": "minutes", "h": "hours", "d": "days"}
    if text[-1:] in units and text[:-1].isdigit():
        return now - timedelta(**{units[text[-1]]: int(text[:-1])})
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"not a time: {text!r}; write for example 2026-11-30, 2026-11-30T12:00 or 24h") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


async def told(plan: Plan, run: RunDir, since: datetime, until: datetime) -> Report:
    """What all routers of a cluster have written down of that time: pages that begin in it.

    Raises:
        ClusterFault: it cannot be read here.
    """
    routers = [spec.name for spec in plan.nodes if spec.role == "router"]
    pages: list[Page] = []
    for router in routers[:1] if plan.config.database else routers:
        documents = _opened(plan.config, run, router)
        try:
            pages += await _pages(documents, since, until)
        except RecordsLost as error:
            raise ClusterFault(f"what {router} has written down cannot be read: {error}") from error
        finally:
            await documents.close()
    return report(pages)


def _opened(config: ClusterConfig, run: RunDir, router: str) -> Documents:
    from records.documents_sql import SqlDocuments

    if not config.database and not run.database(router).exists():
        raise ClusterFault(f"{router} has written nothing down here: there is no {run.database(router)}")
    return SqlDocuments(url_of(config, run, router), rows_of(config, router), TIMEOUT_S)


async def _pages(documents: Documents, since: datetime, until: datetime) -> list[Page]:
    until_us, after = _us(until), Mark(_us(since) - 1, "\U0010ffff")
    pages: list[Page] = []
    while found := await documents.list(SHELF, {}, after, PAGES_AT_ONCE):
        for document in found:
            if document.at_us >= until_us:
                return pages
            pages.append(msgspec.msgpack.decode(document.body, type=Page))
        after = found[-1].mark
    return pages


def _us(at: datetime) -> int:
    return int(at.timestamp() * 1e6)


def lines(found: Report) -> list[Sequence[str | int | float]]:
    """A row of :data:`COLUMNS` for each trace, then those of the fleet: their trace is ``(idle)``, ``(lost)`` or
    ``(unclaimed)``."""
    rows: list[Sequence[str | int | float]] = []
    for row in found.rows:
        spent, bill = row.bill.spent, row.bill
        times = (spent.prefill_s, spent.recompute_s, spent.decode_s, spent.moved_bytes)
        kept = (spent.resident_byte_s, spent.memory_byte_s, spent.disk_byte_s)
        rows.append((row.tenant, row.trace, row.steps, *times, *kept, bill.worker_amount, bill.amount))
    rows += [("", f"({line.what})", *([""] * 8), line.amount, line.amount) for line in found.fleet]
    return rows


def as_csv(found: Report) -> str:
    """With names of columns, and the unit of amounts in theirs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f"{name}_{found.unit}".replace(" ", "_") if "amount" in name else name for name in COLUMNS])
    writer.writerows(lines(found))
    return text.getvalue()


def as_table(found: Report) -> Table:
    """For people: the dearest first."""
    table = Table(box=None, pad_edge=False)
    for name in SHOWN:
        table.add_column(name, justify="left" if name in ("tenant", "trace") else "right")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in lines(found)]
    traces = len(found.rows)
    for row in (*sorted(rows[:traces], key=lambda row: -float(row["amount"])), *rows[traces:]):
        table.add_row(*(f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in SHOWN))
    total = found.total
    table.caption = f"workers: {total.seconds:.1f} s, which cost {total.amount:.6g} {found.unit or '-'}"
    return table

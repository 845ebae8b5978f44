"""Bills as they are written down, a page for each minute or so, and what pages say together. Pure.

Of workers and their accounts a page says how far they had come, in sums of a worker's life: so it makes no difference
how many routers have heard them, how often one has, or which of their minutes nobody has. What no worker tells is said
once, by who has the trace, and added up.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from router.policy.prices import FREE, HOUR_S, Bill, Prices, Tariff
from tracehaul.wire.ids import Generation, NodeId, TraceId
from tracehaul.wire.spent import NOTHING, Spent

Life = tuple[NodeId, Generation]


class TraceRow(msgspec.Struct, frozen=True, array_like=True):
    """What a trace was billed within a page, beside what workers' accounts say: for what lies in stores, less what is
    not billed of what lies on workers, as it is beyond the budget. All of it on pages that have no accounts."""

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
    is_gone: bool = False


class AccountRow(msgspec.Struct, frozen=True, array_like=True):
    """One account of a worker's life within a page."""

    account: int
    """Its number, within the life."""
    salt: str
    trace: TraceId
    tenant: str
    """Whom it counts for; empty: nobody, or whom is not known here."""
    began_s: float
    """When it was opened, by the worker's clock."""
    before: Spent
    """What it showed when the page began; of what its router did not know by then, when it was heard first."""
    spent: Spent
    """What it has shown last."""


class LifeRows(msgspec.Struct, frozen=True, array_like=True):
    """Those of one life."""

    node: NodeId
    generation: Generation
    price_s: float
    """Of a second of that worker."""
    rows: tuple[AccountRow, ...]


class Page(msgspec.Struct, frozen=True):
    """What a router has heard and billed from then on."""

    at_us: int
    """Unix time, in microseconds."""
    unit: str
    rows: tuple[TraceRow, ...]
    workers: tuple[WorkerRow, ...]
    accounts: tuple[LifeRows, ...] = ()
    tariff: Tariff = Tariff()
    """By which they are priced, beside workers' seconds."""
    until_us: int = 0
    """Unix time up to which it was heard; 0: by a version that bills what workers say, and not how far accounts are."""


class Heard(msgspec.Struct, frozen=True):
    """Of a page, how far workers were."""

    workers: tuple[WorkerRow, ...]
    until_us: int = 0


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
    ordered = sorted(pages, key=lambda page: page.at_us)
    rows: dict[_Whose, TraceRow] = {}
    lives: dict[Life, list[WorkerRow]] = {}
    for page in ordered:
        for row in page.rows:
            _add(rows, (row.salt, row.trace, row.tenant), row.steps, row.bill)
        for worker in page.workers:
            lives.setdefault((worker.node, worker.generation), []).append(worker)
    for whose, bill in _accounts(ordered):
        _add(rows, whose, 0, bill)
    rows = _named(rows)
    billed = sum((row.bill for row in rows.values()), FREE)
    unit = ordered[-1].unit if ordered else ""
    return _report(unit, [rows[key] for key in sorted(rows)], billed, [_life(rows) for rows in lives.values()])


_Whose = tuple[str, TraceId, str]


def _add(rows: dict[_Whose, TraceRow], whose: _Whose, steps: int, bill: Bill) -> None:
    known = rows.get(whose)
    rows[whose] = TraceRow(*whose, steps, bill) if known is None else _more(known, steps, bill)


def _more(row: TraceRow, steps: int, bill: Bill) -> TraceRow:
    return TraceRow(row.salt, row.trace, row.tenant, row.steps + steps, row.bill + bill)


def _named(rows: Mapping[_Whose, TraceRow]) -> dict[_Whose, TraceRow]:
    """What was heard by who did not know whose it is counts for whom the rest of its trace does; and no trace costs
    less than its workers' time, whatever was forgiven, or how often."""
    tenants = {(salt, trace): tenant for salt, trace, tenant in sorted(rows) if tenant}
    named: dict[_Whose, TraceRow] = {}
    for (salt, trace, tenant), row in rows.items():
        _add(named, (salt, trace, tenant or tenants.get((salt, trace), "")), row.steps, row.bill)
    return {whose: msgspec.structs.replace(row, bill=row.bill.within(row.bill.amount)) for whose, row in named.items()}


def _accounts(pages: Sequence[Page]) -> Iterable[tuple[_Whose, Bill]]:
    """What accounts have grown by, each growth at the price of the first page that knows of it."""
    since_s: dict[Life, float] = {}
    for worker in (worker for page in pages if page.until_us for worker in page.workers):
        life = worker.node, worker.generation
        since_s[life] = min(worker.up_from, since_s.get(life, worker.up_from))
    found: dict[tuple[Life, int], list[tuple[AccountRow, Prices]]] = {}
    for page in pages:
        for life in page.accounts:
            prices = Prices(msgspec.structs.replace(page.tariff, worker_hour=life.price_s * HOUR_S))
            for row in life.rows:
                found.setdefault(((life.node, life.generation), row.account), []).append((row, prices))
    for (life, _), rows in found.items():
        last = next((row for row, _ in reversed(rows) if row.tenant), rows[-1][0])
        covered = rows[0][0].before
        for row, _ in rows:
            covered = row.before if covered.is_later(row.before) else covered
        if life in since_s and last.began_s >= since_s[life]:
            covered = NOTHING  # these pages are to tell all of it, even if a router was lost with what it had heard
        bill = FREE
        for row, prices in rows:
            more = row.spent.since(covered)
            covered = covered if more == NOTHING else row.spent
            bill += prices.bill(None, more)
        yield (last.salt, last.trace, last.tenant), bill


class _Lived(NamedTuple):
    """Seconds of one life, and what they cost: each at the price of the first page that knows of it."""

    up: FleetLine
    busy: FleetLine
    lost: FleetLine


def _life(rows: Sequence[WorkerRow]) -> _Lived:
    up_to, busy_to = min(row.up_from for row in rows), min(row.busy_from for row in rows)
    up, busy = FleetLine("up", 0.0, 0.0), FleetLine("busy", 0.0, 0.0)
    for row in rows:
        up, busy = _grown(up, row.up_to - up_to, row.price_s), _grown(busy, row.busy_to - busy_to, row.price_s)
        up_to, busy_to = max(up_to, row.up_to), max(busy_to, row.busy_to)
    last = max(rows, key=lambda row: (row.up_to, row.is_gone, row.unheard_s))
    return _Lived(up, busy, _grown(FleetLine("lost", 0.0, 0.0), last.unheard_s, last.price_s))


def _grown(line: FleetLine, seconds: float, price_s: float) -> FleetLine:
    more = max(0.0, seconds)
    return FleetLine(line.what, line.seconds + more, line.amount + more * price_s)


def _report(unit: str, rows: Sequence[TraceRow], billed: Bill, lives: Sequence[_Lived]) -> Report:
    up, busy, lost = (_sum([life[at] for life in lives]) for at in range(3))
    fleet = (
        FleetLine("idle", up.seconds - busy.seconds, up.amount - busy.amount),
        FleetLine("lost", lost.seconds, lost.amount),
        FleetLine("unclaimed", busy.seconds - billed.spent.worker_s, busy.amount - billed.worker_amount),
    )
    return Report(unit, rows, fleet, FleetLine("total", up.seconds + lost.seconds, up.amount + lost.amount))


def _sum(lines: Sequence[FleetLine]) -> FleetLine:
    return FleetLine("", sum(line.seconds for line in lines), sum(line.amount for line in lines))

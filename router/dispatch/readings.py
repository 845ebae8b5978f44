"""How far workers' accounts are, as heartbeats say it, for the pages of bills. Pure.

A heartbeat is one look at all of a worker: how long it has been there, how much of that it was busy, and for whom. So
what is written of one life is whole as of some moment, whoever has heard it, and whatever became of the traces: a
router writes what it hears of all of them, its own or not.
"""

from collections.abc import Callable, Iterable, Iterator

from router.fleet.load import Key
from router.policy.bill_pages import AccountRow, LifeRows, WorkerRow
from router.policy.prices import Prices
from router.traces.trace import TraceKey
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.spent import NOTHING, Charge, Spent

LIVES_MAX = 10_000
"""Workers' lives that are remembered."""
FORGET_S = 300.0
"""What is not heard of for so long is not heard any more: workers close it long before."""


SETTLES_S = 15.0
"""In which a worker that lives has joined a router that is new."""
UNWRITTEN_MAX_S = 1.5
"""What was not written when a router died: what workers had not said yet, a second, and what it had heard since."""


class Shown:
    """One account of one life."""

    def __init__(self, charge: Charge, before: Spent, tenant: str) -> None:
        self.salt = charge.salt
        self.trace = charge.trace
        self.tenant = tenant
        self.began_s = charge.began_s
        self.before = self.spent = before
        """When the page began, and now."""
        self.heard_s = 0.0


class WorkerAccount:
    """One life of one worker, by its own clock."""

    def __init__(self, info: NodeInfo, up_s: float, busy_s: float) -> None:
        self.info = info
        self.up_from = self.up_to = up_s
        self.busy_from = self.busy_to = busy_s
        self.unheard_s = 0.0
        """Since it was heard last, where it is gone: nobody knows what it did then."""
        self.is_gone = False
        self.shown: dict[int, Shown] = {}
        """By the account's number."""
        self.of_page: dict[int, Shown] = {}
        """Those that the page tells of."""


class Readings:
    """What one router has heard of all workers. ``tenant_of`` says whom a trace counts for, as far as that is known."""

    def __init__(self, tenant_of: Callable[[TraceKey], str]) -> None:
        self._tenant_of = tenant_of
        self.workers: dict[Key, WorkerAccount] = {}
        """Those that are there, and those that were and are not written yet."""
        self.changed = False
        """Something is to be written; whoever does that says that it is not any more."""
        self.count = 0
        """Accounts that the page tells of."""
        self._left: dict[Key, tuple[WorkerRow, float]] = {}
        """Workers that an earlier router has heard, with when."""
        self._left_s = 0.0

    def heard(self, info: NodeInfo, load: NodeLoad, now_s: float, *, new: bool) -> list[tuple[Charge, Spent]]:
        """A worker has said how it is. Returns what rests there has taken since it was heard last, and whose it is.

        ``new``: its life began with this router. Of one that is met in the middle of its life nothing that it shows
        then is known to be new.
        """
        life = Key(info.node, info.generation)
        worker = self.workers.get(life)
        late = worker is None and not new
        if worker is None:
            worker = self.workers[life] = WorkerAccount(info, *((load.up_s, load.busy_s) if late else (0.0, 0.0)))
            self.changed = True
            self._met(life, now_s - load.up_s)
            while len(self.workers) > LIVES_MAX:
                self.count -= len(self.workers.pop(next(iter(self.workers))).of_page)
        worker.up_to, worker.busy_to = max(worker.up_to, load.up_s), max(worker.busy_to, load.busy_s)
        worker.info, worker.unheard_s, worker.is_gone = info, 0.0, False
        grown = [(charge, self._shown(worker, charge, now_s, late=late)) for charge in load.charges]
        return [(charge, more) for charge, more in grown if not charge.step and more != NOTHING]

    def _shown(self, worker: WorkerAccount, charge: Charge, now_s: float, *, late: bool) -> Spent:
        """How an account has grown."""
        number, spent = charge.sum
        one = worker.shown.get(number)
        before = NOTHING if one is None else one.spent
        if one is not None:
            one.heard_s = now_s
        if not spent.is_later(before):
            return NOTHING
        if one is None:
            before = spent if late else NOTHING
            tenant = charge.tenant or self._tenant_of((charge.salt, charge.trace))
            one = worker.shown[number] = Shown(charge, before, tenant)
        one.spent, one.heard_s = spent, now_s
        self.count += number not in worker.of_page
        worker.of_page[number] = one
        self.changed = True
        return spent.since(before)

    def gone(self, info: NodeInfo, silent_s: float) -> None:
        """A worker is no member any more, and was heard so long ago."""
        worker = self.workers.get(Key(info.node, info.generation))
        if worker is not None:
            worker.unheard_s, worker.is_gone = silent_s, True
            self.changed = True

    def left(self, rows: Iterable[tuple[WorkerRow, float]], now_s: float) -> None:
        """An earlier router has heard these workers, each up to then. Those that died while no router was there are
        told of by nobody: what they did after that is lost with them."""
        self._left_s = now_s
        found = sorted(rows, key=lambda one: (one[0].up_to, one[0].is_gone))
        last = {Key(row.node, row.generation): (row, heard_s) for row, heard_s in found}
        self._left = {life: one for life, one in last.items() if life not in self.workers and not one[0].is_gone}
        began_s = {life.node: now_s - worker.up_to for life, worker in self.workers.items() if not worker.is_gone}
        for life in [life for life in self._left if life.node in began_s]:
            self._died(life, began_s[life.node])

    def settle(self, now_s: float) -> None:
        """Who was left and has not come by now does not live."""
        if self._left and now_s >= self._left_s + SETTLES_S:
            for life in list(self._left):
                self._died(life, self._left_s)

    def _met(self, life: Key, began_s: float) -> None:
        """Who had its name before is gone, by then."""
        self._left.pop(life, None)
        for other in [other for other in self._left if other.node == life.node]:
            self._died(other, began_s)

    def _died(self, life: Key, by_s: float) -> None:
        row, heard_s = self._left.pop(life)
        info = NodeInfo(row.node, row.generation, "prefill" if row.role == "prefill" else "decode", "", pool=row.pool)
        self.workers[life] = WorkerAccount(info, row.up_to, row.busy_to)
        # Mostly they died together, some time in between: on average, half of that was its.
        self.gone(info, min(max(0.0, by_s - heard_s), UNWRITTEN_MAX_S) / 2)

    def turn(self, now_s: float) -> None:
        """A page begins where the last one ended; who was gone by then is forgotten."""
        self.workers = {life: worker for life, worker in self.workers.items() if not worker.is_gone}
        for worker in self.workers.values():
            worker.up_from, worker.busy_from = worker.up_to, worker.busy_to
            for one in worker.of_page.values():
                one.before = one.spent
            worker.of_page = {}
            worker.shown = {at: one for at, one in worker.shown.items() if now_s - one.heard_s <= FORGET_S}
        self.count = 0

    # --- rows -----------------------------------------------------------------------------------------------------

    def worker_rows(self, prices: Prices) -> tuple[WorkerRow, ...]:
        """Of all lives."""
        return tuple(_row(worker, prices) for worker in self.workers.values())

    def account_rows(self, prices: Prices, count_max: int) -> Iterator[tuple[LifeRows, ...]]:
        """What the page tells of accounts, in parts of at most so many."""
        part, left = list[LifeRows](), count_max
        for (node, generation), worker in self.workers.items():
            rows, price_s = [_account(number, one) for number, one in worker.of_page.items()], prices.second(node)
            while rows:
                part.append(LifeRows(node, generation, price_s, tuple(rows[:left])))
                rows, left = rows[left:], left - len(rows[:left])
                if not left:
                    yield tuple(part)
                    part, left = [], count_max
        if part:
            yield tuple(part)


def _account(number: int, one: Shown) -> AccountRow:
    return AccountRow(number, one.salt, one.trace, one.tenant, one.began_s, one.before, one.spent)


def _row(worker: WorkerAccount, prices: Prices) -> WorkerRow:
    info = worker.info
    return WorkerRow(
        info.node,
        info.generation,
        info.role,
        info.pool,
        prices.second(info.node),
        worker.up_from,
        worker.up_to,
        worker.busy_from,
        worker.busy_to,
        worker.unheard_s,
        worker.is_gone,
    )

"""What steps and contexts have taken so far, as workers say it, and whose that is. Pure: bills of traces come out.

Workers say sums of their lives, and say them more than once: with a step's last message, and with heartbeats. So what
counts is how a sum has grown, and it makes no difference how often it is heard. A step is its trace's bill's when it
has ended, whatever way; what comes later is added.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import ClassVar

from router.dispatch.readings import Readings
from router.dispatch.stats import BillStats
from router.fleet.load import Key
from router.policy.prices import FREE, UNLIMITED, Bill, Limits, Prices, share
from router.traces.events import Charged
from router.traces.machine import Traces
from router.traces.trace import TraceKey
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import BudgetExceeded, InvalidRequest
from tracehaul.wire.ids import NodeId, StepId
from tracehaul.wire.spent import NOTHING, Allowance, Reading, Spent

LATE_S = 60.0
"""For so long something may be heard of a step that has ended."""
HOLD_S = 2.5
"""So long it may take to hear what a step has taken that broke off."""
KEPT_MIN = 1024
"""With fewer traces that were billed between their steps it is not looked which of them are no more."""


class TraceLate(InvalidRequest):
    """A trace was to end by now."""

    code: ClassVar[str] = "trace_deadline_exceeded"


class Open:
    """One step."""

    def __init__(self, key: TraceKey, tenant: str, ends_s: float | None = None) -> None:
        self.key = key
        self.tenant = tenant
        self.ends_s = ends_s
        """When its trace is to have ended; None: that may take as long as it likes."""
        self.seen: dict[tuple[Key, int], Spent] = {}
        """What each account of a worker has shown."""
        self.bill = FREE
        self.told = FREE
        """Of it, what its trace knows."""
        self.forgiven = 0.0
        """Of it, what is not billed, as it is beyond the budget."""
        self.allotted: float | None = None
        """What it may take of its trace's budget; None: that has none."""
        self.price_s = 0.0
        """Of a second of all workers that it was given."""
        self.heard_s = 0.0
        """When it was heard last what it has taken."""
        self.done = False
        """Its terminal message has told all that it took."""
        self.unheard = 0.0
        """What it may have taken since it was heard last, where it broke off."""
        self.ended_s: float | None = None

    def held(self, now_s: float) -> float:
        """Of its trace's budget, what is not billed and may be spent."""
        if self.ended_s is None:
            return max(0.0, (self.allotted or 0.0) - self.bill.amount)
        return max(0.0, self.unheard) if now_s < self.ended_s + HOLD_S else 0.0


class Bills:
    """One router's.

    Args:
        traces: who they are for.
        send: tells them.
        prices: as of now; they may be set anew.
    """

    def __init__(self, traces: Traces, send: Callable[[Charged], None], prices: Prices) -> None:
        self.prices = prices
        self.mine: Callable[[TraceKey], bool] = lambda key: traces.get(key) is not None
        """Whether a trace that is known here is this router's to bill."""
        self.look: Callable[[], Awaitable[None]] | None = None
        """Charges what is held of traces in stores; to be called now and then."""
        self.on_billed: Callable[[TraceKey, str, Bill, int], None] = lambda key, tenant, bill, steps: None
        """Told once of all that is billed beside what :attr:`readings` say: whose, and how many steps have ended with
        it."""
        self.readings = Readings(self._tenant)
        self.stats = BillStats()
        self._traces = traces
        self._send = send
        self._steps: dict[StepId, Open] = {}
        self._over: deque[tuple[float, StepId]] = deque()
        """Steps that have ended, with when, the first to end first."""
        self._kept: dict[TraceKey, Bill] = {}
        """What traces were billed for between their steps, and do not know yet."""
        self._kept_max = KEPT_MIN
        """With more, it is looked which of these traces are no more."""

    @property
    def unit(self) -> str:
        """Of amounts."""
        return self.prices.tariff.unit

    # --- what a trace may cost ------------------------------------------------------------------------------------

    def total(self, key: TraceKey) -> Bill:
        """A trace's, with what runs."""
        trace = self._traces.get(key)
        bill = (trace.bill if trace is not None else FREE) + self._kept.get(key, FREE)
        for one in self._steps.values():
            if one.key == key and one.ended_s is None:
                bill = bill + one.bill
        return bill

    def limits(self, key: TraceKey, said: Limits) -> Limits:
        """Those that count for a step that says this."""
        trace = self._traces.get(key)
        return said.after(trace.limits if trace is not None else UNLIMITED)

    def deadline_s(self, key: TraceKey, limits: Limits, now_s: float) -> float | None:
        """When a trace is to have ended.

        Raises:
            TraceLate: it was by now.
        """
        if limits.deadline_s is None:
            return None
        trace = self._traces.get(key)
        at_s = (trace.began_s if trace is not None else now_s) + limits.deadline_s
        if at_s <= now_s:
            raise TraceLate(
                f"trace {key[1]} was to end {limits.deadline_s:g} s after it began: to go on, say a later deadline "
                "(x-trace-deadline-s) with its next call"
            )
        return at_s

    def entered(self, key: TraceKey, tenant: str, said: Limits, choices: int, now_s: float) -> Open:
        """A step is to begin; :meth:`began` follows if it does.

        Args:
            key: its trace.
            tenant: whom it counts for.
            said: of its trace, by its call.
            choices: how many steps of its call have still to begin, it among them.
            now_s: when.

        Raises:
            TraceLate, BudgetExceeded: its trace does not let it.
        """
        if self._traces.get(key) is None:
            self._kept.pop(key, None)  # of one of that name that is no more
        limits = self.limits(key, said)
        one = Open(key, tenant, self.deadline_s(key, limits, now_s))
        if limits.budget is not None:
            held = sum(other.held(now_s) for other in self._steps.values() if other.key == key)
            total = self.total(key).amount
            one.allotted = share(limits.budget - total - held, choices)
            if one.allotted <= 0.0:
                why = f"{total:.6g} of {limits.budget:.6g} {self.unit} are spent"
                if held:
                    why += f", and {held:.6g} are for steps that run or ended just now"
                raise BudgetExceeded(
                    f"the budget of trace {key[1]} is used up: {why}. To go on, say a larger one (x-trace-budget) with "
                    "its next call"
                )
        return one

    def began(self, step: StepId, one: Open, now_s: float) -> None:
        """It begins. Where its client has asked for it before, what that took is billed already."""
        if (before := self._steps.get(step)) is not None:
            one.seen = before.seen
        one.heard_s = now_s
        self._steps[step] = one

    def allowance(self, step: StepId, decode: NodeId, prefill: NodeId | None) -> Allowance | None:
        """What a step may still take, there; None: whatever it does."""
        one = self._steps.get(step)
        if one is None or one.allotted is None:
            return None
        left = max(0.0, one.allotted - one.bill.amount)
        prices = self.prices.second(prefill), self.prices.second(decode)
        one.price_s = sum(prices)
        return Allowance(left, *prices)

    def bill(self, step: StepId) -> Bill:
        """A step's so far."""
        one = self._steps.get(step)
        return FREE if one is None else one.bill

    # --- what is heard --------------------------------------------------------------------------------------------

    def heard(self, info: NodeInfo, load: NodeLoad, now_s: float, *, new: bool) -> None:
        """A worker has said how it is. ``new``: its life began with this router."""
        if info.role not in ("prefill", "decode"):
            return
        life = Key(info.node, info.generation)
        for charge, more in self.readings.heard(info, load, now_s, new=new):
            self._rested(life.node, (charge.salt, charge.trace), more)
        for charge in load.charges:
            one = self._steps.get(charge.step) if charge.step else None
            if one is not None and one.key[0] == charge.salt:
                one.heard_s = now_s if one.ended_s is None else one.heard_s
                self._grown(one, life, charge.reading)

    def gone(self, info: NodeInfo, silent_s: float) -> None:
        """A worker is no member any more, and was heard so long ago."""
        self.readings.gone(info, silent_s)

    def _tenant(self, key: TraceKey) -> str:
        trace = self._traces.get(key)
        return "" if trace is None else trace.tenant

    def told(self, life: Key, step: StepId, reading: Reading, *, done: bool) -> None:
        """A step's message says what it has taken of a worker. ``done``: it is its last."""
        one = self._steps.get(step)
        if one is not None and reading.account:
            one.done = one.done or done
            self._grown(one, life, reading)

    def _grown(self, one: Open, life: Key, reading: Reading) -> None:
        account = life, reading.account
        before = one.seen.get(account, NOTHING)
        more = reading.spent.since(before)
        if more == NOTHING:
            return
        one.seen[account] = reading.spent
        bill = self.prices.bill(life.node, more)
        one.bill, one.unheard = one.bill + bill, max(0.0, one.unheard - bill.amount)
        if one.ended_s is not None:
            self._settle(one, 0)

    def _rested(self, node: NodeId, key: TraceKey, more: Spent) -> None:
        whole = self.prices.bill(node, more)
        if self.mine(key) and (bill := self._keep(key, whole)) is not None:
            self._billed(key, self._tenant(key), bill, _forgiven(whole.amount - bill.amount), 0)

    def keeps(self, key: TraceKey, bill: Bill) -> None:
        """A trace is billed for what stores keep for it: up to its budget."""
        if (paid := self._keep(key, bill)) is not None:
            self._billed(key, self._tenant(key), paid, paid, 0)

    def _keep(self, key: TraceKey, bill: Bill) -> Bill | None:
        """What a trace pays of that between its steps; None: nobody knows it."""
        trace = self._traces.get(key)
        if trace is None:
            return None
        if trace.limits.budget is not None:
            bill = bill.within(max(0.0, trace.limits.budget - self.total(key).amount))
        self._kept[key] = self._kept.get(key, FREE) + bill
        if len(self._kept) > self._kept_max:
            self._kept = {each: kept for each, kept in self._kept.items() if self._traces.get(each) is not None}
            self._kept_max = KEPT_MIN + 2 * len(self._kept)
        return bill

    # --- ends -----------------------------------------------------------------------------------------------------

    def adopted(self, step: StepId, key: TraceKey, now_s: float) -> None:
        """A step ran when an earlier life of this router ended, and is over: what workers say of it is new."""
        trace = self._traces.get(key)
        if step not in self._steps and trace is not None:
            self._steps[step] = Open(key, trace.tenant)
            self._end(step, now_s)

    def ended(self, step: StepId, now_s: float) -> None:
        """A step is over, whatever way."""
        one = self._steps.get(step)
        if one is None:
            return
        if one.allotted is not None and not one.done:
            # No worker has spent more on it than the time that has passed.
            one.unheard = min(one.allotted - one.bill.amount, one.price_s * (now_s - one.heard_s))
        self._end(step, now_s)
        self._settle(one, 1)

    def _end(self, step: StepId, now_s: float) -> None:
        self._steps[step].ended_s = now_s
        self._over.append((now_s, step))
        while self._over[0][0] < now_s - LATE_S:
            _, gone = self._over.popleft()
            if (one := self._steps.get(gone)) is not None and one.ended_s is not None:
                del self._steps[gone]

    def _settle(self, one: Open, steps: int) -> None:
        bill = one.bill
        if one.allotted is not None:
            bill = bill.within(one.allotted)
        new = Bill(
            bill.spent.since(one.told.spent),
            bill.worker_amount - one.told.worker_amount,
            bill.amount - one.told.amount,
        )
        one.told = bill
        forgiven = one.bill.amount - bill.amount
        more, one.forgiven = forgiven - one.forgiven, forgiven
        self._send(Charged(one.key, new + self._kept.pop(one.key, FREE)))
        self._billed(one.key, one.tenant, new, _forgiven(more), steps)

    def _billed(self, key: TraceKey, tenant: str, bill: Bill, beside: Bill, steps: int) -> None:
        self.stats.billed(tenant, bill)
        if steps or beside != FREE:
            self.on_billed(key, tenant, beside, steps)


def _forgiven(amount: float) -> Bill:
    """Of what accounts say, that much is not billed."""
    return Bill(amount=-amount) if amount else FREE

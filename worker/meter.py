"""Who a worker worked for: each iteration's time, shared among the sequences that it served, and what lay in memory
meanwhile. Pure.

A sequence's share of an iteration is what its tokens are expected to take, among those of all. What was computed of it
before, for whoever, and is computed again is *recompute*; the rest of a prompt is *prefill*, its output *decode*. The
shares of an iteration add up to its time, so all that was shared is the time that the worker did not idle.
"""

from collections import OrderedDict
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from itertools import count
from math import inf

from tracehaul.engine.base import SequenceId
from tracehaul.wire.cluster import Rates
from tracehaul.wire.errors import BudgetExceeded
from tracehaul.wire.hashing import token_count
from tracehaul.wire.ids import StepId, TraceId
from tracehaul.wire.spent import NOTHING, Allowance, Charge, Reading, Spent
from tracehaul.wire.steps import DecodeStep, PrefillStep
from worker.rates import compute_s

TOLD_S = 5.0
"""What has changed is reported for so long: a router that answers hears a heartbeat in that time."""
KEPT_S = 120.0
"""What has not changed for so long is closed. What is kept is told to a router that is joined, which may be a new one:
so nothing is missing of what one was told that was killed before it had written that."""
UNTOLD_S = 30.0
"""Of a step that ended without its terminal message, for so long: its router may be on its way back."""
RESTED_S = 30.0
"""How often what rests is charged."""
TRACES_MAX = 4096
"""Of which it is remembered what their steps took; and so many of which it is what rests."""
NO_STEP = StepId("")
JUST_NOW = inf
"""Since it was looked at last."""


class Total:
    """What all steps of one trace have taken here."""

    def __init__(self, number: int, tenant: str, began_s: float) -> None:
        self.number = number
        self.tenant = tenant
        self.began_s = began_s
        self.last_step = NO_STEP
        self.changed_s = JUST_NOW
        self._accounts: dict[int, Account] = {}
        self._closed = NOTHING

    @property
    def reading(self) -> Reading:
        """What it shows."""
        return Reading(self.number, sum((one.reading.spent for one in self._accounts.values()), self._closed))

    def joined(self, account: "Account") -> None:
        """It counts from now on."""
        self._accounts[account.number], self.last_step = account, account.step

    def left(self, account: "Account") -> None:
        """It does not change any more."""
        del self._accounts[account.number]
        self._closed += account.reading.spent

    def is_quiet(self, now_s: float) -> bool:
        """Whether nothing has changed for long; asked now and then."""
        if self._accounts:
            self.changed_s = now_s
        return now_s - self.changed_s > KEPT_S


class Account:
    """What one attempt at a step, or one trace between its steps, has taken here."""

    def __init__(self, number: int, salt: str, trace: TraceId, step: StepId, total: Total | None = None) -> None:
        self.number = number
        self.total = total
        """None: of what rests there is none."""
        self.began_s = 0.0
        """By the worker's clock, of what has no total."""
        self.salt = salt
        self.trace = trace
        self.step = step
        self.known_tokens = 0
        """Leading tokens that were computed before: to compute them is to do it again."""
        self.prompt_tokens = 0
        """Those after these are output."""
        self.prefill_s = self.recompute_s = self.decode_s = self.resident_byte_s = 0.0
        self.moved_bytes = 0
        self.limit_s: float | None = None
        """When its time has come to this it has to stop."""
        self.open = True
        self.told = False
        """Its terminal message was."""
        self.changed_s = 0.0

    @property
    def worker_s(self) -> float:
        """All of its time."""
        return self.prefill_s + self.recompute_s + self.decode_s

    @property
    def exhausted(self) -> bool:
        """It may take no more."""
        return self.limit_s is not None and self.worker_s >= self.limit_s

    @property
    def reading(self) -> Reading:
        """What it shows."""
        spent = Spent(self.prefill_s, self.recompute_s, self.decode_s, self.moved_bytes, self.resident_byte_s)
        return Reading(self.number, spent)

    def allow(self, allowance: Allowance | None, prefill: Reading) -> None:
        """It may spend so much, of which a prefill worker has spent what it read."""
        if allowance is not None and allowance.decode_price_s > 0:
            left = allowance.amount - prefill.spent.worker_s * allowance.prefill_price_s
            self.limit_s = left / allowance.decode_price_s

    def prefill_max_s(self, allowance: Allowance | None, prefill: Reading) -> float | None:
        """How long a prefill worker may compute for the same step; None: as long as it takes."""
        if allowance is None or allowance.prefill_price_s <= 0:
            return None
        left = allowance.amount - self.worker_s * allowance.decode_price_s
        return max(0.0, left / allowance.prefill_price_s - prefill.spent.worker_s)

    def over(self) -> BudgetExceeded:
        """What ends it when it has taken what it may."""
        return BudgetExceeded(f"the budget of trace {self.trace} is used up")

    def check(self) -> None:
        """Raises BudgetExceeded if it has."""
        if self.exhausted:
            raise self.over()

    def computed(self, start: int, end: int, seconds: float, rates: Rates) -> None:
        """Computing its tokens from ``start`` to ``end`` took so long."""
        known, prompt = min(max(self.known_tokens, start), end), min(max(self.prompt_tokens, start), end)
        prompt = max(known, prompt)
        whole_s = compute_s(rates, start, end)
        again_s = seconds * compute_s(rates, start, known) / whole_s
        prefill_s = seconds * compute_s(rates, known, prompt) / whole_s
        self.recompute_s += again_s
        self.prefill_s += prefill_s
        self.decode_s += seconds - again_s - prefill_s
        self.known_tokens = max(self.known_tokens, end)


class Meter:
    """One worker's, from when it says for the first time how it is."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        """All that was shared."""
        self._began_s: float | None = None
        self._numbers = count(1)
        self._asked_s = 0.0
        """By the worker's clock: what is not told yet began after that."""
        self._steps: dict[int, Account] = {}
        self._totals: OrderedDict[tuple[str, TraceId], Total] = OrderedDict()
        self._rests: OrderedDict[tuple[str, TraceId], Account] = OrderedDict()
        self._resting: dict[SequenceId, tuple[Account, int, float]] = {}
        """What rests: whose, its bytes, and since when that is not charged."""
        self._rested_s = 0.0

    def up_s(self, now_s: float) -> float:
        """How long the worker has been there: since this was asked first."""
        if self._began_s is None:
            self._began_s = now_s
        return now_s - self._began_s

    @contextmanager
    def step(self, request: DecodeStep | PrefillStep) -> Generator[Account, None, None]:
        """An attempt at a step runs."""
        total = self._total(request.salt, request.trace, request.tenant)
        account = Account(next(self._numbers), request.salt, request.trace, request.step, total)
        total.joined(account)
        account.known_tokens, account.prompt_tokens = _known_tokens(request), _prompt_tokens(request)
        self._steps[account.number] = account
        try:
            yield account
        finally:
            account.open = False
            account.changed_s = JUST_NOW

    def _total(self, salt: str, trace: TraceId, tenant: str) -> Total:
        total = self._totals.pop((salt, trace), None)
        if total is None or total.tenant != tenant:
            total = Total(next(self._numbers), tenant, self._asked_s)
        self._totals[salt, trace] = total
        while len(self._totals) > TRACES_MAX:
            self._totals.popitem(last=False)
        return total

    def iterated(
        self, work: Sequence[tuple[Account | None, int, int]], seconds: float, rates: Rates, now_s: float
    ) -> None:
        """An iteration took so long. ``work``: whose tokens, how many it had, and how many were computed."""
        weights = [compute_s(rates, before, before + tokens) for _, before, tokens in work]
        total = sum(weights)
        if seconds <= 0 or total <= 0:
            return
        self.busy_s += seconds
        for (account, before, tokens), weight in zip(work, weights, strict=True):
            if account is not None:
                account.computed(before, before + tokens, seconds * weight / total, rates)
                account.changed_s = now_s

    # --- what rests -----------------------------------------------------------------------------------------------

    def rest(self, salt: str, trace: TraceId) -> Account:
        """A trace's, between its steps."""
        account = self._rests.get((salt, trace))
        if account is None:
            account = self._rests[salt, trace] = Account(next(self._numbers), salt, trace, NO_STEP)
            account.began_s = self._asked_s
            while len(self._rests) > TRACES_MAX:
                self._rests.popitem(last=False)
        return account

    def rests(self, sequence: SequenceId, salt: str, trace: TraceId, nbytes: int, now_s: float) -> None:
        """Nobody computes on it from now on."""
        assert sequence not in self._resting
        self._resting[sequence] = self.rest(salt, trace), nbytes, now_s

    def rested(self, sequence: SequenceId, now_s: float) -> None:
        """Somebody does, or it is gone."""
        account, nbytes, since_s = self._resting.pop(sequence)
        _lay(account, nbytes, now_s - since_s, now_s)

    def moved(self, salt: str, trace: TraceId, nbytes: int, now_s: float) -> None:
        """For a trace, between its steps."""
        account = self.rest(salt, trace)
        account.moved_bytes += nbytes
        account.changed_s = now_s

    # --- telling --------------------------------------------------------------------------------------------------

    def charges(self, now_s: float) -> tuple[Charge, ...]:
        """All that has changed of late; the same again if it is asked again."""
        self._look(now_s)
        rests = [account for account in self._rests.values() if now_s - account.changed_s <= TOLD_S]
        again = now_s - self._rested_s <= TOLD_S  # so that no router forgets a step that computes nothing for long
        steps = [one for one in self._steps.values() if again or not one.open or now_s - one.changed_s <= TOLD_S]
        totals: dict[int, Reading] = {}
        return tuple(_charge(one, totals) for one in (*steps, *rests) if one.changed_s)

    def history(self, now_s: float) -> tuple[Charge, ...]:
        """All that is kept: for a router that may have heard nothing of it."""
        self._look(now_s)
        totals: dict[int, Reading] = {}
        told = [_charge(one, totals) for one in (*self._steps.values(), *self._rests.values()) if one.changed_s]
        for (salt, trace), total in self._totals.items():
            if total.number not in totals:
                told.append(_closed(salt, trace, total))
        return tuple(told)

    def _look(self, now_s: float) -> None:
        """Charge what rests, close what is over, and let go of what was told."""
        if now_s - self._rested_s >= RESTED_S:
            self._rested_s = now_s
            for sequence, (account, nbytes, since_s) in self._resting.items():
                _lay(account, nbytes, now_s - since_s, now_s)
                self._resting[sequence] = account, nbytes, now_s
        for account in self._steps.values():
            if account.changed_s == JUST_NOW:
                account.changed_s = now_s
        over = [key for key, account in self._steps.items() if not account.open and now_s - _late_s(account) > 0]
        for key in over:
            account = self._steps.pop(key)
            assert account.total is not None
            account.total.left(account)
        for of in [of for of, total in self._totals.items() if total.is_quiet(now_s)]:
            del self._totals[of]
        for of in [of for of, one in self._rests.items() if one.changed_s and now_s - one.changed_s > KEPT_S]:
            del self._rests[of]
        self._asked_s = self.up_s(now_s)

    def check(self, resting: Collection[SequenceId]) -> None:
        """Assert that just these rest, and nothing runs."""
        assert self._resting.keys() == set(resting)
        assert not any(account.open for account in self._steps.values())


def _prompt_tokens(request: DecodeStep | PrefillStep) -> int:
    if isinstance(request, DecodeStep):
        return token_count(request.prompt)
    return token_count(request.tokens) - request.emitted


def _known_tokens(request: DecodeStep | PrefillStep) -> int:
    """Of a step that goes on, all but the last one that was said were computed before."""
    emitted = token_count(request.emitted) if isinstance(request, DecodeStep) else request.emitted
    return max(request.known_tokens, _prompt_tokens(request) + emitted - 1 if emitted else 0)


def _charge(one: Account, totals: dict[int, Reading]) -> Charge:
    """``totals``: those that are known."""
    total = one.total
    if total is None:
        return Charge(one.salt, one.trace, one.step, one.reading, began_s=one.began_s)
    if total.number not in totals:
        totals[total.number] = total.reading
    return Charge(one.salt, one.trace, one.step, one.reading, total.tenant, totals[total.number], began_s=total.began_s)


def _closed(salt: str, trace: TraceId, total: Total) -> Charge:
    """Of steps that are over, and were told."""
    return Charge(salt, trace, total.last_step, Reading(), total.tenant, total.reading, total.began_s)


def _lay(account: Account, nbytes: int, seconds: float, now_s: float) -> None:
    account.resident_byte_s += nbytes * seconds
    account.changed_s = now_s


def _late_s(account: Account) -> float:
    """Until when it is reported."""
    return account.changed_s + (TOLD_S if account.told else UNTOLD_S)

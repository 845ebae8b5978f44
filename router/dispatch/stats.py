"""What a router counts of the steps that it runs."""

import msgspec

from router.policy.prices import Bill
from tracehaul.wire.steps import StepUsage

TENANTS_MAX = 1000
"""Tenants that are told apart; more count as the last resort does."""
OTHER_TENANTS = "(others)"


class DispatchStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    steps: int = 0
    steps_finished: int = 0
    steps_failed: int = 0
    steps_aborted: int = 0
    steps_moved: int = 0
    steps_replaced: int = 0
    steps_again: int = 0
    """Steps that were asked for before, and began with what came of that."""
    tokens_again: int = 0
    """What they began with."""
    traces_refused: int = 0
    """First steps that were told to come later."""
    steps_waited: int = 0
    """Steps that waited in the router for their turn."""
    waited_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    missed_blocks: int = 0
    """Blocks that the store was said to hold and that did not arrive."""
    prefill_fallbacks: int = 0
    theoretical_tokens: int = 0
    """Of all steps that computed anything: what the trace had, as in :class:`router.traces.hits.Hits`."""
    indexed_tokens: int = 0
    chosen_tokens: int = 0
    delivered_tokens: int = 0
    recomputed_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Tokens that the trace had, computed again, by :data:`router.traces.hits.LossReason`."""
    pool_steps: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Steps that finished, by pool; like those that follow."""
    pool_prompt_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    pool_cached_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    pool_output_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])

    def finished(self, usage: StepUsage, pool: str) -> None:
        """A step has, in that pool."""
        for counts, tokens in (
            (self.pool_steps, 1),
            (self.pool_prompt_tokens, usage.prompt_tokens),
            (self.pool_cached_tokens, usage.computed_from),
            (self.pool_output_tokens, usage.output_tokens),
        ):
            counts[pool] = counts.get(pool, 0) + tokens
        self.steps_finished += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.computed_from
        self.output_tokens += usage.output_tokens
        self.missed_blocks += usage.missed_blocks
        self.prefill_fallbacks += usage.prefill_fallback != ""


class BillStats(msgspec.Struct):
    """What was billed in the router's life, for metrics."""

    worker_s: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    """Workers' time, by what it was for."""
    tenant_worker_s: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    tenant_amount: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    """For everything."""

    def billed(self, tenant: str, bill: Bill) -> None:
        """That tenant was."""
        known = self.tenant_worker_s
        name = tenant if tenant in known or len(known) < TENANTS_MAX else OTHER_TENANTS
        spent = bill.spent
        uses = (("prefill", spent.prefill_s), ("recompute", spent.recompute_s), ("decode", spent.decode_s))
        for use, seconds in uses:
            self.worker_s[use] = self.worker_s.get(use, 0.0) + seconds
        self.tenant_worker_s[name] = known.get(name, 0.0) + spent.worker_s
        self.tenant_amount[name] = self.tenant_amount.get(name, 0.0) + bill.amount

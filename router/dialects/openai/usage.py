"""OpenAI's ``usage``, with our extension. Pure."""

import msgspec
from msgspec import UNSET, UnsetType

from router.calls import events
from router.calls.call import Options
from router.policy.prices import Bill
from router.traces.hits import Hits


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """OpenAI's ``usage.prompt_tokens_details``."""

    cached_tokens: int
    """Prompt tokens that nobody in the cluster computed for this call."""


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """OpenAI's ``usage.completion_tokens_details``."""

    reasoning_tokens: int
    """Output tokens up to the end of the reasoning, where the model does some."""


class Cost(msgspec.Struct, frozen=True):
    """What the call has cost so far, and for what: see ``docs/bills.md``."""

    amount: float
    unit: str
    prefill_s: float
    """Seconds of workers' time, like the two that follow: computing prompts."""
    recompute_s: float
    """Computing again what was computed before."""
    decode_s: float
    """Computing output."""
    moved_bytes: int


class ClusterUsage(msgspec.Struct, frozen=True):
    """``usage.tracehaul``: where the prompts' KV came from, summed over the choices."""

    resident_tokens: int
    pulled_tokens: int
    pulled_bytes: int
    pull_s: float
    missed_blocks: int
    prefill_fallback: str
    hits: Hits
    """Prompt tokens that could have been cached, that were, and why the others were not."""
    cost: Cost


class Usage(msgspec.Struct, frozen=True):
    """OpenAI's ``usage`` with our extension."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    tracehaul: ClusterUsage


UsageField = Usage | UnsetType | None


def usage_of(told: events.Usage) -> Usage:
    """A call's usage."""
    return Usage(
        told.prompt_tokens,
        told.output_tokens,
        told.prompt_tokens + told.output_tokens,
        PromptTokensDetails(told.cached_tokens),
        CompletionTokensDetails(told.reasoning_tokens),
        ClusterUsage(
            told.resident_tokens,
            told.pulled_tokens,
            told.pulled_bytes,
            told.pull_s,
            told.missed_blocks,
            told.prefill_fallback,
            told.hits,
            cost_of(told.bill, told.unit),
        ),
    )


def cost_of(bill: Bill, unit: str) -> Cost:
    """A bill as clients see it."""
    spent = bill.spent
    return Cost(bill.amount, unit, spent.prefill_s, spent.recompute_s, spent.decode_s, spent.moved_bytes)


def chunk_usage(told: events.Usage | None, options: Options) -> UsageField:
    """What chunks other than a stream's last say of usage."""
    if told is not None:
        return usage_of(told)
    return None if options.include_usage else UNSET

"""What was seen of each step, and what that says of a server. Pure."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from bench.common.report import Result, percentile
from bench.replay.hits import Bound
from bench.replay.schedule import Completed

LAG_DEGRADED_S = 0.1
"""Where one step in a hundred was sent that much later than it should have been, the figures say less of the server
than of who sent it: too slow a client, or too few lanes for the recording's own times."""


class StepRecord(msgspec.Struct):
    """One step as its client saw it; times in seconds since the replay's start."""

    trace: str
    parent: str | None
    index: int
    due_s: float
    sent_s: float
    recorded_tokens: int
    """Of the prompt, in the recording."""
    asked_tokens: int
    """Of output."""
    ended_s: float = 0.0
    ttft_s: float | None = None
    itl_s: list[float] = []
    """Between one piece of output and the next."""
    prompt_tokens: int | None = None
    """As the server counts; None where it does not say."""
    cached_tokens: int | None = None
    cost: float | None = None
    """Likewise."""
    cost_unit: str = ""
    output_tokens: int = 0
    error: str | None = None
    """Its kind: ``connect``, ``timeout``, ``http 429``, ``stream``, ``cut off``, ``short``, ``malformed``."""
    detail: str = ""


class Hits(msgspec.Struct, frozen=True):
    """Shares of prompt tokens, over the steps whose cached tokens the server told."""

    delivered: float
    shared: float
    """What one infinite cache would have found."""
    session: float
    """What an infinite cache per trace would have found."""


def hits(records: Sequence[StepRecord], bounds: Sequence[Bound], lengths: Sequence[int]) -> Hits | None:
    """Delivered against theoretical, or None where nobody told.

    Args:
        records: in the order in which they were sent.
        bounds: one each, by :func:`bench.replay.hits.theoretical`.
        lengths: of the prompts, in the tokens that the bounds are counted in.
    """
    cached = prompts = shared = own = total = 0
    for record, bound, length in zip(records, bounds, lengths, strict=True):
        if record.error is None and record.cached_tokens is not None and record.prompt_tokens:
            cached += record.cached_tokens
            prompts += record.prompt_tokens
            shared += bound.shared
            own += bound.own
            total += length
    return Hits(cached / prompts, shared / total, own / total) if prompts and total else None


def summary(
    records: Sequence[StepRecord], completed: Sequence[Completed], wall_s: float, found: Hits | None
) -> list[Result]:
    """The figures of one replay."""
    good = [record for record in records if record.error is None]
    roots = [trace for trace in completed if trace.parent is None]
    per_h = 3600 / wall_s
    results = [
        Result("replay.steps_per_h", len(good) * per_h, "1/h"),
        Result("replay.traces_per_h", len(roots) * per_h, "1/h"),
        Result("replay.prompt_tokens_per_s", sum(r.prompt_tokens or r.recorded_tokens for r in good) / wall_s, "1/s"),
        Result("replay.output_tokens_per_s", sum(r.output_tokens for r in good) / wall_s, "1/s"),
    ]
    results += _shares("replay.jct", [trace.ended_s - trace.began_s for trace in roots])
    results += _shares("replay.ttft", [r.ttft_s for r in good if r.ttft_s is not None])
    results += _shares("replay.itl", [gap_s for r in good for gap_s in r.itl_s])
    results += _shares("replay.step", [r.ended_s - r.sent_s for r in good])
    results += _costs(records, roots)
    if found is not None:
        ratio = found.delivered / found.shared if found.shared else None
        results.append(Result("replay.hits.shared", found.shared, "1"))
        results.append(Result("replay.hits.session", found.session, "1"))
        results.append(Result("replay.hits.delivered", found.delivered, "1", "replay.hits.shared", ratio))
    lag = _shares("replay.lag", [r.sent_s - r.due_s for r in records])
    results += [*lag, Result("replay.degraded", float(degraded(records)), "1")]
    results.append(Result("replay.steps_done", len(good), "1"))
    results.append(Result("replay.errors", len(records) - len(good), "1"))
    kinds = Counter(record.error for record in records if record.error is not None)
    results += [Result(f"replay.errors.{kind.replace(' ', '_')}", count, "1") for kind, count in sorted(kinds.items())]
    return results


def _costs(records: Sequence[StepRecord], roots: Sequence[Completed]) -> list[Result]:
    """Of a task, with all its subagents, as far as the server tells."""
    parents = {record.trace: record.parent for record in records}
    costs = {root.trace: 0.0 for root in roots}
    told = [record for record in records if record.cost is not None]
    for record in told:
        task = record.trace
        while (parent := parents.get(task)) is not None:
            task = parent
        if task in costs:
            costs[task] += record.cost or 0.0
    if not told or not costs:
        return []
    unit = told[0].cost_unit
    return [Result("replay.cost.task", sum(costs.values()) / len(costs), unit)]


def degraded(records: Sequence[StepRecord]) -> bool:
    """Whether steps were sent too late for the figures to be the server's."""
    return bool(records) and percentile([r.sent_s - r.due_s for r in records], 0.99) > LAG_DEGRADED_S


def _shares(name: str, values: Sequence[float]) -> list[Result]:
    if not values:
        return []
    return [Result(f"{name}.p{round(share * 100)}", percentile(values, share), "s") for share in (0.5, 0.9, 0.99)]

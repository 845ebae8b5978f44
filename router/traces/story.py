"""A trace's story in plain words, from what the router remembers of it. Pure."""

from collections.abc import Iterable, Iterator, Mapping

from router.traces.decisions import Asked, Decision, Ended, Moved, Placed, Recalled, Replaced, Retained
from router.traces.hits import Hits
from router.traces.views import CostView, DecisionView, StepView, TraceView
from tracehaul.wire.ids import StepId

LOSSES: Mapping[str, str] = {
    "evicted": "had been evicted",
    "store_lost": "were lost with their store node",
    "never_published": "had never reached the store",
    "worker_gone": "were lost with the worker that had them",
    "placement": "were held elsewhere, and computing them was the choice",
    "index_stale": "were believed to be in the store and were not",
    "missed": "did not arrive from the store, or arrived wrong",
    "prefill_failed": "were lost when the prefill worker failed",
    "worker_failed": "were lost when the step's worker failed",
    "partial_block": "are less than a block, which nobody else can share",
}
"""What became of tokens, by :data:`router.traces.hits.LossReason`."""


def story(trace: TraceView) -> list[str]:
    """One line per event, the oldest first, after a line for the trace as it is now."""
    lines = [_now(trace)]
    if trace.cost.amount or trace.cost.budget is not None or trace.cost.deadline_in_s is not None:
        lines.append(_cost(trace.cost))
    if trace.tools:
        uses = [
            f"{name} {tool.uses}x (mean {_s(tool.mean_s)}, longest {_s(tool.longest_s)})"
            for name, tool in sorted(trace.tools.items())
        ]
        lines.append(f"Its tools: {', '.join(uses)}.")
    if trace.children:
        lines.append(f"Forked from it: {', '.join(trace.children)}.")
    if trace.steps_count > len(trace.steps):
        lines.append(f"Of its {trace.steps_count} steps the last {len(trace.steps)} are remembered.")
    steps = {step.id: step for step in trace.steps}
    return lines + events(trace.decisions, steps)


def events(decisions: Iterable[DecisionView], steps: Mapping[StepId, StepView] | None = None) -> list[str]:
    """A line for each decision, with what is known of its step."""
    return [f"{_s(entry.ago_s):>8} ago  {_event(entry, steps or {})}" for entry in decisions]


def _now(trace: TraceView) -> str:
    origin = f", forked from {trace.parent}" if trace.parent is not None else ""
    state: str = trace.state
    if trace.suspension is not None:
        pause = trace.suspension
        state = f"suspended for {_s(pause.for_s)} (expected: {_s(pause.expected_s)})"
    elif trace.idle_s is not None:
        state += f" for {_s(trace.idle_s)}"
    service = trace.service
    return (
        f"Trace {trace.id}{origin} is {state}: {_count(trace.steps_count, 'step')} in {_s(trace.age_s)}, "
        f"a context of {_count(trace.context_tokens, 'token')} (home {trace.home or 'nowhere'}, "
        f"warm on {trace.warm or 'no worker'}); {service.tokens_computed} prompt tokens computed, "
        f"{service.tokens_decoded} decoded, {_s(service.seconds)} of service."
    )


def _cost(cost: CostView) -> str:
    kept_s = cost.resident_byte_s + cost.memory_byte_s + cost.disk_byte_s
    line = (
        f"It has cost {cost.amount:.6g} {cost.unit}: {_s(cost.prefill_s)} of workers' time for prompts, "
        f"{_s(cost.recompute_s)} to compute again what had been, {_s(cost.decode_s)} for output; "
        f"{cost.moved_bytes / 1e6:.3g} MB moved, {kept_s / 3600e9:.3g} GB hours kept"
    )
    if cost.budget is not None:
        line += f"; its budget is {cost.budget:.6g}"
    if cost.deadline_in_s is not None:
        ahead_s = cost.deadline_in_s
        line += f"; its deadline is in {_s(ahead_s)}" if ahead_s > 0 else f"; its deadline was {_s(-ahead_s)} ago"
    return line + "."


def _event(entry: DecisionView, steps: Mapping[StepId, StepView]) -> str:
    decision: Decision = entry.decision
    match decision:
        case Placed():
            return _placed(decision, steps.get(decision.step))
        case Moved(step, decode, error, emitted):
            kept = f", the {emitted} tokens that the client has are kept" if emitted else ""
            return f"Step {step}: {decode or 'finding a worker'} failed ({error}); it goes on elsewhere{kept}."
        case Replaced(step, worker, wait_s, cost_s):
            return (
                f"Step {step} would wait {_s(wait_s)} more at {worker}, and another place has become free: all of it "
                f"is expected to take {_s(cost_s)} there."
            )
        case Ended():
            return _ended(decision)
        case Retained():
            return _retained(decision)
        case Recalled(decode, why, gained, tokens, seconds):
            came = f"{gained} tokens came back to {decode}" if gained else f"nothing came back to {decode}"
            return f"As {why}, {came} in {_s(seconds)}: {tokens} are there."
        case Asked(what, inputs):
            said = ", ".join(f"{name} {value}" for name, value in inputs.items() if value is not None)
            return f"The client asked to {what}{f' ({said})' if said else ''}."


def _placed(placed: Placed, step: StepView | None) -> str:
    before = ""
    if step is not None and step.gap_s is not None:
        before = f", {_s(step.gap_s)} after the one before ({', '.join(step.tools) or 'no tool'})"
    warm = f"{placed.warm} kept {placed.warm_tokens}" if placed.warm is not None else "no worker kept any"
    load = ", ".join(f"{node} {running}" for node, running in placed.running.items())
    cost = f", {_s(placed.cost_s)} of work and waiting" if placed.cost_s else ""
    if placed.warm_cost_s is not None and placed.decode != placed.warm:
        cost += f", {_s(placed.warm_cost_s)} at {placed.warm}"
    pool = f" of pool {placed.pool}" if placed.pool else ""
    slow = ""
    if placed.pull_tokens is not None:
        slow = f" (what the store has after token {placed.pull_tokens} comes up too slowly)"
    waited = f" after {_s(placed.waited_s)} in line" if placed.waited_s else ""
    prefill = (
        f"what is missing is computed by {placed.prefill}" if placed.prefill else "what is missing is computed there"
    )
    return (
        f"Step {placed.step}{before}: {_count(placed.prompt_tokens, 'token')}, of which the stores held "
        f"{placed.indexed_tokens} and {warm}. Put on {placed.decode}{pool}{waited} ({placed.reason}{cost}; running: "
        f"{load}), expecting {placed.expected_tokens} cached{slow}; {prefill}, new blocks go to "
        f"{placed.home or 'no store'}."
    )


def _ended(ended: Ended) -> str:
    return (
        f"Step {ended.step} ended ({ended.ending}) after {_s(ended.seconds)} with "
        f"{_count(ended.output_tokens, 'token')}. {' '.join(_hits(ended.hits))}"
    ).rstrip()


def _retained(retained: Retained) -> str:
    tools, plan, now = retained.tools, retained.retention, retained.situation
    what = "It waits" if tools is None else f"It runs {', '.join(tools)}" if tools else "It waits for an answer"
    pin = f"{_s(plan.pin_s)} in the store" if plan.pin_s else "no claim on the store's memory"
    back = "when asked for" if plan.recall_s is None else f"after {_s(plan.recall_s)}"
    return (
        f"{what}: {_s(retained.median_s)} expected, at most {_s(retained.longest_s)} (seen "
        f"{_count(retained.seen, 'time')}). {_count(now.tokens, 'token')} that take {_s(now.reload_s)} to pull are "
        f"worth {pin}; it comes back {back}."
    )


def _hits(hits: Hits | None) -> Iterator[str]:
    if hits is None:
        yield "Nothing of it was computed."
        return
    yield f"Cached: {hits.delivered} of the {hits.theoretical} tokens that its trace had."
    if (changed := hits.changed) is not None:
        what = f"its {changed.section}" if changed.message is None else f"message {changed.message} ({changed.section})"
        yield f"Its client changed {what}: {changed.tokens} tokens more could not be used (prompt_changed)."
    for reason, tokens in sorted(hits.losses.items(), key=lambda loss: -loss[1]):
        yield f"{tokens} {LOSSES.get(reason, reason)}."


def _s(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"

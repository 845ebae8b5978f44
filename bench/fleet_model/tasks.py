"""Recordings as what a simulated fleet is given to do. Pure."""

from collections.abc import Iterable, Sequence

import msgspec

from bench.replay.parse import parse
from bench.replay.recording import Blocks, Step, Trace
from sim.fleet.work import Call, Scope, Task, shared_tokens


def tasks_in(documents: Iterable[tuple[str, bytes]], block_tokens: int, context_max: int) -> list[Task]:
    """All that is recorded in these documents (name, bytes), one after the other: a recording at full size names
    fifty million blocks. A trace ends before the first step that would be longer than ``context_max``.

    Raises:
        ValueError: there is none, or it is of no use here.
    """
    tasks: list[Task] = []
    for name, data in documents:
        if name.endswith((".json", ".jsonl")):
            cut = [_cut(trace, context_max) for trace in parse([(name, data)])]
            tasks += tasks_of([trace for trace in cut if trace.steps], block_tokens)
    if not tasks:
        raise ValueError("there is no recording here: no *.json, no *.jsonl")
    return sorted(tasks, key=lambda task: task.name)


def _cut(trace: Trace, context_max: int) -> Trace:
    steps: list[Step] = []
    for step in trace.steps:
        if step.prompt.tokens + step.output_tokens > context_max:
            break
        children = tuple(child for one in step.children if (child := _cut(one, context_max)).steps)
        steps.append(msgspec.structs.replace(step, children=children))
    return msgspec.structs.replace(trace, steps=tuple(steps))


def tasks_of(traces: Sequence[Trace], block_tokens: int, gap_s: float | None = None, scale: float = 1.0) -> list[Task]:
    """Traces as they were recorded, cut into blocks of so many tokens.

    Args:
        traces: of prompts whose blocks have names.
        block_tokens: what the simulated stores keep or lose as one.
        gap_s: the longest gap, after scaling; None: as recorded.
        scale: gaps are divided by it.

    Raises:
        ValueError: the recording has texts instead.
    """
    scopes: dict[str, Scope] = {}
    return [_task(trace, block_tokens, scopes, gap_s, scale) for trace in traces]


def _task(
    trace: Trace,
    block_tokens: int,
    scopes: dict[str, Scope],
    gap_s: float | None,
    scale: float,
    before: tuple[int, ...] = (),
) -> Task:
    """``before``: the names in the prompt of the step that started it."""
    calls: list[Call] = []
    for step in trace.steps:
        prompt = step.prompt
        if not isinstance(prompt, Blocks):
            raise ValueError("this recording does not name its prompts' blocks: the fleet model needs one that does")
        scope = scopes.setdefault(prompt.scope, Scope(block_tokens))
        gap = step.gap_s / scale
        calls.append(
            Call(
                prompt=prompt.tokens,
                output=step.output_tokens,
                gap_s=gap if gap_s is None else min(gap, gap_s),
                keeps=shared_tokens(before, prompt.ids, prompt.block_tokens, prompt.tokens),
                chain=scope.chain(prompt.ids, prompt.block_tokens, prompt.tokens),
                children=tuple(_task(child, block_tokens, scopes, gap_s, scale, prompt.ids) for child in step.children),
            )
        )
        before = prompt.ids
    return Task(trace.trace, tuple(calls), trace.start_s, scoped=trace.start_s is None)

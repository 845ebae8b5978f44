"""Which traces are replayed, and how much of them; and forks made up. Pure."""

import random
from collections.abc import Sequence

import msgspec

from bench.replay.recording import Blocks, Step, Trace


class Limits(msgspec.Struct, frozen=True):
    """What is taken of a recording."""

    traces_max: int = 24
    skip_steps: int = 0
    """Leading steps left out: a session is resumed in its middle."""
    steps_min: int = 1
    """Traces that are shorter without those are left out."""
    steps_max: int = 12
    """Of each trace, subagents' too."""
    context_min: int = 0
    """Traces whose longest prompt is shorter are left out."""
    context_max: int = 8000
    """A trace is cut off before the first longer prompt with its output."""
    output_max: int = 128
    """Tokens asked for per step."""
    prompt_tokens_max: int | None = None
    """Of all traces together."""
    subagents_only: bool = False
    """Only traces that start others."""
    common_prefix: bool = False
    """Tools and system prompt are the same tokens in all traces, as recorded; else each trace has its own."""


def choose(traces: Sequence[Trace], limits: Limits, seed: int) -> list[Trace]:
    """The first traces within the limits, in an order that the seed decides; those with times stay in their order."""
    order = list(traces)
    if all(trace.start_s is None for trace in order):
        random.Random(seed).shuffle(order)
    chosen: list[Trace] = []
    total = 0
    for trace in order:
        cut = _cut(trace, limits, limits.skip_steps)
        if len(cut.steps) < min(limits.steps_min, limits.steps_max) or not cut.steps:
            continue
        if max(step.prompt.tokens for step in cut.steps) < limits.context_min:
            continue
        if limits.subagents_only and not any(step.children for step in cut.steps):
            continue
        if limits.prompt_tokens_max is not None and chosen and total + cut.prompt_tokens > limits.prompt_tokens_max:
            continue
        chosen.append(cut)
        total += cut.prompt_tokens
        if len(chosen) >= limits.traces_max:
            break
    return chosen


def shrink(trace: Trace, divisor: int) -> Trace:
    """The same with every length divided: prompts, their blocks and outputs. What is shared stays shared, block by
    block; ``divisor`` divides the length of the blocks."""
    steps: list[Step] = []
    for step in trace.steps:
        assert isinstance(step.prompt, Blocks)
        assert step.prompt.block_tokens % divisor == 0
        prompt = msgspec.structs.replace(
            step.prompt,
            block_tokens=step.prompt.block_tokens // divisor,
            tokens=-(-step.prompt.tokens // divisor),
        )
        children = tuple(shrink(child, divisor) for child in step.children)
        steps.append(Step(prompt, max(1, step.output_tokens // divisor), step.gap_s, children))
    return msgspec.structs.replace(trace, steps=tuple(steps))


def whole_groups(traces: Sequence[Trace], one_in: int, seed: int) -> list[Trace]:
    """Of all traces that begin with the same block either all or none, one group in so many; in their order.

    A part of a recording has about the sharing of the whole only if what shares stays together: in the first requests
    there is nothing yet to be shared.
    """
    firsts = [prompt.ids[:1] for trace in traces if isinstance(prompt := trace.steps[0].prompt, Blocks)]
    assert len(firsts) == len(traces)
    groups = list(dict.fromkeys(firsts))
    chosen = set(random.Random(seed).sample(groups, -(-len(groups) // one_in)))
    return [trace for trace, first in zip(traces, firsts, strict=True) if first in chosen]


def _cut(trace: Trace, limits: Limits, skip: int) -> Trace:
    steps: list[Step] = []
    for step in trace.steps[skip : skip + limits.steps_max]:
        output = min(step.output_tokens, limits.output_max)
        if step.prompt.tokens + output > limits.context_max:
            break
        children = tuple(child for child in (_cut(c, limits, 0) for c in step.children) if child.steps)
        prompt = step.prompt
        if isinstance(prompt, Blocks) and not limits.common_prefix:
            prompt = msgspec.structs.replace(prompt, common_blocks=0)
        gap_s = step.gap_s if steps else 0.0
        steps.append(Step(prompt, output, gap_s, children))
    return msgspec.structs.replace(trace, steps=tuple(steps))


class Forks(msgspec.Struct, frozen=True):
    """Made-up traces that fork: a parent's context continued by many children at once, which the parent then joins."""

    children: int
    parents: int = 1
    context_tokens: int = 4096
    steps: int = 3
    """Of each child."""
    new_tokens: int = 128
    """Per step of a child."""
    gap_s: float = 0.3
    """Between a child's steps."""


FORK_BLOCK_TOKENS = 32
PARENT_OUTPUT, CHILD_OUTPUT, JOIN_OUTPUT = 16, 24, 32
JOIN_TOKENS = 64
"""What each child's result adds to its parent's context."""


def forks(shape: Forks, seed: int) -> list[Trace]:
    """The parents. The same seed makes the same tokens."""
    return [_parent(shape, f"fork-{seed}-{number}") for number in range(shape.parents)]


def _parent(shape: Forks, trace: str) -> Trace:
    base = tuple(range(shape.context_tokens // FORK_BLOCK_TOKENS))
    new = shape.new_tokens // FORK_BLOCK_TOKENS

    def step(ids: tuple[int, ...], output: int, gap_s: float = 0.0, children: tuple[Trace, ...] = ()) -> Step:
        return Step(Blocks(trace, ids, FORK_BLOCK_TOKENS, len(ids) * FORK_BLOCK_TOKENS), output, gap_s, children)

    children: list[Trace] = []
    for child in range(shape.children):
        first = (child + 1) * 1_000_000
        own = [base + tuple(range(first, first + (n + 1) * new)) for n in range(shape.steps)]
        steps = tuple(step(ids, CHILD_OUTPUT, shape.gap_s if n else 0.0) for n, ids in enumerate(own))
        children.append(Trace(f"{trace}.child-{child}", steps, trace))
    joined = base + tuple(range(len(base), len(base) + shape.children * JOIN_TOKENS // FORK_BLOCK_TOKENS))
    return Trace(trace, (step(base, PARENT_OUTPUT, children=tuple(children)), step(joined, JOIN_OUTPUT)))

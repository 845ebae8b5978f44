"""Seeded agent traces: what the clients of a simulated cluster do. Pure."""

import random
from collections.abc import Sequence
from typing import Literal

import msgspec

from sim.text import END
from tracehaul.wire.ids import TraceId
from tracehaul.wire.steps import Sampling

Dialect = Literal["completions", "chat"]

TURN_TOKENS = 4
"""What a conversation's template adds to a step: about its new message, and about the answer."""


class StepPlan(msgspec.Struct, frozen=True):
    """One model call: its prompt is the trace so far and ``new_tokens``."""

    new_tokens: tuple[int, ...]
    """What the tool or the user says; after the last output."""
    think_s: float
    """The gap before it: a tool runs, a person reads."""
    sampling: Sampling
    hang_up_after: int | None = None
    """The client leaves after that many output tokens (0: while it waits for the first); None: it stays."""
    hang_up_delay_s: float = 0.0
    """How long after them it leaves."""
    stream: bool = True
    """The answer comes as it grows."""


class TracePlan(msgspec.Struct, frozen=True):
    """One agent task."""

    trace: TraceId
    salt: str
    start_s: float
    fork_of: TraceId | None
    """Its context starts as a copy of that trace's as of the end of step ``fork_step``."""
    fork_step: int
    steps: tuple[StepPlan, ...]
    dialect: Dialect = "completions"
    """What its client speaks; the same as the trace's that it forks from."""
    background: bool = False
    """Nobody waits for its steps."""


class Mix(msgspec.Struct, frozen=True):
    """How large and how unruly the traces are."""

    traces: int = 20
    steps_min: int = 3
    steps_max: int = 8
    system_tokens_max: int = 60
    new_tokens_max: int = 40
    output_tokens_max: int = 24
    think_mean_s: float = 1.0
    spread_s: float = 10.0
    """Traces start within that time."""
    fork_share: float = 0.2
    hang_up_share: float = 0.1
    long_gap_share: float = 0.05
    """Gaps of half a minute: leases end in them."""
    tenants: int = 2
    background_share: float = 0.0
    systems: int = 3
    """Distinct system prompts that traces share."""


def make_traces(seed: int, mix: Mix, vocab_size: int) -> tuple[TracePlan, ...]:
    """The same traces for the same arguments, in every process. A fork names an earlier trace of the result."""
    rng = random.Random(f"traces {seed}")  # noqa: S311 - reproducible is the point
    systems = [_text(rng, rng.randint(1, mix.system_tokens_max), vocab_size) for _ in range(mix.systems)]
    plans: list[TracePlan] = []
    for index in range(mix.traces):
        parents = [plan for plan in plans if plan.fork_of is None]
        parent = rng.choice(parents) if parents and rng.random() < mix.fork_share else None
        count = rng.randint(mix.steps_min, mix.steps_max)
        first = _text(rng, rng.randint(1, mix.new_tokens_max), vocab_size)
        if parent is None:
            first = rng.choice(systems) + first
        steps = [_step(rng, mix, first if at == 0 else None, vocab_size) for at in range(count)]
        plans.append(
            TracePlan(
                trace=TraceId(f"trace-{index}"),
                salt=parent.salt if parent else f"tenant-{rng.randrange(mix.tenants)}",
                start_s=rng.uniform(0, mix.spread_s),
                fork_of=parent.trace if parent else None,
                fork_step=rng.randrange(len(parent.steps)) if parent else 0,
                steps=tuple(steps),
                dialect=parent.dialect if parent else "chat" if index % 2 else "completions",
                background=random.Random(f"background {index} {seed}").random() < mix.background_share,  # noqa: S311
            )
        )
    return tuple(plans)


def context_max(mix: Mix) -> int:
    """No sequence of such traces is longer: a fork of a longest trace."""
    per_step = mix.new_tokens_max + mix.output_tokens_max + TURN_TOKENS
    return mix.system_tokens_max + 2 * mix.steps_max * per_step


def _text(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(vocab_size) for _ in range(count))


def _step(rng: random.Random, mix: Mix, first: Sequence[int] | None, vocab_size: int) -> StepPlan:
    think_s = 30.0 if rng.random() < mix.long_gap_share else rng.expovariate(1 / mix.think_mean_s)
    hangs_up = rng.random() < mix.hang_up_share
    output = rng.randint(1, mix.output_tokens_max)
    seed = rng.getrandbits(32)
    return StepPlan(
        new_tokens=tuple(first) if first is not None else _text(rng, rng.randint(1, mix.new_tokens_max), vocab_size),
        think_s=think_s,
        sampling=Sampling(
            max_tokens=output,
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([0.5, 1.0]),
            top_k=rng.choice([0, 3]),
            presence_penalty=1.5 if seed & 1 else 0.0,
            frequency_penalty=0.5 if seed & 2 else 0.0,
            repetition_penalty=1.5 if seed & 4 else 1.0,
            logprobs=2 if seed & 8 else None,
            seed=seed,
            stop_tokens=(END,),
            min_tokens=min(rng.choice([0, 0, 2]), output),
        ),
        hang_up_after=rng.randrange(output) if hangs_up else None,
        hang_up_delay_s=rng.choice([0.0, 0.001, 0.02]) if hangs_up else 0.0,
        stream=hangs_up or seed & 48 != 0,
    )

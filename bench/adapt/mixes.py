"""Three mixes of work that want different fleets, as what a simulated one is given to do."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from sim.fleet.work import Call, Task


class Kind(NamedTuple):
    """Traces of one kind. Tokens; each figure is the middle of a range from half of it to one and a half."""

    traces: int
    """So many of them among all."""
    first: int
    """The first prompt."""
    more: int
    """What each further prompt has that is new, beside the answer before it."""
    output: int
    steps: int
    gap_s: float
    deadline_s: float
    """Of each step."""
    children: int = 0
    """Traces that the first step starts, all with its context."""


_ASKS = Kind(64, first=3_000, more=300, output=250, steps=12, gap_s=1.0, deadline_s=2.5)
"""Short questions, whose answers somebody waits for."""

MIXES: dict[str, Sequence[Kind]] = {
    "prompts": (Kind(32, first=40_000, more=10_000, output=40, steps=8, gap_s=1.0, deadline_s=60.0), _ASKS),
    "answers": (Kind(64, first=2_000, more=200, output=1200, steps=6, gap_s=1.0, deadline_s=60.0),),
    "forks": (Kind(64, first=30_000, more=600, output=200, steps=3, gap_s=1.0, deadline_s=40.0, children=8),),
}


def tasks_of(mix: str, block_tokens: int, seed: int) -> list[Task]:
    """Its traces."""
    rng = random.Random(seed)
    names = _Names()
    return [
        _trace(kind, f"{at}.{number}", rng, names, block_tokens, ())
        for at, kind in enumerate(MIXES[mix])
        for number in range(kind.traces)
    ]


class _Names:
    def __init__(self) -> None:
        self.count = 0

    def new(self) -> int:
        self.count += 1
        return self.count


def _trace(kind: Kind, name: str, rng: random.Random, names: _Names, block: int, before: Sequence[int]) -> Task:
    """``before``: the blocks of the context that it begins with."""
    calls: list[Call] = []
    chain, had = list(before), len(before) * block

    def about(middle: float) -> int:
        return max(1, round(middle * rng.uniform(0.5, 1.5)))

    for index in range(kind.steps):
        new = about(kind.first if index == 0 and not before else kind.more)
        prompt = had + new
        full = had // block
        chain = [*chain[:full], *(names.new() for _ in range(-(-prompt // block) - full))]
        output = about(kind.output)
        children: tuple[Task, ...] = ()
        if index == 0 and kind.children:
            child = kind._replace(children=0)
            shared = chain[: prompt // block]
            children = tuple(
                _trace(child, f"{name}.{number}", rng, names, block, shared) for number in range(kind.children)
            )
        gap_s = kind.gap_s * rng.uniform(0.5, 1.5)
        call = Call(prompt, output, gap_s, min(had, prompt - 1), tuple(chain), children, kind.deadline_s)
        calls.append(call)
        had = prompt + output
    return Task(name, tuple(calls))

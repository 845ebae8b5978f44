"""What is replayed, whatever format it was recorded in: traces of steps, some of which start other traces. Pure."""

from collections.abc import Iterator

import msgspec

COMMON = "common"
"""Scope of blocks that are the same in traces of all kinds."""


class Blocks(msgspec.Struct, frozen=True):
    """A prompt as names of its blocks: equal leading names mean equal leading tokens."""

    scope: str
    """Within which the names mean the same: a trace with all that it started, or the whole recording."""
    ids: tuple[int, ...]
    block_tokens: int
    tokens: int
    """Length of the prompt; the last block may be cut short, and what no block covers has a name of its own."""
    common_blocks: int = 0
    """Leading blocks that other traces of this kind have too (tools, system prompt), named by their place."""
    kind: str = "main"


class Messages(msgspec.Struct, frozen=True):
    """A prompt as the messages of a chat."""

    messages: tuple[dict[str, str], ...]
    """Role and content."""
    tokens: int
    """As counted by the model that was recorded: an estimate for others."""


Prompt = Blocks | Messages


class Step(msgspec.Struct, frozen=True):
    """One model call."""

    prompt: Prompt
    output_tokens: int
    gap_s: float
    """Between the end of the step before (what it started excepted) and this one: a tool ran, a person read."""
    children: tuple["Trace", ...] = ()
    """Start when this step has ended; the trace's next step waits for them."""


class Trace(msgspec.Struct, frozen=True):
    """One agent task."""

    trace: str
    steps: tuple[Step, ...]
    parent: str | None = None
    start_s: float | None = None
    """Since the recording's start; None where the recording does not say when traces started."""

    def walk(self) -> Iterator[tuple["Trace", Step]]:
        """Every step, those of traces that it started in their place."""
        for step in self.steps:
            yield self, step
            for child in step.children:
                yield from child.walk()

    @property
    def prompt_tokens(self) -> int:
        """Of all its steps and those of the traces that it started."""
        return sum(step.prompt.tokens for _, step in self.walk())

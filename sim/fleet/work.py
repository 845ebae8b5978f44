"""What the fleet is given to do: traces whose steps say how long they are and what they share. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

ChainId = int
"""Names one block with all that comes before it, within one scope."""


@dataclass(frozen=True)
class Call:
    """One model call. Lengths in tokens."""

    prompt: int
    output: int
    gap_s: float
    """Between the end of the step before and this one."""
    keeps: int
    """Leading tokens of the prompt that the trace's step before had; of its first one, the step that started it."""
    chain: tuple[ChainId, ...]
    """The prompt's blocks, the last perhaps cut short."""
    children: tuple["Task", ...] = ()
    """Start when this step has ended; the next one waits for them."""
    deadline_s: float = float("inf")
    """A step that takes longer counts for nothing."""


@dataclass(frozen=True)
class Task:
    """A trace as it was recorded."""

    name: str
    calls: tuple[Call, ...]
    start_s: float | None = None
    """Since the recording's start, where that says so."""
    scoped: bool = True
    """Its blocks are its own; else all tasks of the recording name blocks alike."""

    def walk(self) -> Iterator[Call]:
        """Every step, those of traces that it started in their place."""
        for call in self.calls:
            yield call
            for child in call.children:
                yield from child.walk()

    @property
    def steps(self) -> int:
        """All of them."""
        return sum(1 for _ in self.walk())

    @property
    def gaps_s(self) -> float:
        """Of the trace itself."""
        return sum(call.gap_s for call in self.calls)


@dataclass
class Scope:
    """Names blocks: equal names mean equal tokens from the beginning on."""

    block_tokens: int
    _names: dict[tuple[ChainId, bytes], ChainId] = field(default_factory=dict[tuple[ChainId, bytes], ChainId])

    def chain(self, ids: Sequence[int], id_tokens: int, tokens: int) -> tuple[ChainId, ...]:
        """The blocks of a prompt of so many tokens, whose parts of ``id_tokens`` have these names."""
        per_block = max(1, self.block_tokens // id_tokens)
        packed = np.asarray(ids, np.int32)
        parent = -1
        chain: list[ChainId] = []
        for block in range(-(-tokens // self.block_tokens)):
            part = packed[block * per_block : (block + 1) * per_block]
            # What no name covers is nobody else's.
            key = (parent, part.tobytes() if len(part) else f"rest of {len(self._names)}".encode())
            parent = self._names.setdefault(key, len(self._names))
            chain.append(parent)
        return tuple(chain)


def shared_tokens(before: Sequence[int], now: Sequence[int], id_tokens: int, tokens: int) -> int:
    """Leading tokens of a prompt of so many tokens that another one has too."""
    count = min(len(before), len(now))
    a, b = np.asarray(before[:count], np.int64), np.asarray(now[:count], np.int64)
    differs = np.flatnonzero(a != b)
    shared = int(differs[0]) if len(differs) else count
    return min(shared * id_tokens, tokens - 1)

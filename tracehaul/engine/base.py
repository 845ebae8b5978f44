"""The engine's interface: every implementation passes ``tests/contract/test_engine.py``.

An engine holds KV for *sequences*, each a growing run of tokens with its own storage. It knows no steps, traces,
stores or schedules: callers decide what each iteration computes. Sequence handles are small integers, local to
the engine.
"""

from collections.abc import Sequence
from typing import NamedTuple, NewType, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from tracehaul.engine.history import History
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.steps import Constraint, Sampling, TokenLogprobs

SequenceId = NewType("SequenceId", int)


class CutShort(Exception):
    """An iteration ended before its time, because of :meth:`Engine.cut`: it has changed nothing."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine is, fixed for its life."""

    model: str
    """Name that clients call it by."""
    layout: KVLayout
    context_max: int
    """Longest sequence in tokens that the model supports."""
    kv_tokens_max: int
    """KV memory in tokens, over all sequences."""
    vocab_size: int
    hardware: str = ""
    """What it computes on: engines of the same layout and hardware are equally fast on one host. Empty: not known."""


class Scoring(NamedTuple):
    """Asks how likely the tokens were that are known to follow."""

    targets: Sequence[int]
    """Each the token that follows the item's token of the same place; at most as many as those."""
    top: int
    """How many of the likeliest tokens to tell with each."""


Mask = NDArray[np.uint32]
"""One bit for each token of the vocabulary, lowest first: whether it may come next."""


class Guide(Protocol):
    """Where one answer is in the grammar that it must match; made by :meth:`Engine.guide`, advanced by the engine."""

    @property
    def error(self) -> str:
        """Why it cannot go on; empty while it can."""
        ...

    def mask(self) -> Mask | None:
        """What may come next; where the grammar is complete, end tokens alone. None: there is an :attr:`error`."""
        ...

    def accept(self, token: int) -> None:
        """``token`` has come next."""
        ...


class Work(msgspec.Struct, frozen=True):
    """One sequence's part in an iteration: append ``tokens`` at its end, and maybe sample what follows.

    Several tokens are a prefill chunk, one is a decode step; both may share an iteration.
    """

    sequence: SequenceId
    tokens: Sequence[int]
    sampling: Sampling | None = None
    """None: only extend the KV."""
    emitted: int = 0
    """Output tokens of the step before the sampled one (for ``min_tokens``)."""
    history: History | None = None
    """The sequence's tokens, ``tokens`` included, where ``sampling`` penalizes them."""
    scoring: Scoring | None = None
    """Takes a row of logits for each of its targets: the caller bounds the memory."""
    guide: Guide | None = None
    """Of ``sampling.constraint``, where there is one; the sampled token advances it."""


class Result(NamedTuple):
    """What one item of an iteration gave, beside its KV."""

    token: int | None = None
    """The sampled one; None where none was asked for, or :attr:`error` says why there is none."""
    logprobs: TokenLogprobs | None = None
    """The token's, where ``sampling.logprobs`` asks for them."""
    scores: tuple[TokenLogprobs, ...] = ()
    """One for each target of ``scoring``."""
    error: str = ""
    """Why the item's guide allows no token any more."""


class Engine(Protocol):
    """Runs iterations and moves KV in and out. All methods are called from one event loop.

    Calls may overlap: ``pack`` and ``unpack`` may run beside ``run`` as long as they touch other token ranges than
    those being computed. At most one ``run`` at a time.
    """

    @property
    def info(self) -> EngineInfo:
        """Fixed facts."""
        ...

    @property
    def free_tokens(self) -> int:
        """KV memory not given to any sequence; fragmentation may make less usable."""
        ...

    def open(self, capacity: int) -> SequenceId | None:
        """An empty sequence with room for ``capacity`` tokens; None if there is no memory for it now."""
        ...

    def grow(self, sequence: SequenceId, capacity: int) -> bool:
        """Room for ``capacity`` tokens in all, contents kept; False (and no change) if there is no memory.

        Not while a call on that sequence is under way.
        """
        ...

    def capacity(self, sequence: SequenceId) -> int:
        """Tokens it has room for."""
        ...

    def length(self, sequence: SequenceId) -> int:
        """Tokens whose KV it holds."""
        ...

    def truncate(self, sequence: SequenceId, length: int) -> None:
        """Forget the KV from position ``length`` on."""
        ...

    def close(self, sequence: SequenceId) -> None:
        """Free the sequence. Not while a call on it is under way."""
        ...

    async def guide(self, constraint: Constraint, output: Sequence[int]) -> Guide:
        """The place in a grammar after ``output``, the output tokens of the step so far. May take milliseconds.

        Raises:
            InvalidRequest: the grammar is none, is too complex, or does not allow ``output``.
        """
        ...

    async def run(self, work: Sequence[Work]) -> list[Result]:
        """One iteration: one result per item.

        KV of every item's tokens is in place on return. A sequence appears at most once. The capacity must suffice.
        Not cancellable: a cancelled wait lets the iteration end by itself, and the next call waits for it.

        Raises:
            CutShort: it was; the same work may be asked for again.
        """
        ...

    def cut(self) -> None:
        """The iteration under way, if any, had better not go on. A hint: it may end as if nothing had been said."""
        ...

    def attach(self, memory: memoryview) -> None:
        """Most packed blocks will lie in this memory, which outlives the engine: a device may be shown it."""
        ...

    async def pack(self, sequence: SequenceId, start: int, tokens: int, outs: Sequence[memoryview]) -> None:
        """Copy KV of ``[start, start + tokens)`` out as blocks in the layout's packed form.

        Cut at multiples of ``block_tokens`` from ``start`` (which is such a multiple); ``outs[i]`` takes block ``i``,
        the last one possibly partial; each view is exactly as long as its block.
        """
        ...

    async def unpack(self, sequence: SequenceId, start: int, tokens: int, blocks: Sequence[memoryview]) -> None:
        """Inverse of :meth:`pack`: append ``tokens`` tokens of KV; ``start`` must equal the sequence's length."""
        ...

    async def aclose(self) -> None:
        """Stop threads, free memory."""
        ...

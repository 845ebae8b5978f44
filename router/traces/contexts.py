"""What a trace's steps left behind, in tokens and block hashes: what the next step continues. Pure.

An agent's prompt is its last prompt and a little more, so its hashes are mostly known: only the rest is chained.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from router.fleet.load import Warm
from tracehaul.wire.hashing import TOKEN_BYTES, chain, common_prefix, extend_chain
from tracehaul.wire.ids import BlockHash, StepId

LEAVES_MAX = 8
"""Contexts of one trace that are kept open: its choices, and what it does at once under one name."""


@dataclass(frozen=True)
class Left:
    """One step's context at its end: the prompt and the output, whose last token has no KV."""

    step: StepId
    root: BlockHash
    """What the hashes are chained to: model, layout and tenant."""
    block_tokens: int
    packed: bytes
    hashes: Sequence[BlockHash]
    """Of all full blocks of ``packed``."""
    published_tokens: int
    """Leading tokens that were got into the store."""
    warm: Warm | None

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.packed) // TOKEN_BYTES

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        return len(self.packed) + len(self.hashes) * (sys.getsizeof(b"") + 24) + 256


@dataclass(frozen=True)
class Cut:
    """A prompt, cut into blocks."""

    packed: bytes
    hashes: Sequence[BlockHash]
    left: Left | None
    """What it continues."""
    shared_tokens: int
    """Its leading tokens that ``left`` has, too."""


def cut(root: BlockHash, packed: bytes, block_tokens: int, lefts: Sequence[Left]) -> Cut:
    """A prompt's hashes, from those of the earlier context that shares most of it; of equals, the last one."""
    best, shared_tokens = None, 0
    for left in reversed(lefts):
        if left.root == root and left.block_tokens == block_tokens:
            shared = common_prefix(left.packed, packed)
            if shared > shared_tokens:
                best, shared_tokens = left, shared
    if best is None:
        return Cut(packed, chain(root, packed, block_tokens), None, 0)
    return Cut(packed, extend_chain(root, packed, block_tokens, best.hashes, shared_tokens), best, shared_tokens)


def grow(lefts: Sequence[Left], new: Left) -> list[Left]:
    """A trace's open contexts with one more, without those that it continues; the oldest give way."""
    others = [left for left in lefts if not (left.root == new.root and new.packed.startswith(left.packed))]
    return [*others[-(LEAVES_MAX - 1) :], new]

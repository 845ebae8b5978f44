"""What a trace's steps left behind, in tokens and block hashes: what the next step continues. Pure.

An agent's prompt is its last prompt and a little more, so its hashes are mostly known: only the rest is chained.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from router.fleet.load import Warm
from tracehaul.wire.hashing import HASH_BYTES, TOKEN_BYTES, common_prefix
from tracehaul.wire.ids import BlockHash, StepId
from tracehaul.wire.naming import Naming

LEAVES_MAX = 8
"""Contexts of one trace that are kept open: its choices, and what it does at once under one name."""


class Left(msgspec.Struct, frozen=True, gc=False):
    """One step's context at its end: the prompt and the output, whose last token has no KV."""

    step: StepId
    root: BlockHash
    """Of model, layout and tenant: :attr:`Naming.tenant`."""
    block_tokens: int
    packed: bytes
    hashes: bytes
    """Of all full blocks of ``packed``, one behind the other."""
    published_tokens: int
    """Leading tokens that were got into the store."""
    warm: Warm | None

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.packed) // TOKEN_BYTES

    @property
    def last(self) -> BlockHash | None:
        """Its last full block."""
        return BlockHash(self.hashes[-HASH_BYTES:]) if self.hashes else None


@dataclass(frozen=True)
class Cut:
    """A prompt, cut into blocks."""

    packed: bytes
    hashes: Sequence[BlockHash]
    left: Left | None
    """What it continues."""
    shared_tokens: int
    """Its leading tokens that ``left`` has, too."""


def joined(hashes: Iterable[BlockHash]) -> bytes:
    """Hashes one behind the other: a fifth of the memory of a list."""
    return b"".join(hashes)


def listed(hashes: bytes) -> list[BlockHash]:
    """Inverse of :func:`joined`."""
    return np.frombuffer(hashes, f"V{HASH_BYTES}").tolist()


def cut(naming: Naming, packed: bytes, lefts: Sequence[Left]) -> Cut:
    """A prompt's hashes, from those of the earlier context that shares most of it; of equals, the last one."""
    best, shared_tokens, root, block_tokens = None, 0, naming.tenant, naming.block_tokens
    for left in reversed(lefts):
        if left.root == root and left.block_tokens == block_tokens:
            shared = common_prefix(left.packed, packed)
            if shared > shared_tokens:
                best, shared_tokens = left, shared
    if best is None:
        return Cut(packed, naming.names(packed), None, 0)
    known = listed(best.hashes[: shared_tokens // block_tokens * HASH_BYTES])
    return Cut(packed, naming.extend(packed, known, shared_tokens), best, shared_tokens)


def grow(lefts: Sequence[Left], new: Left) -> tuple[Left, ...]:
    """A trace's open contexts with one more, without those that it continues; the oldest give way."""
    others = [left for left in lefts if not (left.root == new.root and new.packed.startswith(left.packed))]
    return (*others[-(LEAVES_MAX - 1) :], new)


def warmed(lefts: Sequence[Left], step: StepId, warm: Warm | None) -> tuple[Left, ...]:
    """With another worker for the context that ``step`` left; nothing changes if it has been continued meanwhile."""
    return tuple(msgspec.structs.replace(left, warm=warm) if left.step == step else left for left in lefts)

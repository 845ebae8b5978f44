"""What an infinite cache would have found: the bound that a server's hits are held against. Pure."""

from collections.abc import Iterable

import msgspec

from tracehaul.wire.hashing import chain
from tracehaul.wire.ids import BlockHash

ROOT = BlockHash(bytes(16))


class Bound(msgspec.Struct, frozen=True):
    """Tokens of one prompt that infinite caches would have had, in whole blocks."""

    shared: int
    """One cache, of all prompts before it."""
    own: int
    """A cache per trace, of that trace's prompts before it: what perfect affinity without a shared store finds."""


def theoretical(prompts: Iterable[tuple[str, bytes]], block_tokens: int) -> list[Bound]:
    """The bound of each prompt, given those before it.

    Args:
        prompts: trace and packed tokens (four bytes each), in the order in which they were sent.
        block_tokens: the server's.

    A prompt's last token is computed in any case, since something must be sampled from it.
    """
    everything: set[BlockHash] = set()
    own: dict[str, set[BlockHash]] = {}
    bounds: list[Bound] = []
    for trace, packed in prompts:
        hashes = chain(ROOT, packed, block_tokens)
        last = (len(packed) // 4 - 1) // block_tokens
        mine = own.setdefault(trace, set())
        shared = next((i for i, block in enumerate(hashes) if block not in everything), len(hashes))
        alone = next((i for i, block in enumerate(hashes) if block not in mine), len(hashes))
        bounds.append(Bound(min(shared, last) * block_tokens, min(alone, last) * block_tokens))
        everything.update(hashes)
        mine.update(hashes)
    return bounds

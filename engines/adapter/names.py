"""What the blocks of a server are called in the store, as its plugin names them. Pure.

A plugin says so when it starts: the root that it has made of all that changes the bytes, and how the blocks of a
sequence are named from there. Engines that name blocks themselves are followed to the letter.
"""

import hashlib
from collections.abc import Callable

import msgspec
from blake3 import blake3

from tracehaul.wire.hashing import HASH_BYTES, TOKEN_BYTES, chain, salted
from tracehaul.wire.ids import BlockHash


class Shared(msgspec.Struct, frozen=True):
    """Blocks that a server shares; as its plugin writes it down, in JSON."""

    root: str
    """Of their layout, without salt; in hexadecimal digits."""
    block_tokens: int
    hashing: str = ""
    """How they are named; empty: as our own."""

    @property
    def root_hash(self) -> BlockHash:
        """The root itself. Raises ValueError if it is none."""
        return BlockHash(bytes.fromhex(self.root))


def names(shared: Shared, packed: bytes, salt: str) -> list[BlockHash]:
    """Of the full blocks of a sequence."""
    return SCHEMES[shared.hashing](shared, packed, salt)


def _ours(shared: Shared, packed: bytes, salt: str) -> list[BlockHash]:
    return chain(salted(shared.root_hash, salt), packed, shared.block_tokens)


def _sglang(shared: Shared, packed: bytes, salt: str) -> list[BlockHash]:
    """``sglang/srt/mem_cache/utils.py``: SHA-256 of what comes before and the page's tokens; a salt is what comes
    before the first."""
    digest, found, step = b"", list[BlockHash](), shared.block_tokens * TOKEN_BYTES
    if salt:
        said = salt.encode()
        seed = b"sglang-cache-namespace-v1\0\1" + len(said).to_bytes(8, "little") + said
        digest = hashlib.sha256(seed).digest()
    for start in range(0, len(packed) - step + 1, step):
        digest = hashlib.sha256(digest + packed[start : start + step]).digest()
        found.append(_named(shared.root_hash, digest))
    return found


def _vllm(shared: Shared, packed: bytes, salt: str) -> list[BlockHash]:
    """Our own plugin's: a chain that is the same for all ranks."""
    first = BlockHash(blake3(f"tracehaul/vllm/1|{shared.block_tokens}".encode()).digest(HASH_BYTES))
    return [_named(shared.root_hash, key) for key in chain(salted(first, salt), packed, shared.block_tokens)]


def _named(root: BlockHash, key: bytes) -> BlockHash:
    return BlockHash(blake3(root + b"/" + key).digest(HASH_BYTES))


SCHEMES: dict[str, Callable[[Shared, bytes, str], list[BlockHash]]] = {
    "": _ours,
    "sglang/sha256": _sglang,
    "vllm/1": _vllm,
}

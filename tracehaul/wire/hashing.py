"""Block identity and byte checksums.

A block's hash is chained over token ids from a root that names everything that changes the bytes:
``root = H(layout, salt)``, ``hash_i = H(hash_{i-1} | token ids of block i)``. Two processes that agree
on the root and on the tokens agree on the hash, without asking anybody. ``H`` is BLAKE3 cut to 16 bytes.

A *tail* (a step's last, partial block of ``k < block_tokens`` tokens) is hashed by the same rule over its
``k`` ids, so a reader finds it by trying the lengths that its own prompt allows.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec
import numpy as np
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from tracehaul.wire.ids import BlockHash, Checksum, NodeId

HASH_BYTES = 16
TOKEN_BYTES = 4
assert (array("I").itemsize, sys.byteorder) == (TOKEN_BYTES, "little"), "an array's bytes are the wire form"


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a block's bytes mean: a packed C-order array ``[layers, 2, kv_heads, tokens, head_dim]``, unless ``order``
    says otherwise."""

    model: str
    """Name and revision of the weights: equal strings mean equal weights."""
    dtype: str
    """Element type as numpy or torch spells it, such as ``bfloat16``."""
    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    block_tokens: int = 32
    shard: str = "0/1"
    """Which part of the heads this is under tensor parallelism."""
    order: str = ""
    """Byte order and packing where they are another engine's, with the version of that form: one that no other engine,
    back end or instruction set shares. Checksums cannot see that bytes are in another order."""
    hashing: str = ""
    """How blocks are named, if not by :func:`chain`."""
    scales: str = ""
    """Where the scales of quantized elements come from; empty: there are none."""

    @property
    def token_bytes(self) -> int:
        """Bytes of KV for one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a full block."""
        return self.token_bytes * self.block_tokens

    def root(self, salt: str = "") -> BlockHash:
        """The hash that a trace's first block is chained to; ``salt`` keeps tenants apart."""
        said = msgspec.structs.asdict(self)
        for later in ("order", "hashing", "scales"):  # what does not say them has the root that it always had
            if not said[later]:
                del said[later]
        return salted(_cut(b"tracehaul/1|" + msgspec.json.encode(said)), salt)


def named(root: BlockHash, key: bytes) -> BlockHash:
    """The block of the layout ``root`` that its engine, which names blocks itself, calls ``key``."""
    return _cut(root + b"/" + key)


def salted(root: BlockHash, salt: str) -> BlockHash:
    """A tenant's own root, from a layout's; the empty salt is the layout's itself."""
    return _cut(root + b"|" + salt.encode()) if salt else root


def _cut(data: bytes) -> BlockHash:
    return BlockHash(blake3(data).digest(HASH_BYTES))


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32: the wire form.

    Raises:
        OverflowError: an id is negative or does not fit 32 bits.
    """
    return np.asarray(tokens, dtype="<u4").tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Inverse of :func:`pack_tokens`, for a few tokens: a whole prompt stays packed.

    Raises:
        ValueError: the length is not a multiple of four bytes.
    """
    return token_array(data).tolist()


def token_array(packed: bytes) -> "array[int]":
    """Tokens in wire form as a sequence that can grow: four bytes a token still, copied at memory's speed.

    Its ``tobytes`` is the wire form again.

    Raises:
        ValueError: the length is not a multiple of four bytes.
    """
    tokens = array("I")
    tokens.frombytes(packed)
    return tokens


def token_count(packed: bytes) -> int:
    """Tokens in a packed run."""
    return len(packed) // TOKEN_BYTES


def next_hash(parent: BlockHash, tokens: bytes) -> BlockHash:
    """Hash of the block that holds ``tokens`` (wire form) right after ``parent``."""
    return _cut(parent + tokens)


def chain(root: BlockHash, tokens: bytes, block_tokens: int) -> list[BlockHash]:
    """Hashes of all full blocks of ``tokens`` (wire form), in order."""
    step = block_tokens * TOKEN_BYTES
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(tokens) - step + 1, step):  # next_hash, without three calls a block
        parent = BlockHash(blake3(parent + tokens[start : start + step]).digest(HASH_BYTES))
        hashes.append(parent)
    return hashes


def common_prefix(a: bytes, b: bytes) -> int:
    """Length in tokens of the common prefix of two packed token runs."""
    count = min(len(a), len(b)) // TOKEN_BYTES
    if a[: count * TOKEN_BYTES] == b[: count * TOKEN_BYTES]:
        return count
    differs = np.frombuffer(a, "<u4", count) != np.frombuffer(b, "<u4", count)
    return int(np.argmax(differs))


def extend_chain(
    root: BlockHash, tokens: bytes, block_tokens: int, known: Sequence[BlockHash], shared_tokens: int
) -> list[BlockHash]:
    """As :func:`chain`, computing only what is new.

    ``known`` are the hashes of another run's full blocks, from the same root, whose first ``shared_tokens`` tokens are
    those of ``tokens``.
    """
    hashes = list(known[: shared_tokens // block_tokens])
    rest = tokens[len(hashes) * block_tokens * TOKEN_BYTES :]
    return hashes + chain(hashes[-1] if hashes else root, rest, block_tokens)


def tail_candidates(parent: BlockHash, tokens: bytes, block_tokens: int) -> list[BlockHash]:
    """Hashes of every partial block that could follow ``parent`` in this prompt: item ``k-1`` holds ``k`` tokens.

    ``tokens`` (wire form) are what follows ``parent``; at most ``block_tokens - 1`` are tried.
    """
    count = min(token_count(tokens), block_tokens - 1)
    return [next_hash(parent, tokens[: k * TOKEN_BYTES]) for k in range(1, count + 1)]


def checksum(data: bytes | bytearray | memoryview) -> Checksum:
    """xxh3-64 of ``data``: set at publish, verified wherever the bytes land."""
    return Checksum(xxh3_64_intdigest(data))


def weight(node: NodeId, key: str) -> bytes:
    """A node's claim on a key (a trace, or a block's hash in hex): the one with the highest is its home."""
    return blake2b(f"{node}|{key}".encode(), digest_size=8).digest()


def by_weight(nodes: Iterable[NodeId], key: str) -> list[NodeId]:
    """Rendezvous hashing: the home of ``key`` first, then who takes it if that is gone, and so on.

    Every process finds the same order, and a node that joins or leaves moves no other in it.
    """
    return sorted(nodes, key=lambda node: (weight(node, key), node), reverse=True)

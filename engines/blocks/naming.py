"""What the store calls the blocks of a sequence that another engine computed: for who was not there. Pure."""

import hashlib

from tracehaul.wire.hashing import TOKEN_BYTES, KVLayout, chain, named
from tracehaul.wire.ids import BlockHash

SGLANG = "sglang/sha256"
"""SGLang's chain of SHA-256 over pages (0.5.23, ``get_storage_hash_str``), each made a layout's block."""


def names(layout: KVLayout, packed: bytes, salt: str = "") -> list[BlockHash]:
    """Of the full blocks of a text, in order; ``packed`` are its tokens in wire form.

    Raises:
        ValueError: this version does not know how that layout's blocks are named.
    """
    match layout.hashing:
        case "":
            return chain(layout.root(salt), packed, layout.block_tokens)
        case "sglang/sha256":
            root = layout.root()
            return [named(root, key) for key in _sglang(packed, layout.block_tokens, salt)]
        case other:
            raise ValueError(f"nobody here knows how blocks are named by {other!r}")


def _sglang(packed: bytes, page_tokens: int, salt: str) -> list[bytes]:
    before = b""
    if salt:
        said = salt.encode()
        # No extra key, and a salt of so many bytes.
        seed = b"sglang-cache-namespace-v1\x00\x01" + len(said).to_bytes(8, "little") + said
        before = hashlib.sha256(seed).digest()
    step = page_tokens * TOKEN_BYTES
    keys: list[bytes] = []
    for at in range(0, len(packed) - step + 1, step):
        before = hashlib.sha256(before + packed[at : at + step]).digest()
        keys.append(before)
    return keys

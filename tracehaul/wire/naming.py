"""What the store calls the blocks of a sequence: for who was not there when they were made. Pure.

Our own engine and vLLM's plugin chain them (:func:`tracehaul.wire.hashing.chain`). SGLang names pages itself, and its
plugin makes each of those names a layout's block.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from tracehaul.wire.hashing import TOKEN_BYTES, KVLayout, chain, extend_chain, named, salted
from tracehaul.wire.ids import BlockHash

SGLANG = "sglang/sha256"
"""SGLang's chain of SHA-256 over pages (0.5.23, ``get_storage_hash_str``)."""


class Naming(NamedTuple):
    """How one tenant's blocks of one layout are named."""

    root: BlockHash
    """The layout's."""
    block_tokens: int
    hashing: str = ""
    """:attr:`KVLayout.hashing`."""
    salt: str = ""

    @classmethod
    def of(cls, layout: KVLayout, salt: str = "") -> "Naming":
        """Of that layout."""
        return cls(layout.root(), layout.block_tokens, layout.hashing, salt)

    @property
    def tenant(self) -> BlockHash:
        """What no other layout or tenant has: texts with another cannot share blocks."""
        return salted(self.root, self.salt)

    @property
    def known(self) -> bool:
        """Whether this version can name them: a later one may bring other ways."""
        return self.hashing in ("", SGLANG)

    def names(self, packed: bytes) -> list[BlockHash]:
        """Of the full blocks of a text, in order; ``packed`` are its tokens in wire form. None if not :attr:`known`."""
        match self.hashing:
            case "":
                return chain(self.tenant, packed, self.block_tokens)
            case "sglang/sha256":
                return [named(self.root, key) for key in _sglang(packed, self.block_tokens, self.salt)]
            case _:
                return []

    def extend(self, packed: bytes, known: Sequence[BlockHash], shared_tokens: int) -> list[BlockHash]:
        """As :meth:`names`; ``known`` are those of another text, whose first ``shared_tokens`` tokens are these, too.

        SGLang's cannot be told from such names, as its chain is of longer ones: they are computed anew.
        """
        if self.hashing:
            return self.names(packed)
        return extend_chain(self.tenant, packed, self.block_tokens, known, shared_tokens)


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

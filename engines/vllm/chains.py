"""A request's blocks by name, as far as its tokens are known, and which of them move. Knows vLLM's requests by shape.

vLLM's own hashes are random per process unless it is told otherwise, so they are not used.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tracehaul.wire.hashing import named, next_hash, pack_tokens, salted
from tracehaul.wire.ids import BlockHash

SELF_TEST = "tracehaul-self-test:"
"""How salts of self-tests begin. To vLLM all of them are different; to the store, what follows a ``#`` is nothing: so
a server looks in the store for what it has computed and still has itself."""
SALT_CHARACTERS_MAX = 128
"""What vLLM takes."""
_SPELLED = {"~": "~t", "/": "~s", "@": "~a", "\\": "~b", "\0": "~n"}
"""Characters that it does not take, and the one that tells them."""
_PLAIN = {spelled: plain for plain, spelled in _SPELLED.items()}


def spelled(salt: str) -> str:
    """A salt in characters that vLLM takes, for :func:`tenant_of` to read; it may be longer than vLLM takes."""
    if not any(char in salt for char in _SPELLED):
        return salt
    return "~" + "".join(_SPELLED.get(char, char) for char in salt)


def tenant_of(request: Any) -> str:
    """Whose a request's blocks are: the salt that was meant."""
    salt: str = request.cache_salt or ""
    if salt.startswith("~"):
        salt = re.sub("~.", lambda pair: _PLAIN.get(pair[0], pair[0]), salt[1:])
    return salt.partition("#")[0] if salt.startswith(SELF_TEST) else salt


@dataclass
class Move:
    """Blocks of one request, between the store and the engine's memory."""

    request: str
    keys: list[BlockHash]
    """The blocks' names, as the first rank has them."""
    parents: list[BlockHash]
    """What comes before each."""
    block_ids: list[int]
    """Where each is in the engine."""
    tenant: str = ""


@dataclass
class Chain:
    """One request's names, and how far its blocks are known to be in the store."""

    request: Any
    block_tokens: int
    root: BlockHash
    """Of the first rank's blocks, whose names these are: of plain text, those that everybody finds."""
    keys: list[BlockHash] = field(default_factory=list[BlockHash])
    block_ids: list[int] = field(default_factory=list[int])
    first: int = 0
    """Blocks that the engine had itself when it was last asked."""
    saved: int = 0
    """Blocks that the store has, or was given."""
    looked: tuple[int, bool] | None = None
    """Leading blocks that the stores had when they were asked last, and whether they told; None: not asked yet."""
    looked_s: float = 0.0
    """When that was."""

    def __post_init__(self) -> None:
        root = salted(self.root, self.tenant)
        lora = self.request.lora_request
        # Named, not salted: a salt is what clients say, and none of theirs may be an adapter's.
        said = None if lora is None else msgspec.json.encode(["lora", lora.lora_name, lora.lora_path])
        self._root = root if said is None else named(root, said)

    @property
    def tenant(self) -> str:
        """On whose account its blocks are."""
        return tenant_of(self.request)

    def upto(self, blocks: int) -> int:
        """Know the first so many blocks, or as many as there are tokens for; how many."""
        request, step = self.request, self.block_tokens
        if getattr(request, "prompt_embeds", None) is not None:
            return 0  # what is in it has no name
        known = request.all_token_ids
        while len(self.keys) < min(blocks, len(known) // step):
            at = len(self.keys) * step
            tokens = list(known[at : at + step])
            if min(tokens) < 0:  # a place kept for a token that is still being sampled
                break
            parent = self.keys[-1] if self.keys else self._root
            self.keys.append(next_hash(parent, pack_tokens(tokens) + self._shown(at)))
        return min(blocks, len(self.keys))

    def move(self, start: int, end: int) -> Move:
        """These blocks of it."""
        before = [self._root, *self.keys]
        keys, parents = self.keys[start:end], before[start:end]
        return Move(self.request.request_id, keys, parents, self.block_ids[start:end], self.tenant)

    def _shown(self, at: int) -> bytes:
        """The pictures and sounds that the block at that token shows, and where: their tokens are all the same."""
        shown: list[tuple[str, int]] = []
        for feature in self.request.mm_features or ():
            position = feature.mm_position
            if position.offset < at + self.block_tokens and at < position.offset + position.length:
                shown.append((feature.identifier, position.offset - at))
        return msgspec.json.encode(shown) if shown else b""  # what clients call a picture cannot pass for two


def of_rank(root: BlockHash, first: BlockHash, key: BlockHash) -> BlockHash:
    """A rank's part of the block that the first rank, of root ``first``, calls ``key``."""
    return key if root == first else named(root, key)


def leading(found: Sequence[int]) -> int:
    """What all ranks have."""
    return min(found, default=0)

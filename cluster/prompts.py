"""From what a person has (a prompt, a conversation, token ids, hashes) to block hashes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cluster.asking import Found
from cluster.rundir import ClusterFault
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.hashing import HASH_BYTES, chain, pack_tokens, salted
from tracehaul.wire.ids import BlockHash

STDIN = Path("-")


class Source(NamedTuple):
    """Where the blocks are named; exactly one of these."""

    prompt: Path | None = None
    chat: Path | None = None
    tokens: Path | None = None
    hashes: Sequence[str] = ()
    salt: str = ""


class Blocks(NamedTuple):
    """A sequence of blocks."""

    hashes: list[BlockHash]
    block_tokens: int
    """0 if they were given as hashes."""
    tokens: int = 0
    """Of the prompt: the last, partial block is not among the blocks."""


def blocks_of(source: Source, found: Found) -> Blocks:
    """The full blocks of what was named.

    Raises:
        ClusterFault: it cannot be read, or what is needed to hash it is not known.
    """
    given = [source.prompt, source.chat, source.tokens, list(source.hashes) or None]
    if sum(one is not None for one in given) != 1:
        raise ClusterFault("say which blocks: one of --prompt FILE, --chat FILE, --tokens FILE, or --hash HEX")
    if source.hashes:
        return Blocks([parse_hash(text) for text in source.hashes], 0)
    if not found.workers:
        raise ClusterFault("no worker is ready, so the KV layout is not known; name the blocks with --hash")
    worker = min(found.workers, key=lambda info: (info.role, info.node))  # decode before prefill, as the router does
    tokens = _tokens(source, found)
    try:
        packed = pack_tokens(tokens)
    except OverflowError as error:
        raise ClusterFault(f"not token ids: {error}") from error
    return Blocks(
        chain(salted(worker.root, source.salt), packed, worker.block_tokens), worker.block_tokens, len(tokens)
    )


def parse_hash(text: str) -> BlockHash:
    """A block's hash as logs and tables show it.

    Raises:
        ClusterFault: it is none.
    """
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != HASH_BYTES:
        raise ClusterFault(f"not a block hash: {text!r}; it has {2 * HASH_BYTES} hex digits")
    return BlockHash(data)


def parse_tokens(text: str) -> list[int]:
    """Token ids: a JSON list, or numbers between blanks or commas.

    Raises:
        ClusterFault: it is neither.
    """
    try:
        if text.lstrip().startswith("["):
            return msgspec.json.decode(text, type=list[int])
        return [int(word) for word in text.replace(",", " ").split()]
    except (ValueError, msgspec.MsgspecError) as error:
        raise ClusterFault(f"not token ids (a JSON list, or numbers between blanks): {error}") from error


def _tokens(source: Source, found: Found) -> list[int]:
    if source.tokens is not None:
        return parse_tokens(_read(source.tokens))
    if found.plan is None:
        raise ClusterFault(
            "the model's tokenizer is where the cluster was started: run this there, or give token ids with --tokens"
        )
    from tracehaul.model.source import SourceError
    from tracehaul.model.text import Text

    try:
        text = Text.load(found.plan.pools[0].model)
        if source.prompt is not None:
            return text.encode(_read(source.prompt), special=True)
        assert source.chat is not None
        messages = msgspec.json.decode(_read(source.chat), type=list[dict[str, Any]])
        return text.encode(text.render(messages))
    except (SourceError, InvalidRequest) as error:
        raise ClusterFault(str(error)) from error
    except msgspec.MsgspecError as error:
        raise ClusterFault(f"{source.chat} is not a JSON list of messages: {error}") from error


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if path == STDIN else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterFault(f"cannot read {path}: {error}") from error

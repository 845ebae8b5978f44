"""What a simulated fleet is made of: kinds of workers and of stores, and what each thing costs there. Pure."""

from pathlib import Path
from typing import Literal

import msgspec

from tracehaul.wire.cluster import Rates


class WorkerKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Workers that are alike. Seconds; an iteration takes what its prompts and what its decoding sequences take."""

    count: int
    token_s: float
    """Per token of a prompt, as in :class:`tracehaul.wire.cluster.Rates`."""
    pair_s: float
    """Per token and token before it."""
    iteration_s: float
    """Of an iteration that decodes, whatever decodes in it."""
    sequence_s: float
    """What each decoding sequence adds."""
    context_token_s: float
    """What each token of these sequences adds: attention reads it."""
    pull_token_s: float
    """For the KV of a token, at the worker's own end of the link."""
    kv_tokens: int
    role: Literal["decode", "prefill"] = "decode"
    pull_s: float = 0.0
    """Of each pull, however short."""
    step_s: float = 0.0
    """Of each step outside of workers: the client's way to them."""
    prompt_s: float = 0.0
    """Of each prompt, however short."""
    chunk_tokens: int = 512
    sequences_max: int = 64
    headroom_tokens: int = 256
    local_prefill_tokens: int = 256
    stretch: float = 5.0
    host_workers: int = 1
    """Workers on the same cores."""
    shared: float = 0.0
    """By how much each other one that computes slows one down."""
    price_h: float = 1.0
    """Of one of them, for an hour."""

    def compute_s(self, start: float, end: float) -> float:
        """The tokens from ``start`` to ``end`` of a prompt."""
        return (end - start) * self.token_s + (end * end - start * start) / 2 * self.pair_s

    def decode_s(self, sequences: int, tokens: float) -> float:
        """An iteration that decodes so many sequences of so many tokens in all."""
        return self.iteration_s + self.sequence_s * sequences + self.context_token_s * tokens

    @property
    def rates(self) -> Rates:
        """As it announces them when it joins."""
        return Rates(self.token_s, self.pair_s, self.iteration_s + self.sequence_s, self.pull_token_s)


class StoreKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Store nodes that are alike."""

    count: int
    memory_tokens: int
    link_token_s: float
    """For the KV of a token, at the node's end of the link."""
    disk_tokens: int = 0
    disk_token_s: float = 0.0
    """For the KV of a token to come into memory from disk."""


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fleet."""

    workers: tuple[WorkerKind, ...]
    stores: tuple[StoreKind, ...] = ()
    block_tokens: int = 2048
    """What the stores keep or lose as one: coarser than in a cluster, so that a thousand nodes' blocks fit in memory.
    A prompt's last, partial block is had where all before it are, as tails are in a cluster."""

    @property
    def computing(self) -> int:
        """Workers, of both roles."""
        return sum(kind.count for kind in self.workers)

    @property
    def price_h(self) -> float:
        """Of all workers, for an hour."""
        return sum(kind.count * kind.price_h for kind in self.workers)


def read(path: Path) -> Shape:
    """A fleet from a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no fleet.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Shape)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no fleet: {error}") from error

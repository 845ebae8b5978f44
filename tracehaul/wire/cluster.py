"""Messages about who is there: joining, membership, heartbeats."""

from typing import Literal, NamedTuple

import msgspec

from tracehaul.wire.base import Message
from tracehaul.wire.ids import BlockHash, Generation, NodeId

Role = Literal["store", "prefill", "decode"]

Feature = Literal["constraints", "prompt_logprobs", "recall"]
"""What not every engine can do: keep answers to a grammar, tell how likely a prompt's tokens were, and bring a context
back before its step asks for it."""


class Rates(NamedTuple):
    """How fast a worker is, in seconds."""

    token_s: float
    """For one token of a prompt that has nothing before it."""
    pair_s: float
    """What each token before it adds to that: attention."""
    decode_s: float
    """For an iteration that only decodes, with as many sequences as there are now."""
    pull_token_s: float
    """For pulling the KV of one token from a store node."""


ASSUMED = Rates(token_s=5e-4, pair_s=2e-7, decode_s=0.02, pull_token_s=1e-5)
"""Of a small model on a few cores, until something was measured. Only ratios of these matter then."""


class WorkerLimits(msgspec.Struct, frozen=True):
    """How a worker is set up, as far as who gives it steps has to know."""

    kv_tokens_max: int = 0
    """KV memory in tokens, over all sequences."""
    sequences_max: int = 0
    """Most sequences in one iteration."""
    waiting_max: int = 0
    """Steps that may wait for KV memory; more are refused."""
    chunk_tokens: int = 0
    """Most tokens that one iteration computes."""
    local_prefill_tokens: int = 0
    """A decode worker computes up to this many missing tokens itself, whatever prefill worker it was given."""
    stretch: float = 0.0
    """A prompt is due when it has waited for so many times what it takes itself; the first that is due is next."""


class NodeInfo(msgspec.Struct, frozen=True):
    """One life of one node, as it introduces itself."""

    node: NodeId
    generation: Generation
    role: Role
    address: str
    """``host:port`` of its control plane."""
    model: str = ""
    """Name that clients call the served model by; empty on a store node."""
    root: BlockHash = BlockHash(b"")
    """Root hash of its KV layout without salt: nodes with different roots cannot share blocks."""
    block_tokens: int = 0
    context_max: int = 0
    """Longest sequence in tokens; 0 on a store node."""
    engine: str = ""
    """What computes: ``native`` is our own; empty on a store node."""
    features: tuple[Feature, ...] = ()
    """What it can do beside computing tokens."""
    limits: WorkerLimits = WorkerLimits()
    """All zero on a store node."""
    rates: Rates = ASSUMED
    """A worker's own when it joined; heartbeats correct them."""
    pool: str = ""
    """Which of the fleet's pools a worker belongs to; the one that has no name, and that of a store node, is empty."""


class NodeLoad(msgspec.Struct, frozen=True):
    """What a node says of itself with each heartbeat."""

    running: int = 0
    """Steps in progress."""
    waiting: int = 0
    """Steps queued for memory."""
    blocks: int = 0
    """Published blocks held (store)."""
    bytes_used: int = 0
    bytes_max: int = 0
    disk_blocks: int = 0
    """Blocks on the node's disk; most of those in memory are there too."""
    disk_bytes_used: int = 0
    disk_bytes_max: int = 0
    disk_block_s: float = 0.0
    """How long a block takes to come into memory from there."""
    s3_blocks: int = 0
    """Blocks of the node in its bucket; most of those above are there too."""
    s3_bytes_used: int = 0
    s3_bytes_max: int = 0
    s3_block_s: float = 0.0
    """How long a block takes to come into memory from there."""
    draining: bool = False
    """It moves what it holds to others and takes nothing new (store); it is still read from."""
    copies_waiting: int = 0
    """Blocks that are still to be copied to other nodes, for replicas or a drain (store)."""
    pins_short: int = 0
    """Pins that have fewer copies than they ask for, as there is nobody to take one (store)."""
    token_s: float = 0.0
    """As in :class:`Rates`, like the three that follow: measured at a worker's start and corrected by all that it does;
    0 on a store node."""
    pair_s: float = 0.0
    decode_s: float = 0.0
    pull_token_s: float = 0.0
    shared: float = 0.0
    """How much of a worker's computing is at the cost of others on the same cores, while they compute, too: 0 to 1."""
    free_tokens: int = 0
    """KV memory of a worker that nothing is in, not even what is kept for later; in tokens."""


class Join(Message, frozen=True):
    """Node -> router, as a stream: announces itself, receives :class:`Members` whenever they change.

    The node is a member for as long as the stream is open and its heartbeats arrive.
    """

    info: NodeInfo
    token: str = ""
    """The cluster's join token, where it has one."""


class Members(Message, frozen=True):
    """Router -> node: every live member. ``version`` grows with each change within one router's life."""

    version: int
    nodes: tuple[NodeInfo, ...]
    draining: tuple[NodeId, ...] = ()
    """Those that are about to leave: read from them, but give them nothing new."""


class Heartbeat(Message, frozen=True):
    """Node -> router, about once a second."""

    node: NodeId
    generation: Generation
    load: NodeLoad

"""Messages about who is there: joining, membership, heartbeats."""

from typing import Literal, NamedTuple

import msgspec

from tracehaul.wire.base import Message
from tracehaul.wire.ids import BlockHash, Epoch, Generation, NodeId, TraceId
from tracehaul.wire.spent import Charge
from tracehaul.wire.version import OLDEST, Version

Role = Literal["store", "prefill", "decode"]
WorkerRole = Literal["prefill", "decode"]
MemberRole = Role | Literal["observer"]
"""An observer is told who is there and given nothing: a server with an engine of its own, which uses the stores."""

Feature = Literal["constraints", "prompt_logprobs", "recall"]
"""What not every engine can do: keep answers to a grammar, tell how likely a prompt's tokens were, and bring a context
back before its step asks for it."""

Lack = Literal["seeds", "penalties", "constraints", "tails", "chunks", "suspension"]
"""What every engine of our own does, and not every other one.

The first three are about an answer that another worker began: to go on as that one would have, with the same seed, with
penalties on what was said, or within a grammar. Then keep less than a block in the store, publish a prompt's blocks
while the rest of it is computed, and suspend a step that lacks memory rather than compute it anew."""


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


class WorkerLimits(msgspec.Struct, frozen=True, omit_defaults=True):
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


class NodeInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One life of one node, as it introduces itself."""

    node: NodeId
    generation: Generation
    role: MemberRole
    address: str
    """``host:port`` of its control plane; empty of an observer, which nobody calls."""
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
    lacks: tuple[str, ...] = ()
    """Of :data:`Lack`: what it cannot do. Names that a later version has added are of no concern to an earlier one."""
    limits: WorkerLimits = WorkerLimits()
    """All zero on a store node."""
    rates: Rates = ASSUMED
    """A worker's own when it joined; heartbeats correct them."""
    pool: str = ""
    """Which of the fleet's pools a worker belongs to; the one that has no name, and that of a store node, is empty."""
    epoch: Epoch = Epoch(0)
    """What a router has issued to this life; among lives of one name, the one with the higher :attr:`rank` has it."""
    started_s: float = 0.0
    """Unix time of its start, by its own clock: to be shown, never compared."""
    version: str = ""
    """Of its software."""
    host: str = ""
    """The name of the machine that it runs on."""
    metrics: str = ""
    """``host:port`` where ``/metrics`` answers; empty if nothing does."""
    log: str = ""
    """Where its log is, on its host."""

    transports: tuple[str, ...] = ()
    """How KV moves to and from it, a line for each, nearest first: ``shm``, ``tcp 10.0.0.1:7101``."""
    hashing: str = ""
    """How its blocks are named: see :class:`tracehaul.wire.naming.Naming`."""
    roles: tuple[str, ...] = ()
    """Those that it can be told to have; empty: it keeps its own."""
    role_epoch: int = 0
    """How often its role has changed in this life."""

    @property
    def rank(self) -> tuple[Epoch, Generation, int]:
        """Total order of the lives of one name, and of what one life says of itself. Routers that could not see each
        other may have issued one epoch twice: then all of them decide by the generation."""
        return self.epoch, self.generation, self.role_epoch


class NodeLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node says of itself with each heartbeat."""

    running: int = 0
    """Steps in progress."""
    waiting: int = 0
    """Steps queued for memory."""
    background: int = 0
    """Of those in progress, steps of the background."""
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
    serving: bool = True
    """Whether it can do what it is there for; while it cannot it gets no work."""
    fault: str = ""
    """Why it cannot, in a few words; empty if it can, or does not know yet."""
    note: str = ""
    """What else an operator should know of it, in a few words; it serves all the same."""
    up_s: float = 0.0
    """How long a worker has been there, by its own clock."""
    busy_s: float = 0.0
    """How much of that its iterations took."""
    charges: tuple[Charge, ...] = ()
    """For whom, as far as that has changed of late: said more than once."""
    turning: str = ""
    """The role that it is about to have: until then it gets no work; empty: it keeps the one that it has."""
    orphans: tuple[bytes, ...] = ()
    """What steps are called whose router was lost, and whose output a decode worker still has:
    :func:`tracehaul.wire.answers.answer_name`."""


class Join(Message, frozen=True):
    """Node -> router, as a stream: announces itself, receives :class:`Members`, then :class:`MembersChanged`.

    The node is a member for as long as the stream is open and its heartbeats arrive. The epoch that it has, if any, is
    in ``info``: it was issued by this router or by another.
    """

    info: NodeInfo
    load: NodeLoad = NodeLoad()
    cluster: str = ""
    """The name of its cluster; empty: it has none, and may join any."""
    wire: Version = OLDEST
    token: str = ""
    """The cluster's join token, where it has one."""


class Members(Message, frozen=True, omit_defaults=True):
    """Router -> node: the members that concern it. ``version`` grows with each change within one router's life."""

    version: int
    nodes: tuple[NodeInfo, ...] = ()
    draining: tuple[NodeId, ...] = ()
    """Those that are about to leave: read from them, but give them nothing new."""
    epoch: Epoch = Epoch(0)
    """The receiver's own."""
    settles_s: float = 0.0
    """For so long nodes that the router knew before may not be back on its list: their absence says nothing."""


class MembersChanged(Message, frozen=True, omit_defaults=True):
    """Router -> node: what became of the list that it has. It follows version ``version - 1``."""

    version: int
    joined: tuple[NodeInfo, ...] = ()
    """Also those that are there in another life, or say something else of themselves."""
    left: tuple[NodeId, ...] = ()
    draining: tuple[NodeId, ...] = ()
    """All that are now."""
    settles_s: float = 0.0
    """As in :class:`Members`."""


class Heartbeat(Message, frozen=True, omit_defaults=True):
    """Node -> router, about once a second."""

    node: NodeId
    generation: Generation
    load: NodeLoad
    role_epoch: int = 0
    """As it joined this router."""


class Objection(Message, frozen=True):
    """Router -> node, to a heartbeat which says that it is about to have another role: it shall not, now."""

    why: str


FLIP_MARGIN_S = 12.0
"""A flip takes at most so much longer than what was given for what runs to end: routers are asked, and what does not
end leaves. One that takes longer, as its process stood still, is off."""


class Flip(Message, frozen=True):
    """Router -> worker, as a stream: have that role from now on. Answered with :class:`Flipped` once it has; whoever
    closes the stream before calls it off.

    Meant for that life of the node, and for its role as it is then: else it is refused.
    """

    generation: Generation
    epoch: Epoch
    role_epoch: int
    role: WorkerRole
    drain_s: float
    """For so long what it runs may go on to its end; then it goes on elsewhere."""


class Flipped(Message, frozen=True):
    """It has that role."""

    role_epoch: int


class GiveTrace(Message, frozen=True):
    """Router -> router: write down what is known of a trace and let go of it."""

    tenant: str
    trace: TraceId


class TraceGiven(Message, frozen=True):
    """The answer."""

    given: bool
    """False: something is under way in it."""


class AskRouter(Message, frozen=True):
    """Router -> router: what a client asks of it, of what you have yourself. Answered with :class:`RouterAnswered`."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    """The client's key among them."""
    body: bytes = b""
    at: int = 0
    """From where on the answer's body is wanted."""


class RouterAnswered(Message, frozen=True):
    """The answer, or a piece of it."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    more: bool
    """More of it follows."""


class Viewer(NamedTuple):
    """Who is told of members, as far as it matters for what it has to know."""

    role: MemberRole
    pool: str

    def needs(self, node: NodeInfo) -> bool:
        """Everybody asks the stores, and decode workers the prefill workers of their pool."""
        return node.role == "store" or (self.role == "decode" and node.role == "prefill" and node.pool == self.pool)

"""Every message between processes: frozen tagged structs in one union per direction.

A tag that no version knows raises at the border. Times are durations in seconds (clocks are never compared
across processes); sizes are bytes; token ids travel packed (see :func:`tracehaul.wire.hashing.pack_tokens`).
"""

from typing import Literal

import msgspec

from tracehaul.wire.ids import BlockHash, Checksum, Generation, LeaseId, NodeId, SlotGeneration, StepId, TraceId

Role = Literal["store", "prefill", "decode"]


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all wire messages; the class name is the tag."""


class Ok(Message, frozen=True):
    """Done, nothing to say."""


# --- cluster: who is there --------------------------------------------------------------------------------


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


class Join(Message, frozen=True):
    """Node -> router, as a stream: announces itself, receives :class:`Members` whenever they change.

    The node is a member for as long as the stream is open and its heartbeats arrive.
    """

    info: NodeInfo


class Members(Message, frozen=True):
    """Router -> node: every live member. ``version`` grows with each change within one router's life."""

    version: int
    nodes: tuple[NodeInfo, ...]


class Heartbeat(Message, frozen=True):
    """Node -> router, about once a second."""

    node: NodeId
    generation: Generation
    load: NodeLoad


class Ping(Message, frozen=True):
    """Anyone -> anyone; answered with :class:`Ok`."""


# --- kvstore ----------------------------------------------------------------------------------------------


class BlockSpec(msgspec.Struct, frozen=True):
    """A block that somebody is about to write."""

    hash: BlockHash
    parent: BlockHash
    """What it is chained to; the root's hash for a first block."""
    size_bytes: int


class Reserve(Message, frozen=True):
    """Writer -> store: give me slots. Answered with :class:`Reserved`, one outcome per block, same order."""

    blocks: tuple[BlockSpec, ...]
    tenant: str = ""
    """Whose quota the slots count against."""


class Slot(msgspec.Struct, frozen=True, tag=True):
    """Write here, then publish under this generation."""

    offset: int
    generation: SlotGeneration


class Present(msgspec.Struct, frozen=True, tag=True):
    """Already published: nothing to write."""


class InFlight(msgspec.Struct, frozen=True, tag=True):
    """Another writer holds the reservation."""

    since_s: float
    """How long it has held it."""
    owner: str = ""
    """The connection that holds it, by the store's name for it."""


class Full(msgspec.Struct, frozen=True, tag=True):
    """No slot can be freed now: what is left is leased, pinned, reserved, has continuations, or is within others'
    quotas. Also the answer for a block whose parents would form a cycle."""


class TooLarge(msgspec.Struct, frozen=True, tag=True):
    """The block does not fit a slot, or is empty."""


class Reserved(Message, frozen=True):
    """Outcome of :class:`Reserve`."""

    outcomes: tuple[Slot | Present | InFlight | Full | TooLarge, ...]


class Publication(msgspec.Struct, frozen=True):
    """A block whose bytes are in place."""

    hash: BlockHash
    generation: SlotGeneration
    checksum: Checksum


class Publish(Message, frozen=True):
    """Writer -> store: make these visible. Answered with :class:`Published`."""

    blocks: tuple[Publication, ...]


PublishOutcome = Literal["published", "fenced", "corrupt"]


class Published(Message, frozen=True):
    """Per block: visible now; or fenced (the reservation is gone); or the landed bytes do not match."""

    outcomes: tuple[PublishOutcome, ...]


class Abandon(Message, frozen=True):
    """Writer -> store: I will not publish these reservations, and no write of mine is under way."""

    blocks: tuple[tuple[BlockHash, SlotGeneration], ...]


class Lease(Message, frozen=True):
    """Reader -> store: protect what you have of these for ``ttl_s``. Answered with :class:`Leased`."""

    hashes: tuple[BlockHash, ...]
    ttl_s: float


class LeasedBlock(msgspec.Struct, frozen=True):
    """Where a published block's bytes are, while the lease lives."""

    offset: int
    size_bytes: int
    generation: SlotGeneration
    checksum: Checksum


class Leased(Message, frozen=True):
    """One entry per requested hash, ``None`` where the node does not have it. One lease covers them all.

    The holder counts ``ttl_s`` from before it sent the request.
    """

    lease: LeaseId
    blocks: tuple[LeasedBlock | None, ...]
    ttl_s: float = 0.0
    """What was granted: at most what was asked for."""


class Release(Message, frozen=True):
    """Reader -> store: done reading. Releasing twice, or after expiry, is harmless."""

    lease: LeaseId


class Exists(Message, frozen=True):
    """Anyone -> store. Answered with :class:`Existing`; takes no lease, so it is only a hint."""

    hashes: tuple[BlockHash, ...]


class Existing(Message, frozen=True):
    """``held[i]`` is 1 where ``hashes[i]`` is published here, else 0."""

    held: bytes


class Revoke(Message, frozen=True):
    """Reader -> store: the bytes I landed do not match. The node checks its own copy; drops it if it is bad."""

    hash: BlockHash
    generation: SlotGeneration


class Await(Message, frozen=True):
    """Anyone -> store: tell me when none of these is being written any more, or ``timeout_s`` has passed.

    Answered with :class:`Awaited`; refused as overloaded where too many wait already.
    """

    hashes: tuple[BlockHash, ...]
    timeout_s: float


AwaitState = Literal["published", "absent", "in_flight"]


class Awaited(Message, frozen=True):
    """Per hash: visible; or not, and free to be reserved; or (still, or again) being written."""

    states: tuple[AwaitState, ...]


PinKind = Literal["soft", "hard"]


class Pin(Message, frozen=True):
    """Router -> store: keep these blocks, and what you hold of their prefixes, for the trace's next step.

    Pinning a trace again adds to what is covered and renews the kind, priority and end of all of it. Blocks that
    are not there yet are covered once they are. Answered with :class:`Pinned`; refused as overloaded, with nothing
    changed, where a limit is reached.
    """

    trace: TraceId
    hashes: tuple[BlockHash, ...]
    ttl_s: float
    """Capped by the store."""
    kind: PinKind = "soft"
    """``hard`` blocks are never evicted; ``soft`` ones only when nothing unpinned is left."""
    priority: float = 1024.0
    """Of a soft pin: it halves with each half-life of the store's, and ends where it reaches 1."""
    tenant: str = ""


class Pinned(Message, frozen=True):
    """The pin as it is now."""

    blocks: int
    """Covered."""
    held: int
    """Of those, published here."""
    remaining_s: float


class Unpin(Message, frozen=True):
    """Router -> store: end a trace's pin. Harmless if there is none."""

    trace: TraceId
    tenant: str = ""


class ListPins(Message, frozen=True):
    """Anyone -> store. Answered with :class:`PinList`."""

    tenant: str | None = None
    """None: everybody's."""


class PinInfo(msgspec.Struct, frozen=True):
    """One open pin."""

    trace: TraceId
    tenant: str
    kind: PinKind
    blocks: int
    """Covered."""
    held: int
    """Of those, published here."""
    bytes: int
    """What the held ones take."""
    remaining_s: float


class PinList(Message, frozen=True):
    """Open pins, the first to end first."""

    pins: tuple[PinInfo, ...]


class Attach(Message, frozen=True):
    """Anyone -> store or worker: how do I reach your arena? Answered with :class:`Attached`."""


class RegionDescriptor(msgspec.Struct, frozen=True):
    """What a peer needs to reach a registered region by one transport."""

    kind: str
    """``local``, ``shm`` or ``nixl``."""
    owner: str
    """``node#generation``: one life of one process."""
    nbytes: int
    payload: bytes
    """Transport's own (a descriptor path, agent metadata and address); never a pickle."""


class Attached(Message, frozen=True):
    """The node's arena by each transport that it offers."""

    generation: Generation
    regions: tuple[RegionDescriptor, ...]


class Subscribe(Message, frozen=True):
    """Router -> store, as a stream: one :class:`Snapshot` in one or more parts, then :class:`Events` for ever."""


class Snapshot(Message, frozen=True):
    """A part of what the node holds as of event ``sequence``; ``last`` marks the final part."""

    generation: Generation
    sequence: int
    hashes: tuple[BlockHash, ...]
    last: bool


class Stored(msgspec.Struct, frozen=True, tag=True):
    """A block became visible."""

    hash: BlockHash


class Removed(msgspec.Struct, frozen=True, tag=True):
    """A block is gone."""

    hash: BlockHash


class Events(Message, frozen=True):
    """Changes numbered ``first, first+1, …``; a hole in the numbers means: subscribe again."""

    generation: Generation
    first: int
    changes: tuple[Stored | Removed, ...]


# --- workers ----------------------------------------------------------------------------------------------


FinishReason = Literal["stop", "length"]


class Sampling(msgspec.Struct, frozen=True):
    """How output tokens are chosen. Randomness is a function of (seed, position in the sequence) alone."""

    max_tokens: int
    """Output tokens of the whole step, those already emitted included; at least 1."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is unlimited."""
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    """The model's own end tokens and the request's: generation ends after one of them."""
    min_tokens: int = 0
    """Stop tokens are not sampled before this many output tokens."""

    def finish_reason(self, token: int, emitted: int, length: int, context_max: int) -> FinishReason | None:
        """Whether a step ends with output token ``token``, its ``emitted``-th, in a sequence now ``length`` long."""
        if token in self.stop_tokens and emitted >= self.min_tokens:
            return "stop"
        if emitted >= self.max_tokens or length >= context_max:
            return "length"
        return None


class PrefillStep(Message, frozen=True):
    """Decode worker -> prefill worker, as a stream: :class:`PrefillProgress` as blocks are published, one
    :class:`PrefillToken`, more progress, and one :class:`PrefillDone`."""

    step: StepId
    trace: TraceId
    root: BlockHash
    """The KV layout's root without salt: a worker with another one refuses."""
    tokens: bytes
    """The whole sequence so far: prompt and what was already emitted."""
    salt: str
    home: NodeId | None
    """Store node that takes the new blocks."""
    sampling: Sampling
    emitted: int
    """How many of ``tokens`` are output of this step."""


class PrefillProgress(Message, frozen=True):
    """The first ``published_tokens`` of the sequence can be pulled from the store now."""

    published_tokens: int


class PrefillToken(Message, frozen=True):
    """The next token of the sequence, sampled; the last blocks are still being published."""

    token: int
    computed_from: int
    """Positions before it were not computed here: they were resident or pulled."""


class PrefillDone(Message, frozen=True):
    """The terminal message of a prefill: all that will be published is."""

    published_tokens: int


class DecodeStep(Message, frozen=True):
    """Router -> decode worker, as a stream of :class:`Tokens`, then one :class:`StepDone`."""

    step: StepId
    trace: TraceId
    root: BlockHash
    """The KV layout's root without salt: a worker with another one refuses."""
    prompt: bytes
    emitted: bytes
    """Output tokens that the client already has (a step moved in mid-stream); never sampled again."""
    salt: str
    home: NodeId | None
    prefill: NodeId | None
    """Who computes the missing part of the prompt; None: the decode worker itself."""
    sampling: Sampling


class StepUsage(msgspec.Struct, frozen=True):
    """Where a step's context came from, in tokens, and what that took."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    resident_tokens: int = 0
    """Found on the decode worker itself."""
    pulled_tokens: int = 0
    """Pulled from the store by the decode worker."""
    computed_from: int = 0
    """First position that anybody computed in this step: everything before it is cached."""
    pulled_bytes: int = 0
    pull_s: float = 0.0
    missed_blocks: int = 0
    """Blocks expected from the store that did not arrive: recomputed."""
    prefill_fallback: str = ""
    """Why the prefill worker's result was not used, as an error code; empty if it was, or none was asked."""


class Tokens(Message, frozen=True):
    """The next output tokens, packed."""

    ids: bytes
    usage: StepUsage | None = None
    """With the first tokens: what is known by then."""


class StepDone(Message, frozen=True):
    """The terminal message of a step on a decode worker."""

    reason: FinishReason
    usage: StepUsage
    retained_tokens: int
    """Length of the sequence whose KV stays on this worker, warm for the next step."""


Request = (
    Join
    | Heartbeat
    | Ping
    | Reserve
    | Publish
    | Abandon
    | Lease
    | Release
    | Exists
    | Revoke
    | Await
    | Pin
    | Unpin
    | ListPins
    | Attach
    | Subscribe
    | PrefillStep
    | DecodeStep
)
Reply = (
    Ok
    | Members
    | Reserved
    | Published
    | Leased
    | Existing
    | Awaited
    | Pinned
    | PinList
    | Attached
    | Snapshot
    | Events
    | PrefillProgress
    | PrefillToken
    | PrefillDone
    | Tokens
    | StepDone
)

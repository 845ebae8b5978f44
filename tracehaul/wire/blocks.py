"""Messages of the store: block by hash, slots, leases, pins, tiers, events."""

from typing import Annotated, Literal

import msgspec

from tracehaul.wire.base import Message
from tracehaul.wire.ids import BlockHash, Checksum, Generation, LeaseId, NodeId, SlotGeneration, TraceId


class BlockSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A block that somebody is about to write."""

    hash: BlockHash
    parent: BlockHash
    """What it is chained to; the root's hash for a first block."""
    size_bytes: int


class Reserve(Message, frozen=True):
    """Writer -> store: give me slots. Answered with :class:`Reserved`, one outcome per block, same order."""

    blocks: tuple[BlockSpec, ...]
    tenant: str | int = ""
    """Whose quota the slots count against: its name; its key where a name is not known, as in a copy."""


class Slot(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Write here, then publish under this generation."""

    offset: int
    generation: SlotGeneration


class Present(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Already published: nothing to write."""


class InFlight(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Another writer holds the reservation."""

    since_s: float
    """How long it has held it."""
    owner: str = ""
    """The connection that holds it, by the store's name for it."""


class Full(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """No slot can be freed now: what is left is leased, pinned, reserved, has continuations, or is within others'
    quotas. Also the answer for a block whose parents would form a cycle."""


class TooLarge(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The block does not fit a slot, or is empty."""


class Reserved(Message, frozen=True):
    """Outcome of :class:`Reserve`."""

    outcomes: tuple[Slot | Present | InFlight | Full | TooLarge, ...]


class Publication(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A block whose bytes are in place."""

    hash: BlockHash
    generation: SlotGeneration
    checksum: Checksum


class Publish(Message, frozen=True):
    """Writer -> store: make these visible. Answered with :class:`Published`."""

    blocks: tuple[Publication, ...]
    verified: bool = False
    """The checksums are of the bytes as they were stored here, by the word of who stored them: the node need not look
    again."""


PublishOutcome = Literal["published", "fenced", "corrupt"]


class Published(Message, frozen=True):
    """Per block: visible now; or fenced (the reservation is gone); or the landed bytes do not match."""

    outcomes: tuple[PublishOutcome, ...]


class Abandon(Message, frozen=True):
    """Writer -> store: I will not publish these reservations, and no write of mine is under way."""

    blocks: tuple[tuple[BlockHash, SlotGeneration], ...]


class Renew(Message, frozen=True):
    """Writer -> store: I am still writing these. Without a sign of life for about a second, a reservation passes on
    to the next who asks for its block; with it, it lasts as long as any. Unknown ones are ignored."""

    blocks: tuple[tuple[BlockHash, SlotGeneration], ...]


class Lease(Message, frozen=True):
    """Reader -> store: protect what you have of these for ``ttl_s``. Answered with :class:`Leased`."""

    hashes: tuple[BlockHash, ...]
    ttl_s: float


class LeasedBlock(msgspec.Struct, frozen=True, array_like=True, gc=False):
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
    reading: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Leases that are open on the node: reads that a further one would share its memory with."""


class Revoke(Message, frozen=True):
    """Reader -> store: the bytes I landed do not match. The node checks its own copy; drops it if it is bad."""

    hash: BlockHash
    generation: SlotGeneration


class Await(Message, frozen=True):
    """Anyone -> store: tell me when none of these is being written any more, or ``timeout_s`` has passed.

    A block whose writer has gone silent (:class:`Renew`) is no longer being written: who asks for it gets it.
    Answered with :class:`Awaited`; refused as overloaded where too many wait already.
    """

    hashes: tuple[BlockHash, ...]
    timeout_s: float


AwaitState = Literal["published", "absent", "in_flight"]


class Awaited(Message, frozen=True):
    """Per hash: visible; or not, and free to be reserved; or (still, or again) being written."""

    states: tuple[AwaitState, ...]


PinKind = Literal["soft", "hard"]

REPLICAS_MAX = 8
"""Copies that one pin may ask for."""


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
    replicas: int = 1
    """Copies of what it covers, on that many store nodes, up to :data:`REPLICAS_MAX`: the node that is told makes the
    others, and again those that are lost. Fewer while fewer nodes live."""
    holders: tuple[NodeId, ...] = ()
    """Empty from the router. Between store nodes: who has the pin, the one that sees to its copies first."""


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
    replicas: int = 1
    """Copies asked for."""
    holders: tuple[NodeId, ...] = ()
    """Nodes that have the pin, as far as this one knows; empty where one copy was asked for."""


class PinList(Message, frozen=True):
    """Open pins, the first to end first."""

    pins: tuple[PinInfo, ...]


class Attach(Message, frozen=True):
    """Anyone -> store or worker: how do I reach your arena? Answered with :class:`Attached`."""


class RegionDescriptor(msgspec.Struct, frozen=True):
    """What a peer needs to reach a registered region by one transport."""

    kind: str
    """``local``, ``shm``, ``nixl`` or ``ucxx``."""
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


Tier = Annotated[int, msgspec.Meta(ge=0, le=7)]
"""Of a store node, counted down from memory: whoever listens keeps books for each, so there are few."""


class Snapshot(Message, frozen=True):
    """A part of what the node holds as of event ``sequence``, all in one tier; ``last`` marks the final part."""

    generation: Generation
    sequence: int
    hashes: tuple[BlockHash, ...]
    last: bool
    tier: Tier = 0
    """As in :class:`Stored`."""


class Stored(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """A block became visible."""

    hash: BlockHash
    tier: Tier = 0
    """The fastest that has it: 0 is memory, 1 what is below, and so on down."""


class Removed(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """A block is gone."""

    hash: BlockHash


class Moved(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """A visible block's fastest tier is another one now."""

    hash: BlockHash
    tier: Tier
    """As in :class:`Stored`."""


Change = Stored | Removed | Moved


class Events(Message, frozen=True):
    """Changes numbered ``first, first+1, …``; a hole in the numbers means: subscribe again."""

    generation: Generation
    first: int
    changes: tuple[Change, ...]


class Tiers(Message, frozen=True):
    """Anyone -> store: what do you hold where? Answered with :class:`TierList`."""


class TierInfo(msgspec.Struct, frozen=True):
    """One tier of a store node."""

    name: str
    """``memory`` or ``disk``."""
    blocks: int
    bytes_used: int
    bytes_max: int
    counters: dict[str, int]
    """Counts since the node's start, by name."""


class TierList(Message, frozen=True):
    """A node's tiers, the fastest first."""

    tiers: tuple[TierInfo, ...]


class Prefetch(Message, frozen=True):
    """Anyone -> store: bring these from slower tiers to memory, in this order. Answered with :class:`PrefetchState`.

    The job goes on when the connection ends.
    """

    hashes: tuple[BlockHash, ...]


class PrefetchPoll(Message, frozen=True):
    """Anyone -> store: how far is it? Answered with :class:`PrefetchState`."""

    job: int


class PrefetchCancel(Message, frozen=True):
    """Anyone -> store: start no more of it. Answered with :class:`PrefetchState`."""

    job: int


class PrefetchState(Message, frozen=True):
    """A prefetch job. Of ``blocks``, ``done`` were looked at, and ``missed`` of these could not be brought up.

    A job that ended long ago is forgotten: ``unknown``.
    """

    job: int
    state: Literal["running", "done", "cancelled", "unknown"]
    blocks: int = 0
    done: int = 0
    missed: int = 0


class Drain(Message, frozen=True):
    """Operator -> store: take nothing new, and move all that you hold to other nodes; asking again says how far it is.

    Answered with :class:`DrainState`; refused as unavailable where no other node could take anything. Blocks stay
    readable here until the node is stopped.
    """

    cancel: bool = False
    """Serve as before. What was moved is in both places then."""


class DrainState(Message, frozen=True):
    """How far a drain is. One that cannot go on says why, and goes on when it can."""

    state: Literal["serving", "draining", "drained"]
    """``drained``: all that is here is on other nodes too. New blocks of writers that had begun make it ``draining``
    again, and so does the loss of a node that took some."""
    blocks_left: int = 0
    bytes_left: int = 0
    pins_left: int = 0
    blocks_moved: int = 0
    """Since the drain began; those that the other node had already are counted too."""
    bytes_moved: int = 0
    blocks_lost: int = 0
    """Gone from here before they were moved (evicted, or their bytes were bad), or moved twice and evicted there both
    times. A node that joins later gets those that are still here."""
    held_up: str = ""
    """Why what is left could not be moved when it was last tried."""

"""Messages of the people who operate the store: what a node is, where blocks are, limits, scrubbing."""

from typing import Any, Literal

import msgspec

from tracehaul.wire.base import Message
from tracehaul.wire.blocks import TierInfo
from tracehaul.wire.ids import BlockHash, Generation


class Describe(Message, frozen=True):
    """Anyone -> store: what are you, and how full? Answered with :class:`Description`."""


class TenantUsage(msgspec.Struct, frozen=True):
    """What one tenant takes of a node's memory."""

    tenant: str
    """Empty: all tenants without a quota of their own, together."""
    quota_bytes: int
    used_bytes: int
    """In whole slots, published and reserved."""


class Description(Message, frozen=True):
    """A store node as it is now. Counts are of slots or of open holds; times in seconds."""

    version: str
    generation: Generation
    uptime_s: float
    transports: tuple[str, ...]
    """Kinds by which its memory can be reached."""
    slot_bytes: int
    slots: int
    slots_free: int
    slots_quarantined: int
    """At rest until no late write can land in them."""
    blocks: int
    bytes_used: int
    leases: int
    reservations: int
    pins: int
    waiters: int
    subscribers: int
    limits: dict[str, Any]
    """Every limit by name, in the units that names end with."""
    live: tuple[str, ...]
    """Names of the limits that :class:`SetLimits` can change."""
    tenants: tuple[TenantUsage, ...]
    tiers: tuple[TierInfo, ...]
    counters: dict[str, int]
    """Counts since the node's start, by name."""


class SetLimits(Message, frozen=True):
    """Operator -> store: these limits from now on, all or none. Answered with :class:`Limits`.

    Refused as invalid where a name is unknown or fixed for the node's life, or where the limits would contradict
    each other or what is held now. They are forgotten with the node's life.
    """

    changes: dict[str, Any]
    """By name, of the types that the node's config has; checked there."""


class Limits(Message, frozen=True):
    """All limits as they are now."""

    limits: dict[str, Any]


class Locate(Message, frozen=True):
    """Anyone -> store: in which tiers do you have these? Answered with :class:`Located`; takes no lease."""

    hashes: tuple[BlockHash, ...]


class Located(Message, frozen=True):
    """Per tier, by name and the fastest first: a byte for each hash, 1 where the tier holds it, else 0."""

    held: dict[str, bytes]


class Discard(Message, frozen=True):
    """Tenant -> store: drop these of mine, in memory and below it, but for what a pin covers. Answered with ``Ok``.

    What is being copied or read meanwhile may stay, and ages out as everything does.
    """

    hashes: tuple[BlockHash, ...]
    tenant: str = ""


class Scrub(Message, frozen=True):
    """Operator -> store: verify every block that you hold, now. Answered with :class:`ScrubState`.

    One runs at a time: while it does, this names the one that runs. It goes on when the connection ends.
    """


class ScrubPoll(Message, frozen=True):
    """Anyone -> store: how far is it? Answered with :class:`ScrubState`."""

    job: int


class ScrubCancel(Message, frozen=True):
    """Anyone -> store: verify no more. Answered with :class:`ScrubState`."""

    job: int


class ScrubbedTier(msgspec.Struct, frozen=True):
    """One tier's part of a scrub."""

    name: str
    blocks: int
    """Held when its turn came, or now if it has not."""
    checked: int
    bad: int
    """Did not match their checksum or could not be read: dropped."""


class ScrubState(Message, frozen=True):
    """A scrub of every tier. Only the last one is remembered: of others the state is ``unknown``."""

    job: int
    state: Literal["running", "done", "cancelled", "unknown"]
    tiers: tuple[ScrubbedTier, ...] = ()

"""Which trace a conversation belongs to where its client does not say. Pure.

An agent sends its whole conversation with each call, so a call continues the trace whose last call had the longest
beginning of these messages. Where that trace has since gone another way, the call is a fork of it: a child. What all
agents of a kind begin with (the system's messages) says nothing.
"""

from collections.abc import Iterable, Sequence

import msgspec
from blake3 import blake3

from tracehaul.wire.ids import TraceId

DIGEST_BYTES = 16
DIGESTS_MAX = 1024
"""Beginnings of one trace's conversation that it is found by: the longest ones."""


class Place(msgspec.Struct, frozen=True):
    """Where a call belongs."""

    trace: TraceId
    parent: TraceId | None = None
    """What it was forked from, at this call."""
    shared: bool = False
    """Another began with the very same messages: by them alone neither is found again."""


class Heard(msgspec.Struct, frozen=True):
    """The answer that a conversation goes on from."""

    at: int
    """Which of the messages it is."""
    name: str
    """Names it and all that was said before it, in whatever spelling the client sends it."""


class Sought(msgspec.Struct, frozen=True):
    """What a call that names no trace says of it."""

    conversation: Sequence[bytes]
    """:func:`digests` of its messages."""
    opening: int
    """How many of the first messages many conversations share."""
    first: bool = False
    """Nothing in it was answered: what begins in the same words is not the same."""
    heard: Heard | None = None
    """The last answer in it."""


def digests(salt: str, messages: Iterable[bytes]) -> list[bytes]:
    """A digest for each beginning of a conversation; tenants' conversations never have one in common."""
    found: list[bytes] = []
    last = blake3(b"tracehaul conversation|" + salt.encode()).digest(DIGEST_BYTES)
    for message in messages:
        last = blake3(last + message).digest(DIGEST_BYTES)
        found.append(last)
    return found


def own(conversation: Sequence[bytes], opening: int) -> tuple[bytes, ...]:
    """The digests that tell a conversation from others: without those of its ``opening``, the longest ones."""
    return tuple(conversation[max(opening, len(conversation) - DIGESTS_MAX) :])

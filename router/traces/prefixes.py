"""Which trace a conversation belongs to where its client does not say. Pure; bounded.

An agent sends its whole conversation with each call, so a call continues the trace whose last call had the longest
beginning of these messages. Where that trace has since gone another way, the call is a fork of it: a child. What all
agents of a kind begin with (the system's messages) says nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec
from blake3 import blake3

from tracehaul.wire.ids import TraceId

DIGEST_BYTES = 16


class Place(msgspec.Struct, frozen=True):
    """Where a call belongs."""

    trace: TraceId
    parent: TraceId | None = None
    """What it was forked from, at this call."""


def digests(salt: str, messages: Iterable[bytes]) -> list[bytes]:
    """A digest for each beginning of a conversation; tenants' conversations never have one in common."""
    found: list[bytes] = []
    last = blake3(b"tracehaul conversation|" + salt.encode()).digest(DIGEST_BYTES)
    for message in messages:
        last = blake3(last + message).digest(DIGEST_BYTES)
        found.append(last)
    return found


class Prefixes:
    """Conversations by their beginnings, at most ``messages_max`` messages of them; the least recently used go."""

    def __init__(self, messages_max: int) -> None:
        self._max = messages_max
        self._owners: OrderedDict[bytes, TraceId] = OrderedDict()
        self._tips: dict[TraceId, bytes] = {}
        """The whole conversation of each trace's last call."""

    def __len__(self) -> int:
        return len(self._owners)

    def place(self, conversation: Sequence[bytes], opening: int, fresh: TraceId) -> Place:
        """The trace of a call, which is remembered.

        Args:
            conversation: :func:`digests` of its messages.
            opening: how many of the first messages many conversations share.
            fresh: the trace's name if it is a new one.
        """
        known = next((i for i in range(len(conversation) - 1, opening - 1, -1) if conversation[i] in self._owners), -1)
        place = Place(fresh)
        if known >= 0:
            owner = self._owners[conversation[known]]
            place = Place(owner) if self._tips.get(owner) == conversation[known] else Place(fresh, owner)
        self._remember(conversation[opening:], known + 1 - opening, place.trace)
        return place

    def _remember(self, conversation: Sequence[bytes], known: int, trace: TraceId) -> None:
        for at, digest in enumerate(conversation):
            # The last one is what the trace is found by, whoever had it first.
            if at >= known or at == len(conversation) - 1 or digest not in self._owners:
                self._owners[digest] = trace
            self._owners.move_to_end(digest)
        if conversation:
            self._tips[trace] = conversation[-1]
        while len(self._owners) > self._max:
            digest, owner = self._owners.popitem(last=False)
            if self._tips.get(owner) == digest:
                del self._tips[owner]

    def check(self) -> None:
        """Assert that the limits hold and nothing is kept of what was forgotten."""
        assert len(self._owners) <= self._max
        assert all(tip in self._owners for tip in self._tips.values())

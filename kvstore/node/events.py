"""What a node tells its subscribers: a snapshot, then every change, numbered."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.blocks import Change, Events, Snapshot
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.ids import BlockHash, Generation

seldom = Seldom(Log(__name__))

SNAPSHOT_PART_HASHES = 4096
EVENTS_MAX = 4096
"""Changes in one message."""


class Feed:
    """Numbers a node's changes from 1 and fans them out; each subscriber has a bounded buffer of its own."""

    def __init__(self, generation: Generation, *, changes_max: int, subscribers_max: int) -> None:
        self._generation = generation
        self.changes_max = changes_max
        self.subscribers_max = subscribers_max
        self._subscribers: dict[int, _Subscriber] = {}
        self._subscriber_last = 0
        self.sequence = 0
        """Number of the last change."""
        self.overflows = 0

    def __len__(self) -> int:
        """Open subscriptions."""
        return len(self._subscribers)

    def append(self, changes: Sequence[Change]) -> None:
        """Number the changes and hand them to every subscriber; one whose buffer would overflow is cut off."""
        self.sequence += len(changes)
        for subscriber in self._subscribers.values():
            if not subscriber.offer(changes):
                self.overflows += 1
                seldom.warning("cut off a subscriber that fell too far behind", changes=self.changes_max)

    async def follow(self, held: Sequence[tuple[BlockHash, ...]]) -> AsyncGenerator[Snapshot | Events, None]:
        """The snapshot ``held``, in parts, then changes for ever.

        ``held``, by tier, must be what is visible as of the last :meth:`append`, and the generator's first step must
        follow without an await in between.

        Raises:
            Overloaded: there are too many subscribers, or this one fell too far behind: subscribe again.
        """
        if len(self._subscribers) >= self.subscribers_max:
            raise Overloaded(f"{len(self._subscribers)} subscribers already")
        sequence = self.sequence
        self._subscriber_last += 1
        key = self._subscriber_last
        subscriber = self._subscribers[key] = _Subscriber(self.changes_max)
        try:
            # At least one part, so that an empty node is known to be empty.
            parts = deque(
                (tier, hashes[start : start + SNAPSHOT_PART_HASHES])
                for tier, hashes in enumerate(held)
                for start in range(0, len(hashes), SNAPSHOT_PART_HASHES)
            )
            del held
            if not parts:
                parts.append((0, ()))
            while parts:  # none is kept: a subscription lives long
                tier, hashes = parts.popleft()
                yield Snapshot(self._generation, sequence, hashes, last=not parts, tier=tier)
            while True:
                changes = await subscriber.take()
                yield Events(self._generation, sequence + 1, changes)
                sequence += len(changes)
        finally:
            del self._subscribers[key]


class _Subscriber:
    """A bounded buffer between the node and one stream."""

    def __init__(self, changes_max: int) -> None:
        self._pending: deque[Change] = deque()
        self._changes_max = changes_max
        self._overflowed = False
        self._wake = asyncio.Event()

    def offer(self, changes: Sequence[Change]) -> bool:
        """Queue changes; False once, when that overflows the buffer."""
        if self._overflowed:
            return True
        self._wake.set()
        if len(self._pending) + len(changes) > self._changes_max:
            self._overflowed = True
            self._pending.clear()
            return False
        self._pending.extend(changes)
        return True

    async def take(self) -> tuple[Change, ...]:
        """The next changes, at least one."""
        while not self._pending and not self._overflowed:
            self._wake.clear()
            await self._wake.wait()
        if self._overflowed:
            raise Overloaded("the subscriber fell too far behind")
        count = min(len(self._pending), EVENTS_MAX)
        return tuple([self._pending.popleft() for _ in range(count)])

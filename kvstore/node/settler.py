"""What must follow whenever a node's arena was touched."""

import asyncio
from collections.abc import Sequence

from kvstore.copies.neighbours import Neighbours
from kvstore.index.arena import Arena
from kvstore.node.events import Feed
from kvstore.node.waiting import Waiters
from kvstore.tiers.tiering import Tiering
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Change


class Settler:
    """Tells the subscribers, wakes who waits, and ends in the arena what has had its time.

    Costs nothing while idle: one timer, armed only if something can expire.
    """

    def __init__(self, arena: Arena, feed: Feed, waiters: Waiters) -> None:
        self._arena = arena
        self._feed = feed
        self._waiters = waiters
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        """When it ends: uvloop's handle for a time that has come cannot tell."""
        self.tiering: Tiering | None = None
        """What hears of the arena's changes first; both come after this one, as they call it."""
        self.neighbours: Neighbours | None = None

    def settle(self) -> None:
        """After anything that touched the arena."""
        changes: Sequence[Change] = self._arena.take_changes()
        if self.tiering is not None and changes:
            changes = self.tiering.merge(changes)
        if changes:
            self.announce(changes)
        self._waiters.ended(self._arena.take_ended())
        self._arm()

    def announce(self, changes: Sequence[Change]) -> None:
        """Tell of changes, of the arena or of what is below it."""
        self._feed.append(changes)
        if self.neighbours is not None:
            self.neighbours.changed(changes)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        deadline_s = self._arena.next_deadline_s()
        if deadline_s is None or (self._timer is not None and self._timer_s <= deadline_s):
            return  # a timer that fires too early arms the next one
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline_s, self._on_timer)
        self._timer_s = deadline_s

    def _on_timer(self) -> None:
        self._timer = None
        self._arena.expire(clock.now_s())
        self.settle()

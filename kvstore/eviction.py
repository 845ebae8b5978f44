"""Which block goes first. Pure.

The order is least recently used, leaf first: a block that is leased or has a continuation here is never the victim.
Such blocks are found only when they reach the old end; there they are *parked* (taken out of the list) and put back
at the old end when their last lease or continuation goes. So every step of a search is paid by one earlier event,
and an eviction costs O(1) amortized although a long-lived prefix may sit at the old end for ever.
"""

from array import array


class Recency:
    """Slots from least to most recently used: a doubly linked list in two flat arrays, 8 bytes per slot."""

    def __init__(self, slots_max: int) -> None:
        self._end = slots_max  # the sentinel: its successor is the oldest, its predecessor the newest
        self._newer = array("I", range(slots_max + 1))  # a slot linked to itself is not in the list
        self._older = array("I", range(slots_max + 1))

    def __contains__(self, slot: int) -> bool:
        return self._newer[slot] != slot

    def oldest(self) -> int | None:
        """The least recently used slot in the list."""
        slot = self._newer[self._end]
        return None if slot == self._end else slot

    def touch(self, slot: int) -> None:
        """Make ``slot`` the most recently used, whether it was in the list or not."""
        self.remove(slot)
        newest = self._older[self._end]
        self._link(newest, slot, self._end)

    def restore(self, slot: int) -> None:
        """Put a parked slot back at the old end: everything that was older has gone since."""
        assert slot not in self
        self._link(self._end, slot, self._newer[self._end])

    def remove(self, slot: int) -> None:
        """Take ``slot`` out; harmless if it is not in."""
        older, newer = self._older[slot], self._newer[slot]
        self._newer[older] = newer
        self._older[newer] = older
        self._newer[slot] = self._older[slot] = slot

    def _link(self, older: int, slot: int, newer: int) -> None:
        self._newer[older] = self._older[newer] = slot
        self._older[slot] = older
        self._newer[slot] = newer

    def order(self) -> list[int]:
        """All slots in the list, oldest first, with both directions verified: for checks and tests."""
        slots: list[int] = []
        at = self._end
        while (newer := self._newer[at]) != self._end:
            assert self._older[newer] == at, "the list's directions disagree"
            slots.append(newer)
            assert len(slots) <= self._end, "the list has a cycle"
            at = newer
        assert self._older[self._end] == at
        return slots

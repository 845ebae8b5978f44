"""Which of the blocks that nobody uses gives way: by tenants' quotas, then by pins, then as the policy says. Pure.

A block that is leased, pinned hard or has a continuation here is never the victim, a softly pinned one only when
nothing unpinned is left. Such blocks are found only when they come up; then they are parked, and put back when what
kept them goes (:meth:`Victims.let_go`). So every step of a search is paid by one earlier event.
"""

from collections.abc import Callable, Sequence

from kvstore.index.eviction import Policy, Ranked
from kvstore.index.pins import HARD
from kvstore.index.tenants import Tenants
from tracehaul.wire.ids import BlockHash

SPARED_MAX = 32
"""Blocks passed over in one search because they can be lost only for good: what a search may cost while the tier
below is behind."""


class Victims:
    """The order in which the slots of one memory are given up. A slot is known from :meth:`add` to :meth:`remove`.

    ``rank`` is what pins say of the block in a known slot; ``is_idle`` whether nothing but pins keeps it;
    ``is_spared`` whether another victim would be better, if there is one near.
    """

    def __init__(
        self,
        tenants: Tenants,
        policy: Policy,
        rank: Callable[[int], float | None],
        is_idle: Callable[[int], bool],
    ) -> None:
        self._tenants = tenants
        self._policy = policy
        self._ranked = Ranked(len(tenants))
        self._rank = rank
        self._is_idle = is_idle
        self.is_spared: Callable[[int], bool] | None = None

    def add(self, slot: int, group: int, block_hash: BlockHash) -> None:
        """A block arrived in an unknown slot."""
        self._policy.add(slot, group, block_hash)

    def add_run(self, slots: Sequence[int], group: int, hashes: Sequence[BlockHash]) -> None:
        """As :meth:`add` for each, the last first."""
        self._policy.add_run(slots, group, hashes)

    def touch_run(self, slots: Sequence[int], group: int) -> None:
        """As :meth:`touch` for each; no two are the same."""
        if len(self._ranked):
            for slot in slots:
                self._ranked.remove(slot)
        self._policy.touch_run(slots, group)

    def oldest(self, count: int) -> list[int]:
        """Up to ``count`` slots that :meth:`choose` would look at first if there is one group, in order."""
        return self._policy.oldest(0, count)

    def remove_run(self, slots: Sequence[int]) -> None:
        """As :meth:`remove` for each of some that :meth:`oldest` named."""
        self._policy.remove_run(slots)

    def remove(self, slot: int) -> None:
        """The block is gone."""
        self._policy.remove(slot)
        self._ranked.remove(slot)

    def touch(self, slot: int, group: int) -> None:
        """A known slot was used."""
        self._ranked.remove(slot)
        self._policy.touch(slot, group)

    def let_go(self, slot: int, group: int) -> None:
        """A lease or a continuation that kept a known slot is gone; harmless if more keep it."""
        if slot not in self._policy and slot not in self._ranked and self._evictable(slot):
            self._policy.restore(slot, group)

    def reconsider(self, slot: int, group: int) -> None:
        """What pins say of a known slot has changed."""
        self._ranked.remove(slot)
        self.let_go(slot, group)

    def choose(self, group: int) -> int | None:
        """The slot whose block goes for one of ``group``; it stays known. None: nothing may go."""
        for yielding in self._tenants.yielding(group):
            slot = self._unpinned(yielding)
            if slot is not None:
                return slot
            while (slot := self._ranked.candidate(yielding)) is not None:
                if self._evictable(slot):
                    return slot
                self._ranked.remove(slot)
        return None

    def _unpinned(self, group: int) -> int | None:
        """The first that may go, those passed over put back; if all that are near are spared, the first of them."""
        spared: list[int] = []
        while (slot := self._policy.candidate(group)) is not None:
            rank = self._rank(slot)
            if rank is None and self._is_idle(slot):
                if self.is_spared is None or not self.is_spared(slot):
                    break
                spared.append(slot)
                if len(spared) > SPARED_MAX:
                    break
                self._policy.park(slot)
                continue
            self._policy.park(slot)  # until its last lease, pin or continuation goes
            if rank is not None and self._evictable(slot):
                self._ranked.add(slot, group, rank)
        if not spared:
            return slot
        for passed in reversed(spared):
            if passed not in self._policy:
                self._policy.restore(passed, group)
        return spared[0] if slot is None or slot == spared[-1] else slot

    def _evictable(self, slot: int) -> bool:
        return self._is_idle(slot) and self._rank(slot) != HARD

    def regroup(self, tenants: Tenants, policy: Policy, group_of: Sequence[int]) -> None:
        """Other tenants from now on, with a policy that knows no slot yet: the order within a group is kept."""
        order = [slot for group in range(len(self._tenants)) for slot in self._policy.order(group)]
        ranked = self._ranked
        self._tenants, self._policy, self._ranked = tenants, policy, Ranked(len(tenants))
        for slot in order:
            policy.touch(slot, group_of[slot])
        for slot, group in enumerate(group_of):
            if slot in ranked:  # a search comes across it again
                policy.restore(slot, group)

    def check(self, by_group: Sequence[Sequence[int]]) -> None:
        """Assert the invariants, given all known slots of each group."""
        self._ranked.check(self._rank)
        for group, known in enumerate(by_group):
            order = self._policy.order(group)
            assert len(order) == len(set(order))
            assert set(order) <= set(known)
            for slot in known:
                assert not (slot in self._policy and slot in self._ranked)
                found = slot in self._policy or slot in self._ranked
                assert found or not self._evictable(slot), "an evictable block would never be found"

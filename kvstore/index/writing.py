"""How a block comes into a slot of a node's memory: reserved by one writer, filled, published, or given up. Pure."""

from collections import deque
from collections.abc import Sequence

from kvstore.config import StoreConfig
from kvstore.index.holds import Grant, Reservation, Reservations
from kvstore.index.keeping import Keeping
from kvstore.index.slot_table import QUARANTINED, RUN_BLOCKS_MIN, SlotTable
from kvstore.index.tenants import TenantKey
from tracehaul.wire.blocks import BlockSpec, Full, InFlight, Present, Publication, PublishOutcome, Slot, TooLarge
from tracehaul.wire.ids import BlockHash, SlotGeneration

ReserveOutcome = Slot | Present | InFlight | Full | TooLarge
_PRESENT, _FULL, _TOO_LARGE = Present(), Full(), TooLarge()


class Writing:
    """The reservations of one arena, and the slots that rest after them. The arena calls :meth:`expire` first."""

    def __init__(self, config: StoreConfig, table: SlotTable, keeping: Keeping) -> None:
        self._config = config
        self._table = table
        self._keeping = keeping
        self._pins = keeping.pins
        self.reservations = Reservations(config.reservation_ttl_s)
        """To look at."""
        self.quarantine: deque[tuple[float, int]] = deque()
        """Slots that rest until no late write can land in them: (until_s, slot), in order."""
        self.passed_on = 0
        """Reservations that a second writer took over from a silent first one."""
        self._ended: list[BlockHash] = []

    def reconfigure(self, config: StoreConfig) -> None:
        """Other limits from now on."""
        self._config = config
        self.reservations.set_ttl(config.reservation_ttl_s)

    def quiet_at_s(self, block_hash: BlockHash) -> float | None:
        """When a block's reservation passes on to whoever asks, if its owner is not heard of until then; None without
        one. In the past: nobody is known to be writing it."""
        reservation = self.reservations.get(block_hash)
        if reservation is None:
            return None
        return self.reservations.heard_s(reservation) + self._config.reservation_quiet_s

    def take_ended(self) -> list[BlockHash]:
        """As :meth:`kvstore.index.arena.Arena.take_ended`."""
        ended, self._ended = self._ended, []
        return ended

    # --- reserving ----------------------------------------------------------------------------------------

    def reserve(self, blocks: Sequence[BlockSpec], grant: Grant, tenant: TenantKey) -> list[ReserveOutcome]:
        """As :meth:`kvstore.index.arena.Arena.reserve`."""
        outcomes = self._reserve_run(blocks, grant, tenant)
        rest = blocks[len(outcomes) :] if outcomes else blocks
        return [*outcomes, *[self.reserve_one(block, grant, tenant) for block in rest]]

    def reserve_one(self, block: BlockSpec, grant: Grant, tenant: TenantKey) -> ReserveOutcome:
        """A slot for one block."""
        now_s, table = grant.since_s, self._table
        if not 0 < block.size_bytes <= self._config.slot_bytes:
            return _TOO_LARGE
        slot = table.published.get(block.hash)
        if slot is not None:
            table.touch(slot)
            return _PRESENT
        quiet = self.reservations.get(block.hash)
        if quiet is not None and self.reservations.heard_s(quiet) + self._config.reservation_quiet_s > now_s:
            return InFlight(now_s - quiet.grant.since_s, quiet.grant.owner)
        if self.reservations.count(grant.owner) >= self._config.reservations_max:
            return _FULL
        parent = self._same_object(block.parent)
        if table.continuations.closes_cycle(block.hash, parent, self.reservations.parent_of):
            return _FULL
        table.continuations.expect(
            parent
        )  # before taking a slot: the prefix must not make room for its own continuation
        group = table.tenants.group(tenant)
        slots = table.take(1, group)
        if not slots:
            table.forget_child(parent)
            return _FULL
        if quiet is not None:  # its owner may yet write, and is fenced
            self._quarantine_reservation(quiet, now_s)
            self.passed_on += 1
        self.reservations.add(grant, slots, (block.hash,), (parent,))
        return table.grant(slots, (block.size_bytes,), group, tenant)[0]

    def _reserve_run(self, blocks: Sequence[BlockSpec], grant: Grant, tenant: TenantKey) -> list[ReserveOutcome]:
        """Slots for as many as can be had, from the first on, if each block continues the one before and none is here.

        None otherwise: then they are looked at one by one.
        """
        count = min(len(blocks), self._config.reservations_max - self.reservations.count(grant.owner))
        if count < RUN_BLOCKS_MIN:
            return []
        table = self._table
        hashes, parents = [block.hash for block in blocks[:count]], [block.parent for block in blocks[:count]]
        sizes = [block.size_bytes for block in blocks[:count]]
        if parents[1:] != hashes[:-1] or min(sizes) <= 0 or max(sizes) > self._config.slot_bytes:
            return []
        is_new = table.published.keys().isdisjoint(hashes) and self.reservations.has_none_of(hashes)
        if len(set(hashes)) < count or not is_new or not table.continuations.starts_run(hashes, parents[0]):
            return []
        parents = [self._same_object(parents[0]), *hashes[:-1]]
        table.continuations.expect(parents[0])
        group = table.tenants.group(tenant)
        slots = table.take(count, group)
        if not slots:
            table.forget_child(parents[0])
            return []
        count = len(slots)
        table.continuations.expect_run(hashes[: count - 1])
        self.reservations.add(grant, slots, hashes[:count], parents[:count])
        return [*table.grant(slots, sizes[:count], group, tenant)]

    # --- ending -------------------------------------------------------------------------------------------

    def landing(self, block: Publication, owner: str) -> tuple[int, int] | None:
        """Offset and size of the bytes that a publish of ``block`` would show; None if there is no such reservation."""
        reservation = self._find(block.hash, block.generation, owner)
        if reservation is None:
            return None
        return reservation.slot * self._config.slot_bytes, self._table.size[reservation.slot]

    def publish(self, blocks: Sequence[Publication], owner: str, now_s: float) -> list[PublishOutcome]:
        """As :meth:`kvstore.index.arena.Arena.publish`."""
        if len(blocks) >= RUN_BLOCKS_MIN and self._publish_run(blocks, owner):
            return ["published"] * len(blocks)
        return [self._publish(block, owner, now_s) for block in blocks]

    def _publish(self, block: Publication, owner: str, now_s: float) -> PublishOutcome:
        table = self._table
        reservation = self._find(block.hash, block.generation, owner)
        if reservation is None:
            slot = table.published.get(block.hash)
            held = None if slot is None else (table.generation[slot], table.checksum[slot])
            return "published" if held == (block.generation, block.checksum) else "fenced"
        self._end_reservation(reservation)
        table.publish(reservation.slot, reservation.hash, reservation.parent, block.checksum)
        if len(self._pins):
            self._keeping.arrived(reservation.hash, now_s)
        return "published"

    def _publish_run(self, blocks: Sequence[Publication], owner: str) -> bool:
        """Publish blocks that were reserved together and that no pin waits for; False where they are to be looked at
        one by one."""
        table = self._table
        found = [held for held in self.reservations.find([block.hash for block in blocks]) if held is not None]
        if len(found) < len(blocks):
            return False
        grant = found[0].grant
        slots, hashes = [held.slot for held in found], [held.hash for held in found]
        if grant.owner != owner or len({held.grant for held in found}) > 1 or len(set(slots)) < len(slots):
            return False
        if not table.are_granted(slots, [block.generation for block in blocks]):
            return False
        if len(self._pins) and any(map(self._pins.touched_by, hashes)):
            return False
        self.reservations.end(grant, hashes)
        self._ended += hashes
        table.publish_run(slots, hashes, [held.parent for held in found], [block.checksum for block in blocks])
        return True

    def abandon(self, blocks: Sequence[tuple[BlockHash, SlotGeneration]], owner: str) -> None:
        """Free reservations whose owner says that no write of its is under way. Unknown ones are ignored."""
        for block_hash, generation in blocks:
            reservation = self._find(block_hash, generation, owner)
            if reservation is not None:
                self._give_up(reservation)
                self._table.release(reservation.slot)

    def renew(self, blocks: Sequence[tuple[BlockHash, SlotGeneration]], owner: str, now_s: float) -> None:
        """The owner still writes these reservations. It moves no end. Unknown ones are ignored."""
        for block_hash, generation in blocks:
            reservation = self._find(block_hash, generation, owner)
            if reservation is not None:
                self.reservations.renew(reservation, now_s)

    def withdraw(self, block_hash: BlockHash, generation: SlotGeneration, owner: str, now_s: float) -> None:
        """End a reservation in quarantine: what is in its slot is wrong, or may yet change. Harmless if gone."""
        reservation = self._find(block_hash, generation, owner)
        if reservation is not None:
            self._quarantine_reservation(reservation, now_s)

    # --- time and loss ------------------------------------------------------------------------------------

    def deadline_s(self) -> float | None:
        """When :meth:`expire` next has something to do."""
        first_s = self.reservations.deadline_s()
        if not self.quarantine:
            return first_s
        rest_s = self.quarantine[0][0]
        return rest_s if first_s is None else min(first_s, rest_s)

    def expire(self, now_s: float) -> None:
        """End every reservation and every rest whose time has come."""
        for reservation in self.reservations.expired(now_s):
            self._quarantine_reservation(reservation, now_s)
        while self.quarantine and self.quarantine[0][0] <= now_s:
            _, slot = self.quarantine.popleft()
            self._table.release(slot)

    def disconnected(self, owner: str, now_s: float) -> None:
        """A writer is gone: its writes may still land."""
        for reservation in self.reservations.of(owner):
            self._quarantine_reservation(reservation, now_s)

    def _find(self, block_hash: BlockHash, generation: SlotGeneration, owner: str) -> Reservation | None:
        found = self.reservations.get(block_hash)
        if found is None or found.grant.owner != owner or self._table.generation[found.slot] != generation:
            return None
        return found

    def _end_reservation(self, reservation: Reservation) -> None:
        self.reservations.end(reservation.grant, (reservation.hash,))
        self._ended.append(reservation.hash)

    def _give_up(self, reservation: Reservation) -> None:
        """End one whose block is not published: its slot is nobody's."""
        self._end_reservation(reservation)
        self._table.forget_child(reservation.parent)
        self._table.give_back(reservation.slot)

    def _quarantine_reservation(self, reservation: Reservation, now_s: float) -> None:
        """The block may be reserved anew at once; its slot rests."""
        self._give_up(reservation)
        self._table.state[reservation.slot] = QUARANTINED
        self.quarantine.append((now_s + self._config.late_write_s, reservation.slot))

    def _same_object(self, parent: BlockHash) -> BlockHash:
        """The equal hash that is already held, if any: 64 bytes saved per block."""
        slot = self._table.published.get(parent)
        if slot is not None:
            return self._table.hash[slot] or parent
        reservation = self.reservations.get(parent)
        return reservation.hash if reservation is not None else parent

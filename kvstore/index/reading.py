"""How slots of a node's memory are protected while somebody reads them. Pure."""

from collections.abc import Sequence

from kvstore.config import StoreConfig
from kvstore.index.holds import HeldLease, Leases
from kvstore.index.slot_table import SlotTable
from kvstore.index.tenants import TenantKey
from tracehaul.wire.blocks import Leased, LeasedBlock
from tracehaul.wire.ids import BlockHash, LeaseId

HeldBlock = tuple[LeasedBlock, BlockHash, TenantKey]
"""A block that is held, its parent, and whose it is."""


class Reading:
    """The leases of one arena. The arena calls :meth:`expire` first."""

    def __init__(self, config: StoreConfig, table: SlotTable) -> None:
        self._config = config
        self._table = table
        self._leases = Leases()

    def __len__(self) -> int:
        """Open leases."""
        return len(self._leases)

    def reconfigure(self, config: StoreConfig) -> None:
        """Other limits from now on."""
        self._config = config

    def lease(self, hashes: Sequence[BlockHash], holder: str, ttl_s: float, now_s: float) -> Leased | None:
        """As :meth:`kvstore.index.arena.Arena.lease`."""
        if self._leases.count(holder) >= self._config.leases_max:
            return None
        lease = self._leases.next_id()
        ttl_s = min(ttl_s, self._config.lease_ttl_max_s)
        slots, blocks = self._table.protect(hashes)
        self._table.used(slots)
        if slots and ttl_s > 0:
            self._leases.add(lease, HeldLease(holder, now_s + ttl_s, slots))
        else:
            self._table.unprotect(slots)
        return Leased(lease, tuple(blocks), ttl_s)

    def hold(
        self, hashes: Sequence[BlockHash], holder: str, ttl_s: float, now_s: float
    ) -> tuple[LeaseId, list[HeldBlock | None]]:
        """As :meth:`kvstore.index.arena.Arena.hold`."""
        lease, table = self._leases.next_id(), self._table
        slots, blocks = table.protect(hashes)
        rest = iter(slots)
        found: list[HeldBlock | None] = []
        for block in blocks:
            if block is None:
                found.append(None)
            else:
                slot = next(rest)
                found.append((block, table.continuations.parent(slot), TenantKey(table.tenant[slot])))
        if slots:
            self._leases.add(lease, HeldLease(holder, now_s + ttl_s, slots))
        return lease, found

    def release(self, lease: LeaseId, holder: str) -> None:
        """As :meth:`kvstore.index.arena.Arena.release`."""
        if self._leases.is_held(lease, holder):
            self._table.unprotect(self._leases.end(lease))

    def open(self) -> list[HeldLease]:
        """Every open lease."""
        return self._leases.all()

    def deadline_s(self) -> float | None:
        """When :meth:`expire` next has something to do."""
        return self._leases.deadline_s()

    def expire(self, now_s: float) -> None:
        """End every lease whose time has come."""
        while (lease := self._leases.next_expired(now_s)) is not None:
            self._table.unprotect(self._leases.end(lease))

    def disconnected(self, holder: str) -> None:
        """A reader is gone."""
        for lease in self._leases.of(holder):
            self._table.unprotect(self._leases.end(lease))

"""What a store node is told at start."""

import msgspec

PAGE_BYTES = 4096
QUOTAS_MAX = 1024
POSITIVE = (
    "reservation_ttl_s",
    "reservation_quiet_s",
    "lease_ttl_max_s",
    "late_write_s",
    "wait_max_s",
    "pin_ttl_max_s",
    "pin_half_life_s",
)
COUNTS = (
    "reservations_max",
    "leases_max",
    "changes_max",
    "subscribers_max",
    "waiters_max",
    "pins_max",
    "pins_tenant_max",
)


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes, times and limits of one store node. Raises ValueError where they contradict each other."""

    arena_bytes: int
    """Memory for block bytes."""
    slot_bytes: int
    """Room for one block; a multiple of 4096, no smaller than a full block."""
    reservation_ttl_s: float = 10.0
    """From reserve to publish."""
    reservation_quiet_s: float = 0.9
    """A reservation whose owner has said nothing of it for this long goes to the next who asks for its block."""
    lease_ttl_max_s: float = 30.0
    """The longest lease that is granted; who asks for more gets this."""
    late_write_s: float = 30.0
    """How long after a writer is given up a one-sided write of its may still land: its slot rests that long."""
    reservations_max: int = 4096
    """Open reservations of one connection; beyond it the answer is Full."""
    leases_max: int = 1024
    """Open leases of one connection; beyond it the answer is Overloaded."""
    changes_max: int = 65536
    """Events buffered for one subscriber; one that falls further behind has to subscribe again."""
    subscribers_max: int = 64
    waiters_max: int = 1024
    """Requests that wait for blocks in flight; beyond it the answer is Overloaded."""
    wait_max_s: float = 30.0
    """The longest such wait."""
    quota_bytes: dict[str, int] = {}
    """Slot bytes that each tenant is sure of. Tenants without an entry share what is left."""
    pin_ttl_max_s: float = 3600.0
    """The longest pin that is granted; who asks for more gets this."""
    pin_half_life_s: float = 60.0
    """In which a soft pin's priority halves."""
    pins_max: int = 16384
    """Open pins."""
    pins_tenant_max: int = 4096
    """Open pins of one tenant."""
    hard_share_max: float = 0.5
    """Share of the slots that hard pins may cover."""
    hard_tenant_share_max: float = 0.25
    """Share of the slots that one tenant's hard pins may cover."""

    def __post_init__(self) -> None:
        if self.slot_bytes <= 0 or self.slot_bytes % PAGE_BYTES or self.slot_bytes >= 2**32:
            raise ValueError("slot_bytes must be a multiple of 4096 below 4 GiB")
        if self.arena_bytes < self.slot_bytes:
            raise ValueError("arena_bytes holds no slot")
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("hard_share_max", "hard_tenant_share_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1")
        if len(self.quota_bytes) > QUOTAS_MAX or any(quota < 0 for quota in self.quota_bytes.values()):
            raise ValueError(f"quota_bytes must have at most {QUOTAS_MAX} entries, none below 0")
        if sum(self.quota_bytes.values()) > self.arena_bytes:
            raise ValueError("quota_bytes must not promise more than arena_bytes")

    @property
    def slots_max(self) -> int:
        """Slots in the arena."""
        return self.arena_bytes // self.slot_bytes

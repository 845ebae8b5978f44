"""What a store node is told at start."""

import msgspec

PAGE_BYTES = 4096


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes, times and limits of one store node. Raises ValueError where they contradict each other."""

    arena_bytes: int
    """Memory for block bytes."""
    slot_bytes: int
    """Room for one block; a multiple of 4096, no smaller than a full block."""
    reservation_ttl_s: float = 10.0
    """From reserve to publish."""
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

    def __post_init__(self) -> None:
        if self.slot_bytes <= 0 or self.slot_bytes % PAGE_BYTES or self.slot_bytes >= 2**32:
            raise ValueError("slot_bytes must be a multiple of 4096 below 4 GiB")
        if self.arena_bytes < self.slot_bytes:
            raise ValueError("arena_bytes holds no slot")
        for name in ("reservation_ttl_s", "lease_ttl_max_s", "late_write_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        for name in ("reservations_max", "leases_max", "changes_max", "subscribers_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    @property
    def slots_max(self) -> int:
        """Slots in the arena."""
        return self.arena_bytes // self.slot_bytes

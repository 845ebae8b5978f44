"""What an operator may set on copies between store nodes."""

import msgspec


class ReplicationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How store nodes copy to each other. Raises ValueError where that makes no sense."""

    copy_bytes_s: int = 256 << 20
    """How fast one node copies blocks to others, for replicas and drains together."""
    grace_s: float = 5.0
    """A node that left has this long to come back before its copies are made anew elsewhere."""

    def __post_init__(self) -> None:
        if self.copy_bytes_s <= 0 or self.grace_s <= 0:
            raise ValueError("copy_bytes_s and grace_s must be positive")

"""What a store node counts."""

import msgspec


class StoreStats(msgspec.Struct):
    """Counts since the node's start."""

    reserved: int = 0
    full: int = 0
    published: int = 0
    fenced: int = 0
    corrupt_writes: int = 0
    """Publishes refused because the landed bytes did not match."""
    corrupt_held: int = 0
    """Published blocks dropped because their bytes had changed."""
    leased_blocks: int = 0
    missed_blocks: int = 0
    """Blocks asked for by a lease and not held."""
    waits: int = 0
    passed_on: int = 0
    """Reservations that a second writer took over from a silent first one."""
    pins_refused: int = 0
    in_flight: int = 0
    """Blocks not given to a writer because another was writing them."""
    leases_refused: int = 0

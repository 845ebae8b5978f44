"""What a store node is made of, below what answers requests."""

from typing import NamedTuple

from kvstore.index.arena import Arena
from kvstore.node.events import Feed
from kvstore.node.settler import Settler
from kvstore.node.stats import StoreStats
from kvstore.node.waiting import Waiters
from kvstore.tiers.tiering import Tiering
from tracehaul.transfer.plane import Plane
from tracehaul.wire.ids import Generation


class Parts(NamedTuple):
    """Of one node; made by :mod:`kvstore.node.assemble`."""

    generation: Generation
    planes: tuple[Plane, ...]
    arena: Arena
    """The index, with the limits in force: whoever changes it settles after."""
    feed: Feed
    waiters: Waiters
    settler: Settler
    stats: StoreStats
    tiering: Tiering | None
    """Moves to and from what is below memory; None without."""

"""A config with hosts, and ways to them."""

from collections.abc import Sequence
from typing import NamedTuple

from cluster.config import ClusterConfig
from cluster.fleet.survey import Hand


class Opened(NamedTuple):
    """For as long as :func:`cluster.fleet.operations.opened` is."""

    config: ClusterConfig
    hands: list[Hand]

    def router(self, but: Sequence[Hand]) -> Hand:
        """A host with a router: one that knows all nodes; rather none of ``but``."""
        routers = [hand for hand in self.hands if hand.host.nodes.router]
        return next((hand for hand in routers if hand not in but), routers[0])

"""What has to be done so that a host runs what it shall. Pure."""

from collections.abc import Mapping

import msgspec

from cluster.hosts.orders import HostReport, Order


class Changes(msgspec.Struct, frozen=True):
    """Names of nodes; each is in one of these at most."""

    stop: tuple[str, ...] = ()
    """Not of this host any more."""
    restart: tuple[str, ...] = ()
    """Started with something else than it should have."""
    start: tuple[str, ...] = ()


def changes(report: HostReport, order: Order, digests: Mapping[str, str]) -> Changes:
    """From what is there to what shall be. ``digests``: of the order's nodes, by name.

    One that is fenced is left alone unless it changed: whoever has its name now would lose it. One that waits to be
    started again goes on waiting.
    """
    wanted = [spec.name for spec in order.nodes]
    there = {node.name: node for node in report.nodes}
    changed = [name for name in wanted if name in there and there[name].digest != digests[name]]
    idle = [name for name in wanted if name not in there or there[name].state in ("stopped", "given up")]
    return Changes(
        stop=tuple(name for name, node in there.items() if name not in wanted and node.state != "stopped"),
        restart=tuple(name for name in changed if name not in idle),
        start=tuple(idle),
    )

"""What a store node, and a process that uses the store, show beside their counts."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.metrics_core import Metric

from cluster.metrics import counter, gauge
from kvstore.client.staging import Staging
from kvstore.node.node import StoreNode
from tracehaul.runtime.accepting import AcceptStats
from tracehaul.transfer.plane import Plane


def store_metrics(store: StoreNode) -> Callable[[], Iterable[Metric]]:
    """Of a store node."""

    def read() -> Iterable[Metric]:
        node = store.operations.describe()
        arena = store.arena
        taken = node.slots - node.slots_free - node.slots_quarantined - node.reservations - node.blocks
        yield gauge(
            "store_slots",
            {
                "free": node.slots_free,
                "published": node.blocks,
                "reserved": node.reservations,
                "quarantined": node.slots_quarantined,
                "condemned": max(0, taken),
            },
        )
        yield gauge("store_open_leases", node.leases)
        yield gauge("store_open_reservations", node.reservations)
        yield gauge("store_open_pins", node.pins)
        yield gauge("store_hard_pinned_blocks", arena.hard_pinned)
        yield gauge("store_waiting_requests", node.waiters)
        yield gauge("store_subscribers", node.subscribers)
        yield gauge("store_tenant_used_bytes", {usage.tenant: usage.used_bytes for usage in node.tenants})
        yield gauge("store_tenant_quota_bytes", {usage.tenant: usage.quota_bytes for usage in node.tenants})
        yield gauge("store_unwritten_blocks", store.tiering.behind if store.tiering is not None else 0)
        yield counter("store_evicted_blocks", arena.evicted)
        yield counter("store_softened_pins", arena.softened)
        yield counter("store_scrubbed_blocks", store.operations.scrubbed_blocks)
        yield counter("store_subscriber_overflows", store.feed.overflows)

    return read


def client_metrics(staging: Staging, buffer_bytes: int) -> Callable[[], Iterable[Metric]]:
    """Of a process that uses the store."""

    def read() -> Iterable[Metric]:
        free, quarantined = staging.free, staging.quarantined
        used = staging.count - free - quarantined
        yield gauge("store_client_staging_buffers", {"free": free, "used": used, "quarantined": quarantined})
        yield gauge("store_client_staging_quarantined_bytes", quarantined * buffer_bytes)

    return read


def transfer_metrics(planes: Sequence[Plane]) -> Callable[[], Iterable[Metric]]:
    """Of the transports. Only those through a network have bytes that land late, or notifications."""

    def read() -> Iterable[Metric]:
        transfers = [plane.transfer for plane in planes]
        yield gauge("transfer_quarantined_bytes", sum(getattr(t, "quarantined_bytes", 0) for t in transfers))
        yield counter("transfer_dropped_notifications", sum(getattr(t, "dropped", 0) for t in transfers))
        refused: Counter[str] = Counter()
        for transfer in transfers:
            if isinstance(accepts := getattr(transfer, "accepts", None), AcceptStats):
                refused.update(accepts.refused)
        yield counter("transfer_refused_connections", refused)

    return read

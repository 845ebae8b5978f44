"""A node's counters and gauges in Prometheus' text format.

Rooms count in plain structs and know nothing of metrics; here every field of such a struct becomes a metric of the
same name, read when somebody asks.
"""

from collections.abc import Callable, Iterable, Mapping

import msgspec
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from tracehaul.wire.cluster import NodeLoad


class StructCollector(Collector):
    """Reads ``stats`` (counts of a node's life) and ``load`` (what is so now) at each scrape, from any thread."""

    def __init__(self, stats: Mapping[str, msgspec.Struct], load: Callable[[], NodeLoad] | None) -> None:
        self._stats = dict(stats)
        self._load = load

    def collect(self) -> Iterable[Metric]:
        for part, stats in self._stats.items():
            for field in msgspec.structs.fields(stats):
                # Seconds carry their unit where Prometheus wants it: spelled out, before "total".
                seconds = field.name.endswith("_s")
                name = (
                    f"tracehaul_{part}_{field.name.removesuffix('_s')}_seconds"
                    if seconds
                    else (f"tracehaul_{part}_{field.name}")
                )
                yield _counter(name, getattr(stats, field.name))
        if self._load is not None:
            load = self._load()
            for field in msgspec.structs.fields(load):
                value = float(getattr(load, field.name))
                yield GaugeMetricFamily(f"tracehaul_node_{field.name}", f"{field.name} now", value=value)


def _counter(name: str, value: float | dict[str, int]) -> Metric:
    """One count, or one per reason."""
    if not isinstance(value, dict):
        return CounterMetricFamily(name, "since the node's start", value=float(value))
    family = CounterMetricFamily(name, "since the node's start", labels=["reason"])
    # A copy in one step: the event loop may add a reason while another thread reads.
    for reason, count in value.copy().items():
        family.add_metric([reason], count)
    return family


class NodeMetrics:
    """One node's registry, and the page that shows it."""

    def __init__(self, stats: Mapping[str, msgspec.Struct], load: Callable[[], NodeLoad] | None) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(StructCollector(stats, load))

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def serve(self) -> tuple[str, Callable[[], None]]:
        """Answers ``/metrics`` on a free loopback port, in a thread; returns its address and what ends it."""
        server, thread = start_http_server(0, addr="127.0.0.1", registry=self._registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(timeout=5.0)

        return f"127.0.0.1:{server.server_port}", close

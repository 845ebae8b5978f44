"""A node's counters and gauges in Prometheus' text format.

Rooms count in plain structs and know nothing of metrics; here every field of such a struct becomes a metric (by
:mod:`cluster.metric_names`), read when somebody asks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from cluster.metric_names import GAUGES, OTHER_COUNTERS, counter_of, load_of
from cluster.metric_names import Metric as Named
from tracehaul.wire.cluster import NodeLoad


class StructCollector(Collector):
    """Reads ``stats`` (counts of a node's life) and ``load`` (what is so now) at each scrape, from any thread."""

    def __init__(self, stats: Mapping[str, msgspec.Struct], load: Callable[[], NodeLoad] | None) -> None:
        self._stats = dict(stats)
        self._load = load

    def collect(self) -> Iterable[Metric]:
        for part, stats in self._stats.items():
            for field in msgspec.structs.fields(stats):
                metric = counter_of(part, type(stats).__name__, field.name)
                yield _counter(metric, getattr(stats, field.name))
        if self._load is not None:
            load = self._load()
            for field in msgspec.structs.fields(load):
                metric = load_of(field.name)
                yield GaugeMetricFamily(metric.name, metric.help, value=float(getattr(load, field.name)))


def _counter(metric: Named, value: float | dict[str, int]) -> Metric:
    """One count, or one per reason."""
    if not isinstance(value, dict):
        return CounterMetricFamily(metric.name, metric.help, value=float(value))
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    # A copy in one step: the event loop may add a reason while another thread reads.
    for reason, count in value.copy().items():
        family.add_metric([reason], count)
    return family


def gauge(name: str, values: float | Mapping[str, float]) -> Metric:
    """A gauge of :data:`cluster.metric_names.GAUGES`: one value, or one by label."""
    metric = GAUGES[name]
    if not isinstance(values, Mapping):
        return GaugeMetricFamily(f"tracehaul_{name}", metric.help, value=float(values))
    family = GaugeMetricFamily(f"tracehaul_{name}", metric.help, labels=metric.labels)
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def counter(name: str, value: float) -> Metric:
    """A counter of :data:`cluster.metric_names.OTHER_COUNTERS`."""
    return CounterMetricFamily(f"tracehaul_{name}", OTHER_COUNTERS[name].help, value=float(value))


class LateCollector(Collector):
    """Metrics that ``read`` makes at each scrape, from any thread."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class NodeMetrics:
    """One node's registry, and the page that shows it."""

    def __init__(
        self,
        stats: Mapping[str, msgspec.Struct],
        load: Callable[[], NodeLoad] | None,
        more: Sequence[Callable[[], Iterable[Metric]]] = (),
    ) -> None:
        """``more``: read at each scrape too."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(StructCollector(stats, load))
        for read in more:
            self._registry.register(LateCollector(read))

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

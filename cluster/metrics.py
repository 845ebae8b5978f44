"""A node's counters and gauges in Prometheus' text format.

Rooms count in plain structs and know nothing of metrics; here every field of such a struct becomes a metric (by
:mod:`cluster.metric_names`), read when somebody asks, on the event loop that changes them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.metric_names import GAUGES, OTHER_COUNTERS, counter_of, load_of
from cluster.metric_names import Metric as Named
from router.fleet.members import MemberRegistry
from router.fleet.pools import WORKERS
from router.http.config import ApiConfig
from router.http.pages import METRICS_TYPE
from router.http.server import ApiServer, serve
from tracehaul.wire.cluster import NodeLoad

CONNECTIONS_MAX = 64
GRACE_S = 1
"""For a scrape in progress when the node ends."""


class StructCollector(Collector):
    """Reads ``stats`` (counts of a node's life) and ``load`` (what is so now) at each scrape."""

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
                value = getattr(load, field.name)
                if not isinstance(value, str):
                    metric = load_of(field.name)
                    shown = len(value) if isinstance(value, tuple) else float(value)
                    yield GaugeMetricFamily(metric.name, metric.help, value=shown)


def _counter(metric: Named, value: float | dict[str, int] | dict[str, float]) -> Metric:
    """One count, or one per reason."""
    if not isinstance(value, dict):
        return CounterMetricFamily(metric.name, metric.help, value=float(value))
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    for reason, count in value.items():
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


def workers(members: MemberRegistry) -> Iterable[Metric]:
    """How many a router has of each role; also where these are none."""
    yield gauge("workers", {role: float(len(members.live(role))) for role in WORKERS})


def counter(name: str, value: float | dict[str, int]) -> Metric:
    """A counter of :data:`cluster.metric_names.OTHER_COUNTERS`: one value, or one by reason."""
    return _counter(OTHER_COUNTERS[name]._replace(name=f"tracehaul_{name}"), value)


class LateCollector(Collector):
    """Metrics that ``read`` makes at each scrape."""

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

    async def serve(self, host: str, port: int = 0) -> ApiServer:
        """Answer ``/metrics`` at ``host``; port 0: any that is free.

        Raises:
            OSError: there is no such address here.
        """

        async def page(request: Request) -> Response:
            return Response(self.render(), media_type=METRICS_TYPE)

        app = Starlette(routes=[Route("/metrics", page, methods=["GET"])])
        return await serve(app, host, port, grace_s=GRACE_S, config=ApiConfig(connections_max=CONNECTIONS_MAX))

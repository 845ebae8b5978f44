"""Metrics of one process in Prometheus's text format. Every name ends in its unit."""

from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

Unit = Literal["seconds", "bytes", "tokens", "blocks", "steps", "calls", "nodes", "ratio", "events"]

_PREFIX = "tracehaul"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What :meth:`Metrics.render` returns, for the HTTP header."""
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One process's registry; passed to whoever counts something. A name is declared once, by its owner.

    Labels are sets known in advance (a role, an outcome): never a trace, a step or a hash.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(namespace=_PREFIX, registry=self._registry)

    def counter(self, name: str, unit: Unit, description: str, labels: Sequence[str] = ()) -> Counter:
        """Something that only grows: ``tracehaul_<name>_<unit>_total``."""
        return Counter(name, description, labels, namespace=_PREFIX, unit=unit, registry=self._registry)

    def gauge(self, name: str, unit: Unit, description: str, labels: Sequence[str] = ()) -> Gauge:
        """Something that goes up and down: ``tracehaul_<name>_<unit>``."""
        return Gauge(name, description, labels, namespace=_PREFIX, unit=unit, registry=self._registry)

    def histogram(
        self,
        name: str,
        unit: Unit,
        description: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Histogram:
        """A distribution: ``tracehaul_<name>_<unit>`` with ``_bucket``, ``_count`` and ``_sum``."""
        return Histogram(
            name, description, labels, namespace=_PREFIX, unit=unit, buckets=buckets, registry=self._registry
        )

    def render(self) -> bytes:
        """All metrics, as :data:`CONTENT_TYPE`."""
        return generate_latest(self._registry)

"""Every metric has a name, a unit and a meaning, and the docs list exactly those."""

import re
from pathlib import Path

import msgspec
import pytest

from cluster.metric_names import COUNTERS, GAUGES, LOAD, OTHER_COUNTERS, PARTS, Metric, document, every
from cluster.rundir import NotesStats
from engines.adapter.books import AdapterStats
from kvstore.client.client import ClientStats
from kvstore.copies.copier import CopyStats
from kvstore.copies.replicator import ReplicaStats
from kvstore.node.pin_journal import JournalStats
from kvstore.node.stats import StoreStats
from kvstore.tiers.base import TierStats
from kvstore.tiers.object_tier import ObjectStats
from kvstore.tiers.stack import StackStats
from kvstore.tiers.tiering import TieringStats
from router.dispatch.stats import BillStats, DispatchStats
from tracehaul.runtime.accepting import AcceptStats
from tracehaul.runtime.output import OutputStats
from tracehaul.wire.cluster import NodeLoad
from worker.stats import WorkerStats

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.mark.parametrize(
    "stats",
    [
        StoreStats,
        TierStats,
        ObjectStats,
        StackStats,
        TieringStats,
        CopyStats,
        ReplicaStats,
        JournalStats,
        ClientStats,
        WorkerStats,
        AdapterStats,
        DispatchStats,
        BillStats,
        AcceptStats,
        NotesStats,
        OutputStats,
    ],
)
def test_every_count_has_a_metric(stats: type[msgspec.Struct]):
    """A new field needs a line in cluster/metric_names.py, and docs/metrics.md made anew."""
    fields = [field.name for field in msgspec.structs.fields(stats)]
    assert sorted(fields) == sorted(COUNTERS[stats.__name__])
    for field in msgspec.structs.fields(stats):
        several = field.type in (dict[str, int], dict[str, float])
        labels = (("reason",), ("pool",), ("tenant",)) if several else ((),)
        assert COUNTERS[stats.__name__][field.name].labels in labels


def test_every_field_of_a_heartbeat_has_a_metric():
    """Of every number, that is: why a node cannot serve is told by ``tracehaul status``."""
    fields = msgspec.structs.fields(NodeLoad)
    assert sorted(field.name for field in fields if field.type is not str) == sorted(LOAD)


def test_names_units_and_meanings():
    assert set(PARTS.values()) == set(COUNTERS)
    names = [metric.name for _, metric in every()]
    assert len(names) == len(set(names))
    for kind, metric in every():
        assert re.fullmatch(r"tracehaul(_[a-z0-9]+)+", metric.name)
        assert metric.name.endswith("_total") == (kind == "counter")
        assert metric.unit
        assert metric.help.endswith(".")
        for unit in ("bytes", "seconds"):
            assert metric.name.removesuffix("_total").endswith(f"_{unit}") == (metric.unit == unit), metric.name


def test_the_page_in_the_docs_is_up_to_date():
    assert DOCS.read_text() == document(), "python -m cluster.metric_names > docs/metrics.md"


def test_parts_share_no_name():
    known: list[Metric] = [*GAUGES.values(), *OTHER_COUNTERS.values()]
    assert all(metric.labels == () or len(metric.labels) == 1 for metric in known)

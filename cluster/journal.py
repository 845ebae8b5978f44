"""The journal of a router's traces, in the database that the config names."""

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module

from prometheus_client.metrics_core import Metric

from cluster.config import ClusterConfig
from cluster.metrics import gauge
from cluster.rundir import ClusterFault, RunDir
from router.assemble import Router
from router.dispatch.journal import Journal
from tracehaul.runtime.offload import Offload

TIMEOUT_S = 10.0
"""A transaction that takes longer has failed."""


async def remember(
    router: Router, config: ClusterConfig, run: RunDir, name: str, offload: Offload
) -> Callable[[], Iterable[Metric]]:
    """The router knows its traces again, as far as they are kept, and keeps them; returns what is to be shown of it.

    Raises:
        ClusterFault: the config names no database.
    """
    if config.traces_keep_s == 0:
        return tuple
    await offload.run(partial(import_module, "records.sql"))  # takes a quarter of a second
    from records.database import BadDatabase, database_url
    from records.sql import SqlRecords

    try:
        url = database_url(config.database, run.database(name))
    except BadDatabase as error:
        raise ClusterFault(str(error)) from error
    await router.remember(SqlRecords(url, name, TIMEOUT_S), config.traces_keep_s)
    assert router.journal is not None
    return partial(_metrics, router.journal)


def _metrics(journal: Journal) -> Iterable[Metric]:
    """What is so now."""
    yield gauge("journal_behind", float(journal.behind))
    yield gauge("journal_failing", float(journal.failing))

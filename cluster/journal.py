"""The journal of a router's traces, in the database that the config names."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module

from prometheus_client.metrics_core import Metric

from cluster.config import ClusterConfig
from cluster.metrics import gauge
from cluster.rundir import ClusterFault, RunDir
from router.assemble import Router
from router.calls.text import Text
from router.dispatch.journal import Journal
from tracehaul.runtime.offload import Offload

TIMEOUT_S = 10.0
"""A transaction that takes longer has failed."""


async def remember(
    router: Router, config: ClusterConfig, run: RunDir, name: str, offload: Offload, texts: Mapping[str, Text]
) -> Callable[[], Iterable[Metric]]:
    """The router knows its traces again, as far as they are kept, and keeps them; returns what is to be shown of it.

    ``texts``: by what clients call their models.

    Raises:
        ClusterFault: the config names no database, or a shared one and not this cluster.
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
    editions = {served: text.revision for served, text in texts.items()}
    await router.remember(SqlRecords(url, rows_of(config, name), TIMEOUT_S), config.traces_keep_s, editions)
    assert router.journal is not None
    return partial(_metrics, router.journal)


def rows_of(config: ClusterConfig, router: str) -> str:
    """Whose rows a router's are: a database that the config names may be other clusters', too.

    Raises:
        ClusterFault: the config does not say which cluster this is.
    """
    if not config.database:
        return router
    if not config.name:
        raise ClusterFault("with `database` a cluster has a `name` of its own")
    return f"{config.name}/{router}"


def _metrics(journal: Journal) -> Iterable[Metric]:
    """What is so now."""
    yield gauge("journal_behind", float(journal.behind))
    yield gauge("journal_failing", float(journal.failing))

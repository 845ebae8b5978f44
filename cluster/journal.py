"""The journal of a router's traces, in the database that the config names."""

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.metrics_core import Metric

from cluster.config import ClusterConfig
from cluster.metrics import gauge
from cluster.rundir import ClusterFault, RunDir
from router.assemble import Router
from router.calls.text import Text
from router.dispatch.journal import Journal
from tracehaul.runtime.offload import Offload

if TYPE_CHECKING:
    from records.database import URL

TIMEOUT_S = 10.0
"""A transaction that takes longer has failed."""


class Whose(NamedTuple):
    """A router."""

    router: str
    address: str
    """``host:port`` that other routers reach its control plane by."""


async def remember(
    router: Router,
    config: ClusterConfig,
    run: RunDir,
    whose: Whose,
    offload: Offload,
    texts: Mapping[str, Text],
) -> Callable[[], Iterable[Metric]]:
    """The router knows its traces again, as far as they are kept, and keeps them; returns what is to be shown of it.

    ``texts``: by what clients call their models.

    Raises:
        ClusterFault: the config names no database, or a shared one and not this cluster.
    """
    if config.traces_keep_s == 0:
        return tuple
    await offload.run(partial(import_module, "records.sql"))  # takes a quarter of a second
    from records.sql import SqlRecords

    url = url_of(config, run, whose.router)
    editions = {served: text.revision for served, text in texts.items()}
    scope, life = rows_of(config, whose.router), secrets.token_hex(8)
    records = SqlRecords(url, scope, whose.router, life, whose.address, TIMEOUT_S)
    shared_as = whose.router if config.database else ""
    await router.remember(records, config.traces_keep_s, editions, offload, shared_as)
    assert router.journal is not None
    return partial(_metrics, router.journal)


def url_of(config: ClusterConfig, run: RunDir, router: str) -> "URL":
    """Where the database is; takes a quarter of a second the first time.

    Raises:
        ClusterFault: the config names none that could be used.
    """
    from records.database import BadDatabase, database_url

    try:
        return database_url(config.database, run.database(router))
    except BadDatabase as error:
        raise ClusterFault(str(error)) from error


def rows_of(config: ClusterConfig, router: str) -> str:
    """Whose rows a router's are: its cluster's; a database that the config names may be other clusters', too.

    Raises:
        ClusterFault: the config does not say which cluster this is.
    """
    if not config.database:
        return router
    if not config.name:
        raise ClusterFault("with `database` a cluster has a `name` of its own")
    return config.name


def _metrics(journal: Journal) -> Iterable[Metric]:
    """What is so now."""
    yield gauge("journal_behind", float(journal.behind))
    yield gauge("journal_failing", float(journal.failing))

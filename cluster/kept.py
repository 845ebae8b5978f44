"""What clients keep at a router: files and batches in a folder or in a bucket, chat completions in the database; and
what is told of their ends."""

import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import msgspec
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp

from cluster.config import ClusterConfig
from cluster.journal import TIMEOUT_S, rows_of, url_of
from cluster.kept_jobs import opened_bucket, opened_jobs
from cluster.metrics import gauge
from cluster.rundir import RunDir
from cluster.webhooks.opening import opened_outbox
from jobs.webhooks.outbox import Outbox, WebhookStats
from records.documents import Documents
from records.later import LaterDocuments
from router.assemble import Router
from router.calls.calls import UNFORESEEN
from router.calls.text import Text
from router.dispatch.bill_keeper import BillKeeper
from router.dispatch.bills import Bills
from router.http.chats import Chats, ChatStats
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from router.http.keys import Keyring
from router.http.outliving import Outliving
from tracehaul.runtime.offload import Offload


class Kept(NamedTuple):
    """All of it."""

    jobs: Jobs | None
    chats: Chats
    outbox: Outbox | None
    outliving: Outliving
    stats: Mapping[str, msgspec.Struct]
    """By part."""

    def app(
        self,
        router: Router,
        texts: Mapping[str, Text],
        config: ApiConfig,
        offload: Offload,
        shown: Callable[[], bytes],
        keyring: Keyring | None,
    ) -> ASGIApp:
        """What serves a router's clients with all of it: see :meth:`router.assemble.Router.app`."""
        kept = (self.jobs, self.chats, self.outbox, self.outliving)
        return router.app(texts, config, offload, shown, UNFORESEEN, keyring, *kept)

    def metrics(self) -> Iterable[Metric]:
        """What is so now."""
        if self.outbox is not None:
            yield gauge("webhooks_waiting", self.outbox.waiting)
            yield gauge("webhooks_broken", self.outbox.broken)


@asynccontextmanager
async def opened_kept(
    config: ClusterConfig, run: RunDir, router: str, offload: Offload, bills: Bills
) -> AsyncGenerator[Kept, None]:
    """As long as this is open, what the router bills is written down, too. The database is opened when it is needed
    first.

    Raises:
        ClusterFault: the config names no database, or a shared one and not this cluster.
    """
    scope = rows_of(config, router)
    if config.database:
        await offload.run(partial(url_of, config, run, router))

    async def made() -> Documents:
        await offload.run(partial(import_module, "records.documents_sql"))
        from records.documents_sql import SqlDocuments

        return SqlDocuments(url_of(config, run, router), scope, TIMEOUT_S)

    documents, chats, webhooks = LaterDocuments(made), ChatStats(), WebhookStats()
    own = partial(LaterDocuments, made)
    try:
        async with (
            _jobs(config, run, router, documents, scope) as jobs,
            opened_outbox(config, run, router, offload, own, webhooks) as outbox,
            BillKeeper(bills, documents, f"{router}/{secrets.token_hex(8)}", config.bills_keep_s),
        ):
            stats = {"chats": chats, "webhooks": webhooks}
            outliving = Outliving(documents, router, config.api.responses_age_s, shared=bool(config.database))
            yield Kept(jobs, Chats(documents, config.api, chats), outbox, outliving, stats)
    finally:
        await documents.close()


def _jobs(
    config: ClusterConfig, run: RunDir, router: str, documents: Documents, scope: str
) -> AbstractAsyncContextManager[Jobs | None]:
    """Where the config says that files are."""
    if config.api.files_url:
        return opened_bucket(config.api, documents, scope, router)
    return opened_jobs(Path(config.api.files_dir) / router if config.api.files_dir else run.jobs(router), config.api)

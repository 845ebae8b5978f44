"""The outbox of a router, opened with what it needs."""

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

from cluster.config import ClusterConfig
from cluster.rundir import RunDir
from cluster.webhooks.secrets import ensure
from cluster.webhooks.sender import HttpSender
from jobs.webhooks.outbox import Outbox, WebhookStats
from records.documents import Documents
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload

log = Log(__name__)


@asynccontextmanager
async def opened_outbox(
    config: ClusterConfig,
    run: RunDir,
    router: str,
    offload: Offload,
    documents: Callable[[], Documents],
    stats: WebhookStats,
) -> AsyncGenerator[Outbox | None, None]:
    """As long as this is open; None: nobody is to be told.

    Each missing secret is made, but on hosts of a fleet, whose routers have it in common: there it has to be laid.
    """
    if not config.webhooks:
        yield None
        return
    if not config.hosts:
        for webhook in config.webhooks:
            try:
                await offload.run(partial(ensure, run.webhooks / webhook.secret))
            except OSError as error:
                log.warning("webhook: there is no secret, and none can be made", secret=webhook.secret, why=error)
    kept, sender = documents(), HttpSender(config.webhooks, run.webhooks)
    try:
        receivers, dice = [each.receiver for each in config.webhooks], random.SystemRandom()
        yield Outbox(receivers, kept, router, sender, stats, dice, shared=bool(config.database))
    finally:
        sender.close()
        await kept.close()

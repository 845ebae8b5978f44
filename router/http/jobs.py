"""What outlives calls: files and batches, their pages, and what runs them."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.routing import Route
from starlette.types import ASGIApp

from jobs.asking import Asker
from jobs.batch import Batch
from jobs.batches import Batches
from jobs.files import Files
from jobs.lines import LineError, model_not_found
from jobs.live import Means
from jobs.runner import Runner
from jobs.webhooks.outbox import Outbox
from router.http.access import ANYBODY, Caller
from router.http.batches import BatchPages
from router.http.config import ApiConfig
from router.http.files import FilePages
from router.http.in_process import InProcess
from router.http.keys import Key, Keyring
from router.http.others import Others, finding
from router.http.told import note_batch
from tracehaul.runtime.tasks import Tasks


class Jobs(NamedTuple):
    """What is kept of them."""

    files: Files
    batches: Batches
    held: Callable[[Collection[str]], Awaitable[str | None]] | None = None
    """A router that keeps files and batches beside these and is none of the given ones: it stands still, say. Raises
    OSError."""
    erase_left: Callable[[str, Collection[str] | None], Awaitable[tuple[int, int]]] | None = None
    """Removes a tenant's files and batches, and counts them, that routers left which are gone; those of the given names
    live, and do it themselves (None: nobody knows which live). Raises OSError, StillRuns."""
    shared: bool = False
    """Every router has all files."""


class JobsServed:
    """Their pages; :meth:`living` runs batches."""

    def __init__(
        self,
        jobs: Jobs,
        endpoints: Mapping[str, ASGIApp],
        models: Collection[str],
        keyring: Keyring | None,
        config: ApiConfig,
        dice: random.Random,
        runner: Runner,
        outbox: Outbox | None = None,
        others: Others | None = None,
    ) -> None:
        """
        Args:
            jobs: what is kept.
            endpoints: what lines ask, by path.
            models: that may be asked for.
            keyring: the keys that are valid; None: nobody is asked for one.
            config: limits.
            dice: for names.
            runner: has batches run.
            outbox: is told what is over.
            others: routers that keep theirs; None: there are none.
        """
        self._others = others
        self._jobs = jobs
        self._endpoints = endpoints
        self._models = models
        self._keyring = keyring
        self._config = config
        self._dice = dice
        self._runner = runner
        self._outbox = outbox

    def routes(self) -> list[Route]:
        """Of all their pages."""
        files = FilePages(self._jobs.files, self._config, self._dice, None if self._jobs.shared else self._others)
        batches = BatchPages(self._jobs.batches, self._jobs.files, self._dice, self._others)
        found = finding(self._others, self._jobs.held)
        of_files = finding(None if self._jobs.shared else self._others, self._jobs.held)
        return [
            Route("/v1/files", files.upload, methods=["POST"]),
            Route("/v1/files", files.list, methods=["GET"]),
            Route("/v1/files/{id}", of_files(files.show), methods=["GET"]),
            Route("/v1/files/{id}", of_files(files.delete), methods=["DELETE"]),
            Route("/v1/files/{id}/content", of_files(files.content), methods=["GET"]),
            Route("/v1/batches", of_files(batches.create), methods=["POST"]),
            Route("/v1/batches", batches.list, methods=["GET"]),
            Route("/v1/batches/{id}", found(batches.show), methods=["GET"]),
            Route("/v1/batches/{id}/cancel", found(batches.cancel), methods=["POST"]),
        ]

    @asynccontextmanager
    async def living(self) -> AsyncGenerator[None, None]:
        """As long as the server runs."""
        async with Tasks("jobs") as tasks:
            means = Means(self._runner, self._asker, self._refuse, self._over)
            tasks.start(self._jobs.batches.run(means), "batches")
            await asyncio.sleep(0)  # they have begun when the first client comes
            yield

    def _over(self, batch: Batch) -> None:
        if self._outbox is not None:
            note_batch(self._outbox, batch)

    def _key(self, batch: Batch) -> Key | None:
        """The key that asked for it, if it is valid still."""
        return None if self._keyring is None or batch.key is None else self._keyring.of(batch.key)

    def _asker(self, batch: Batch) -> Asker:
        if self._keyring is None:
            return InProcess(batch.id, self._endpoints, lambda: ANYBODY)
        return InProcess(batch.id, self._endpoints, lambda: None if (key := self._key(batch)) is None else Caller(key))

    def _refuse(self, batch: Batch, model: str) -> LineError | None:
        key = self._key(batch)
        if model not in self._models:
            return model_not_found(model)
        if self._keyring is not None and (key is None or not Caller(key).serves(model)):
            message = f"This API key may not use the model {model[:128]!r}."
            return LineError("model_not_allowed", message, param="body.model")
        return None

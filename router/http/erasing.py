"""``DELETE /v1/data``: all that is kept of a tenant, at every router, as one."""

from collections.abc import Generator
from contextlib import contextmanager

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jobs.batch import results_name
from jobs.files import NoRoom
from jobs.live import StillRuns
from records.base import RecordsLost
from router.calls.errors import unavailable
from router.http.chats import Chats
from router.http.erasures import Erasure, Erasures
from router.http.jobs import Jobs
from router.http.others import Others, asked_by_router
from router.http.outliving import Outliving
from router.http.pages import json_response
from router.http.responses import ResponsesEndpoint
from router.http.traces import TracePages, salt


class DataDeleted(msgspec.Struct, frozen=True):
    """What there was."""

    traces: int
    responses: int
    chat_completions: int
    batches: int
    files: int
    deleted: bool = True
    object: str = "data"


class Erasing:
    """A tenant (its key's, else ``cache_salt``) erases its own only; None of an argument: nothing such is kept."""

    def __init__(
        self,
        traces: TracePages,
        responses: ResponsesEndpoint,
        outliving: Outliving | None,
        chats: Chats | None,
        jobs: Jobs | None,
        others: Others | None = None,
    ) -> None:
        self._others = others
        self._traces = traces
        self._responses = responses
        self._outliving = outliving
        self._chats = chats
        self._jobs = jobs

    async def erase(self, request: Request) -> Response:
        """``DELETE /v1/data``: what runs ends; what is answered is gone. Where something cannot be now, the rest is,
        and it can be asked for again. The other routers do the same."""
        whose = salt(request)
        erasure = await self._traces.noted(request, Erasure(whose, all=True))
        gone = await self._here(whose, asked=asked_by_router(request))
        self._traces.did(erasure)
        for told in [] if self._others is None else await self._others.told(request, erasure):
            gone = _both(gone, msgspec.json.decode(told, type=DataDeleted))
        return json_response(gone)

    async def catch_up(self, erasures: Erasures) -> None:
        """Erase what this router was not told of, as it was gone or stood still; until it is cancelled. Only what
        it had itself then: what all have in common was erased when it was asked for; there may be new things since."""

        async def erase(erasure: Erasure, at_s: float) -> None:
            if erasure.all:
                await self._late(erasure.tenant, at_s)
            await self._traces.catch_up(erasure, at_s)

        await erasures.run(erase)

    async def _late(self, whose: str, at_s: float) -> None:
        """What this router alone had then, of what is not a trace."""
        with _not_erased():
            if self._jobs is not None:
                await self._jobs_late(self._jobs, whose, at_s)
            for key in self._responses.kept.of(whose, at_s):
                await self._responses.forget(key)
            if self._outliving is not None:
                await self._outliving.erase_own(whose, at_s)

    async def _jobs_late(self, jobs: Jobs, whose: str, at_s: float) -> None:
        theirs = [each.id for each in jobs.batches.list(whose) if each.created_at <= at_s]
        results = {results_name(name, ok=ok) for name in theirs for ok in (True, False)}
        try:
            await jobs.batches.erase(whose, at_s)
        finally:
            for file in await jobs.files.list(whose, 0):
                if file.id in results or (not jobs.shared and file.created_at <= at_s):
                    await jobs.files.delete(file)

    async def _here(self, whose: str, *, asked: bool) -> DataDeleted:
        """At this router; what others left only if none asked."""
        with _not_erased():
            batches = files = 0
            # First: what is taken over meanwhile is its new router's, and erased there.
            if self._jobs is not None and self._jobs.erase_left is not None and not asked:
                names = None if self._others is None else self._others.names
                batches, files = await self._jobs.erase_left(whose, names)
            if self._jobs is not None:
                batches += await self._jobs.batches.erase(whose)
                files += await self._jobs.files.erase(whose)
            keys = self._responses.kept.of(whose)
            for key in keys:
                await self._responses.forget(key)
            if self._outliving is not None:
                await self._outliving.erase(whose)
            chats = 0 if self._chats is None else await self._chats.erase(whose)
        traces = await self._traces.erase(whose)
        return DataDeleted(traces, len(keys), chats, batches, files)


@contextmanager
def _not_erased() -> Generator[None, None, None]:
    """Where something cannot be deleted now, that is said."""
    try:
        yield
    except (OSError, RecordsLost, NoRoom, StillRuns) as error:
        raise unavailable(f"not all of it could be deleted now, ask again: {error}", "not_erased") from error


def _both(one: DataDeleted, two: DataDeleted) -> DataDeleted:
    """What there was at both; each trace that is written down is known to the first."""
    return DataDeleted(
        max(one.traces, two.traces),
        one.responses + two.responses,
        one.chat_completions + two.chat_completions,
        one.batches + two.batches,
        one.files + two.files,
    )

"""``/v1/batches``: many calls that nobody waits for, from a file and into files."""

import random
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from jobs.batch import Batch, Counts, Status
from jobs.batches import Batches
from jobs.files import Files, NoRoom
from jobs.lines import ENDPOINTS, LineError
from jobs.live import TooMany
from jobs.windows import window_s
from router.calls.errors import CallFailed, invalid, unavailable
from router.calls.identity import ID_CHARACTERS_MAX
from router.dialects.body import parse
from router.http.access import caller_of
from router.http.asgi import body_of
from router.http.files import AGE_S_MAX, AGE_S_MIN, files_told
from router.http.others import Others
from router.http.pages import json_response, listed, page_after, page_limit
from router.http.traces import salt
from tracehaul.runtime.clock import wall_s

BODY_BYTES_MAX = 64 * 2**10
BODY_TIMEOUT_S = 10.0

Name = Annotated[str, Meta(max_length=64)]
Value = Annotated[str, Meta(max_length=512)]


class OutputAge(msgspec.Struct, frozen=True):
    """When what a batch was answered is deleted."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=AGE_S_MIN, le=AGE_S_MAX)]


class BatchBody(msgspec.Struct, frozen=True):
    """``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: Annotated[str, Meta(max_length=16)]
    """``24h``, or any of a number and ``m``, ``h`` or ``d``."""
    metadata: Annotated[dict[Name, Value], Meta(max_length=16)] | None = None
    output_expires_after: OutputAge | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """Why a batch failed."""

    data: tuple[LineError, ...]
    object: Literal["list"] = "list"


class BatchObject(msgspec.Struct, frozen=True):
    """A batch, as OpenAI tells of it."""

    id: str
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None
    object: Literal["batch"] = "batch"


class BatchPages:
    """A tenant (its key's, else ``cache_salt``) sees its own batches only."""

    def __init__(self, batches: Batches, files: Files, dice: random.Random, others: Others | None = None) -> None:
        self._others = others
        self._batches = batches
        self._files = files
        self._dice = dice

    async def create(self, request: Request) -> Response:
        """``POST /v1/batches``."""
        tenant, now = salt(request), int(wall_s())
        asked = parse(await body_of(request, bytes_max=BODY_BYTES_MAX, timeout_s=BODY_TIMEOUT_S), BatchBody)
        if asked.endpoint not in ENDPOINTS:
            message = f"endpoint must be one of {', '.join(ENDPOINTS)}"
            if asked.endpoint == "/v1/embeddings":
                message = f"/v1/embeddings is not served: models of text make none; {message}"
            raise invalid(message, "endpoint", "invalid_value")
        try:
            seconds = window_s(asked.completion_window)
        except ValueError as error:
            raise invalid(str(error), "completion_window", "invalid_value") from None
        with files_told():
            file = await self._files.get(tenant, asked.input_file_id, now)
        if file is None:
            shown = asked.input_file_id[:ID_CHARACTERS_MAX]
            raise CallFailed("not_found", f"No such File object: {shown}", param="input_file_id", code="file_not_found")
        if file.purpose != "batch":
            message = f"the file was uploaded with the purpose {file.purpose}, not batch"
            raise invalid(message, "input_file_id", "invalid_value")
        key = caller_of(request.scope).key
        batch = Batch(
            f"batch_{self._dice.getrandbits(128):032x}",
            tenant,
            asked.endpoint,
            file.id,
            asked.completion_window,
            now,
            now + seconds,
            output_age_s=None if asked.output_expires_after is None else asked.output_expires_after.seconds,
            metadata=asked.metadata,
            key=None if key is None else key.id,
        )
        try:
            await self._batches.create(batch, file)
        except TooMany as error:
            raise CallFailed("limited", str(error), code="too_many_batches") from None
        except NoRoom as error:
            raise unavailable(str(error), "no_room_for_files") from None
        return json_response(told(batch))

    async def list(self, request: Request) -> Response:
        """``GET /v1/batches?limit=&after=``: the newest first."""
        limit = page_limit(request)
        all_ = self._batches.list(salt(request))
        if self._others is not None:
            return await self._others.listed(request, all_, told, limit, newest_first=True)
        found = page_after(request, all_[::-1], "batch", lambda batch: batch.id)
        return listed([told(batch) for batch in found[:limit]], lambda batch: batch.id, more=len(found) > limit)

    async def show(self, request: Request) -> Response:
        """``GET /v1/batches/{id}``."""
        return json_response(told(self._batch(request)))

    async def cancel(self, request: Request) -> Response:
        """``POST /v1/batches/{id}/cancel``: what was answered by then is delivered."""
        try:
            return json_response(told(await self._batches.cancel(self._batch(request))))
        except NoRoom as error:
            raise unavailable(str(error), "no_room_for_files") from None

    def _batch(self, request: Request) -> Batch:
        name = str(request.path_params["id"])
        if (batch := self._batches.get(salt(request), name)) is None:
            message = f"No batch found with id '{name[:ID_CHARACTERS_MAX]}'."
            raise CallFailed("not_found", message, param="id", code="batch_not_found")
        return batch


def told(batch: Batch) -> BatchObject:
    """To its owner."""
    return BatchObject(
        batch.id,
        batch.endpoint,
        BatchErrors(batch.errors) if batch.errors else None,
        batch.input_file_id,
        batch.completion_window,
        batch.status,
        batch.output_file_id,
        batch.error_file_id,
        batch.created_at,
        batch.in_progress_at,
        batch.expires_at,
        batch.finalizing_at,
        batch.completed_at,
        batch.failed_at,
        batch.expired_at,
        batch.cancelling_at,
        batch.cancelled_at,
        batch.counts,
        batch.metadata,
    )

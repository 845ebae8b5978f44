"""``/v1/files``: what clients keep here, to run it or to fetch it."""

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import Literal

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from jobs.files import File, Files, NoRoom, TooLong
from router.calls.errors import CallFailed, invalid, unavailable
from router.calls.identity import ID_CHARACTERS_MAX
from router.http.asgi import header
from router.http.config import ApiConfig
from router.http.multipart import Form
from router.http.others import Others, sought
from router.http.pages import json_response, listed, page_after, page_limit
from router.http.traces import salt
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.log import Log

log = Log(__name__)

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
"""That a client may say; what a batch answers is of ``batch_output``."""
BATCH_AGE_S = 30 * 86_400
"""A batch's input that says nothing else is kept for so long."""
AGE_S_MIN, AGE_S_MAX = 3600, BATCH_AGE_S
FILENAME_CHARACTERS_MAX = 255
LIST_MAX = 10_000
FORM_BYTES = 1 << 16
"""A form has no more than this beside its file."""
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


class FileObject(msgspec.Struct, frozen=True):
    """A file, as OpenAI tells of it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None
    status: Literal["processed"] = "processed"
    object: Literal["file"] = "file"


class FileForm(msgspec.Struct, frozen=True):
    """``POST /v1/files``. ``expires_after`` may be said as ``expires_after[anchor]`` and ``expires_after[seconds]``."""

    file: bytes
    purpose: Literal["assistants", "batch", "evals", "fine-tune", "user_data", "vision"]


class FileDeleted(msgspec.Struct, frozen=True):
    """``DELETE /v1/files/{id}``."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


class FilePages:
    """A tenant (its key's, else ``cache_salt``) sees its own files only."""

    def __init__(self, files: Files, config: ApiConfig, dice: random.Random, others: Others | None = None) -> None:
        self._others = others
        self._files = files
        self._config = config
        self._dice = dice

    async def upload(self, request: Request) -> Response:
        """``POST /v1/files``: a form of ``file``, ``purpose`` and, if anything, ``expires_after``."""
        tenant, now = salt(request), int(wall_s())
        bytes_max = self._config.file_bytes_max
        announced = header(request.scope, b"content-length")
        if announced.isdigit() and int(announced[:20]) > bytes_max + FORM_BYTES:
            raise _too_long(TooLong(f"a file must not be longer than {bytes_max} bytes"))
        if header(request.scope, b"content-encoding") not in (b"", b"identity"):
            raise CallFailed("unsupported_media", "a file is uploaded as it is, not packed", code="packed")
        form = Form(header(request.scope, b"content-type"), "file")
        name = f"file-{self._dice.getrandbits(96):024x}"
        arrived = 0
        try:
            async with aclosing(await self._files.arriving(tenant, name, now)) as upload:
                async with asyncio.timeout(self._config.body_timeout_s) as patience:
                    async for data in request.stream():
                        arrived += len(data)
                        if arrived > bytes_max + FORM_BYTES:
                            raise TooLong(f"a file must not be longer than {bytes_max} bytes")
                        for piece in form.feed(data):
                            await upload.write(piece)
                        patience.reschedule(asyncio.get_running_loop().time() + self._config.body_timeout_s)
                file = _file(form, name, tenant, upload.size, now)
                await self._files.keep(upload, file)
        except TooLong as error:
            raise _too_long(error) from None
        except NoRoom as error:
            raise unavailable(str(error), "no_room_for_files") from None
        except TimeoutError:
            raise CallFailed("too_slow", "the file stopped arriving", code="timeout") from None
        except ClientDisconnect:
            raise CallFailed("invalid", "the client left", code="client_gone") from None
        return json_response(told(file))

    async def list(self, request: Request) -> Response:
        """``GET /v1/files?purpose=&limit=&order=&after=``: the newest first."""
        asked = request.query_params
        with files_told():
            found = list(await self._files.list(salt(request), int(wall_s())))
        if (purpose := asked.get("purpose")) is not None:
            found = [file for file in found if file.purpose == purpose]
        if (order := asked.get("order", "desc")) not in ("asc", "desc"):
            raise invalid("order must be asc or desc", "order", "invalid_value")
        if order == "desc":
            found.reverse()
        limit = page_limit(request, LIST_MAX, LIST_MAX)
        if self._others is not None:
            return await self._others.listed(request, found, told, limit, newest_first=order == "desc")
        rest = page_after(request, found, "file", lambda file: file.id)
        return listed([told(file) for file in rest[:limit]], lambda file: file.id, more=len(rest) > limit)

    async def show(self, request: Request) -> Response:
        """``GET /v1/files/{id}``."""
        return json_response(told(await self._file(request)))

    async def content(self, request: Request) -> Response:
        """``GET /v1/files/{id}/content``: its bytes."""
        file = await self._file(request)
        try:
            chunks = await self._files.open(file, sought(request))
        except FileNotFoundError:
            raise _not_found(file.id) from None
        except OSError as error:
            raise unavailable(f"the file cannot be read: {error.strerror}", "file_unreadable") from None
        # Never as what a browser would show or run.
        headers = {"content-length": str(file.bytes), "content-disposition": "attachment"}
        return _Timely(chunks, self._config.send_timeout_s, headers)

    async def delete(self, request: Request) -> Response:
        """``DELETE /v1/files/{id}``."""
        file = await self._file(request)
        try:
            await self._files.delete(file)
        except OSError as error:
            raise unavailable(f"the file cannot be deleted: {error.strerror}", "file_undeletable") from None
        return json_response(FileDeleted(file.id))

    async def _file(self, request: Request) -> File:
        name = str(request.path_params["id"])
        with files_told():
            file = await self._files.get(salt(request), name, int(wall_s()))
        if file is None:
            raise _not_found(name)
        return file


class _Timely(StreamingResponse):
    """Ends when its client takes nothing for too long, and what it reads with it."""

    def __init__(self, chunks: AsyncGenerator[bytes], timeout_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(chunks, media_type="application/octet-stream", headers=headers)
        self._chunks = chunks
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            with suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def timely(message: Message) -> None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            await super().stream_response(timely)
        except OSError as error:  # the connection ends before all has come, so nobody takes it for whole
            log.error("a file is not told to its end", why=error.strerror)
            raise ClientDisconnect from None


@contextmanager
def files_told() -> Generator[None, None, None]:
    """Where nobody knows now which files there are, that is said."""
    try:
        yield
    except OSError as error:
        raise unavailable(f"files cannot be looked up: {error.strerror}", "files_unavailable") from None


def told(file: File) -> FileObject:
    """To its owner."""
    return FileObject(file.id, file.bytes, file.created_at, file.filename, file.purpose, file.expires_at)


def _file(form: Form, name: str, tenant: str, size: int, now: int) -> File:
    """What the form makes of what arrived. Raises CallFailed."""
    if not form.ended:
        raise invalid("the form has no end", code="invalid_multipart")
    if form.filename is None:
        raise invalid("the form has no file", "file", "missing_required_parameter")
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise invalid("the form has no purpose", "purpose", "missing_required_parameter")
    if purpose not in PURPOSES:
        raise invalid(f"purpose must be one of {', '.join(PURPOSES)}", "purpose", "invalid_value")
    filename = form.filename[:FILENAME_CHARACTERS_MAX] or "upload"
    return File(name, tenant, filename, purpose, size, now, _expiry(form.fields, purpose, now))


def _expiry(fields: Mapping[str, str], purpose: str, now: int) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return now + BATCH_AGE_S if purpose == "batch" else None
    if anchor != "created_at":
        raise invalid("a file expires after its created_at", "expires_after[anchor]", "invalid_value")
    if seconds is None or not _NUMBER.fullmatch(seconds) or not AGE_S_MIN <= int(seconds) <= AGE_S_MAX:
        message = f"a file expires after {AGE_S_MIN} to {AGE_S_MAX} seconds"
        raise invalid(message, "expires_after[seconds]", "invalid_value")
    return now + int(seconds)


def _too_long(error: TooLong) -> CallFailed:
    return CallFailed("too_large", str(error), param="file", code="file_too_large")


def _not_found(name: str) -> CallFailed:
    message = f"No such File object: {name[:ID_CHARACTERS_MAX]}"
    return CallFailed("not_found", message, param="id", code="file_not_found")

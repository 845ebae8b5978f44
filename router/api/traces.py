"""``/v1/traces``: what clients may know of their traces, and say of them. All of it is optional."""

import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.api.errors import ApiError, bad_request
from router.api.identity import ID_CHARACTERS_MAX
from router.api.requests import SALT_CHARACTERS_MAX
from router.book import Book
from router.views import TraceDeleted
from tracehaul.wire.ids import TraceId

LIMIT_MAX = 100
LIMIT = 20

_NUMBER = re.compile(r"[0-9]{1,6}")


class TracePages:
    """The endpoints. A tenant (``cache_salt``) sees its own traces only."""

    def __init__(self, book: Book) -> None:
        self._book = book

    async def list(self, request: Request) -> Response:
        """``GET /v1/traces?limit=&after=``: the last used first."""
        after = request.query_params.get("after")
        page = self._book.page(_salt(request), _limit(request), TraceId(after) if after is not None else None)
        if page is None:
            raise bad_request(f"no trace {str(after)[:ID_CHARACTERS_MAX]!r} is known to go on after", "after")
        return _json(page)

    async def show(self, request: Request) -> Response:
        """``GET /v1/traces/{id}``."""
        trace = _trace(request)
        view = self._book.view(_salt(request), trace)
        if view is None:
            raise not_found(trace)
        return _json(view)

    async def delete(self, request: Request) -> Response:
        """``DELETE /v1/traces/{id}``: what runs of it ends, and what only it held is freed."""
        trace = _trace(request)
        if not self._book.delete(_salt(request), trace):
            raise not_found(trace)
        return _json(TraceDeleted(trace))


def not_found(trace: TraceId) -> ApiError:
    """404: nobody knows it, or it is another tenant's."""
    name = trace[:ID_CHARACTERS_MAX]
    return ApiError(404, f"the trace {name!r} is not known", param="id", code="trace_not_found")


def _trace(request: Request) -> TraceId:
    return TraceId(str(request.path_params["id"]))


def _salt(request: Request) -> str:
    salt = request.query_params.get("cache_salt", "")
    if len(salt) > SALT_CHARACTERS_MAX:
        raise bad_request(f"cache_salt must have at most {SALT_CHARACTERS_MAX} characters", "cache_salt")
    return salt


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(LIMIT))
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= LIMIT_MAX:
        raise bad_request(f"limit must be from 1 to {LIMIT_MAX}", "limit", "invalid_value")
    return int(text)


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")

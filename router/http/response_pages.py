"""What can be asked of a response later."""

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from router.calls.errors import CallFailed, invalid
from router.calls.identity import ID_CHARACTERS_MAX
from router.dialects.responses import Responses
from router.dialects.responses.kept import Entry, chain
from router.http.config import ApiConfig
from router.http.idempotency import Since
from router.http.pages import json_response, listed, page_after, page_limit
from router.http.response_items import id_of
from router.http.responses import ResponsesEndpoint
from router.http.telling import Followed
from router.http.traces import salt
from tracehaul.runtime import clock


class ResponseDeleted(msgspec.Struct, frozen=True):
    """``DELETE /v1/responses/{id}``."""

    id: str
    deleted: Literal[True] = True
    object: Literal["response"] = "response"


class ResponsePages:
    """A tenant (its key's, else ``cache_salt``) sees its own only."""

    def __init__(self, responses: ResponsesEndpoint, config: ApiConfig) -> None:
        self._responses = responses
        self._config = config

    async def show(self, request: Request) -> HttpResponse:
        """``GET /v1/responses/{id}``."""
        entry = self._entry(request)
        if request.query_params.get("stream", "false").lower() in ("false", "0"):
            return _body(entry)
        since = Since(_number(request, "starting_after") + 1, "starting_after")
        return Followed(self._responses.telling(entry), since, Responses(), self._config)

    async def delete(self, request: Request) -> HttpResponse:
        """``DELETE /v1/responses/{id}``: if it still runs, it ends."""
        key = self._entry(request).key
        await self._responses.forget(key)
        return json_response(ResponseDeleted(key[1]))

    async def cancel(self, request: Request) -> HttpResponse:
        """``POST /v1/responses/{id}/cancel``: what runs in the background ends; what has ended stays as it is."""
        entry = self._entry(request)
        if not entry.background:
            raise invalid("Cannot cancel a synchronous response.", "response_id", "invalid_value")
        await self._responses.cancel(entry.key)
        return _body(entry)

    async def input_items(self, request: Request) -> HttpResponse:
        """``GET /v1/responses/{id}/input_items?limit=&order=&after=``: all that it answers, the newest first."""
        items = chain(self._entry(request).asked)
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid("order must be asc or desc", "order", "invalid_value")
        limit = page_limit(request)
        if order == "desc":
            items.reverse()
        rest = page_after(request, items, "item", id_of)
        return listed(rest[:limit], id_of, more=len(rest) > limit)

    def _entry(self, request: Request) -> Entry:
        name = str(request.path_params["id"])
        entry = self._responses.kept.get((salt(request), name), clock.now_s())
        if entry is None:
            shown = name[:ID_CHARACTERS_MAX]
            raise CallFailed("not_found", f"Response with id {shown!r} not found.", param="response_id")
        return entry


def _number(request: Request, name: str) -> int:
    """Of an event; -1 if none is named. Raises CallFailed."""
    sent = request.query_params.get(name)
    if sent is None:
        return -1
    if not (sent.isascii() and sent.isdigit() and len(sent) < 10):
        raise invalid(f"{name} is the sequence_number of an event: a whole number from 0 on", name, "invalid_value")
    return int(sent)


def _body(entry: Entry) -> HttpResponse:
    return HttpResponse(entry.body, media_type="application/json")

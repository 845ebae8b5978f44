"""``/v1/traces``: what clients may know of their traces, and say of them. All of it is optional."""

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from router.calls.conversation import NAME_CHARACTERS_MAX
from router.calls.errors import CallFailed, invalid
from router.calls.identity import ID_CHARACTERS_MAX
from router.dialects.body import parse
from router.dialects.openai.requests import SALT_CHARACTERS_MAX
from router.http.access import caller_of
from router.http.asgi import body_of
from router.http.erasures import PARAMETER, Erasure, Erasures
from router.http.others import Others, asked_by_router
from router.http.pages import json_response, page_limit
from router.traces.book import Book, TraceBusy
from router.traces.views import TraceDeleted, TracesDeleted, TraceView
from tracehaul.runtime import clock
from tracehaul.wire.blocks import REPLICAS_MAX, PinKind
from tracehaul.wire.ids import TraceId

SECONDS_MAX = 30 * 86400.0
PRIORITY_MAX = float(2**32)
BODY_BYTES_MAX = 16384
BODY_TIMEOUT_S = 10.0

Seconds = Annotated[float, Meta(ge=0, le=SECONDS_MAX)]


class Suspend(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``suspend``."""

    expected_s: Seconds
    deadline_s: Annotated[float, Meta(gt=0, le=SECONDS_MAX)] | None = None
    """If it is not back by then it has ended."""
    tool: Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX)] | None = None


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``resume``: empty."""


class PinBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``pin``."""

    ttl_s: Seconds = 600.0
    """The store may grant less: see its ``pin_ttl_max_s``."""
    kind: PinKind = "soft"
    priority: Annotated[float, Meta(gt=1, le=PRIORITY_MAX)] = 1024.0
    """Of a soft pin: it halves every minute, and ends at 1."""
    replicas: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 1


class PinAnswer(msgspec.Struct, frozen=True):
    """The pin as the store has it."""

    id: TraceId
    blocks: int
    held: int
    """Of those, in the store now."""
    remaining_s: float
    object: Literal["trace.pin"] = "trace.pin"


class TracePages:
    """The endpoints. A tenant (its key's, else ``cache_salt``) sees its own traces only."""

    def __init__(
        self,
        book: Book,
        forget: Callable[[str, str], None],
        others: Others | None = None,
        erasures: Erasures | None = None,
    ) -> None:
        """``forget``: what calls were told in a tenant's trace. ``others``: routers that may know traces, too, and
        ``erasures``, where these see what was erased."""
        self._others = others
        self._erasures = erasures
        self._book = book
        self._forget = forget

    async def list(self, request: Request) -> Response:
        """``GET /v1/traces?limit=&after=``: the last used first."""
        after = request.query_params.get("after")
        page = self._book.page(salt(request), page_limit(request), TraceId(after) if after is not None else None)
        if page is None:
            raise invalid(f"no trace {str(after)[:ID_CHARACTERS_MAX]!r} is known to go on after", "after")
        return json_response(page)

    async def show(self, request: Request) -> Response:
        """``GET /v1/traces/{id}``."""
        trace = await self._here(request)
        return _answer(trace, self._book.view(salt(request), trace))

    async def suspend(self, request: Request) -> Response:
        """``POST /v1/traces/{id}/suspend``: a tool runs, or a person reads, and that will take about so long."""
        trace, body = await self._here(request), await _body(request, Suspend)
        try:
            view = self._book.suspend(salt(request), trace, body.expected_s, body.deadline_s, body.tool)
        except TraceBusy as busy:
            raise CallFailed("conflict", str(busy), param="id", code="trace_busy") from None
        return _answer(trace, view)

    async def resume(self, request: Request) -> Response:
        """``POST /v1/traces/{id}/resume``: the tool is done, so that its context should come back now."""
        trace, _ = await self._here(request), await _body(request, Resume)
        try:
            view = self._book.resume(salt(request), trace)
        except TraceBusy as busy:
            raise CallFailed("conflict", str(busy), param="id", code="trace_busy") from None
        return _answer(trace, view)

    async def pin(self, request: Request) -> Response:
        """``POST /v1/traces/{id}/pin``: keep its contexts in the store; ``ttl_s`` 0 ends that."""
        caller_of(request.scope).steer("pins")
        trace, body = await self._here(request), await _body(request, PinBody)
        pinned = await self._book.pin(salt(request), trace, body.kind, body.ttl_s, body.priority, body.replicas)
        if pinned is None:
            raise not_found(trace)
        return json_response(PinAnswer(trace, pinned.blocks, pinned.held, pinned.remaining_s))

    async def delete(self, request: Request) -> Response:
        """``DELETE /v1/traces/{id}``: what runs of it ends, and what only it held is freed; at every router."""
        trace, here, whose = TraceId(str(request.path_params["id"])), asked_by_router(request), salt(request)
        erasure = await self.noted(request, Erasure(whose, trace=trace))
        told = [] if self._others is None else await self._others.told(request, erasure)
        if not here:
            await self._book.arrive(whose, trace)
        known = await self._delete(whose, trace, here=here)
        self.did(erasure)
        if not known and not told:
            raise not_found(trace)
        return json_response(TraceDeleted(trace))

    async def delete_all(self, request: Request) -> Response:
        """``DELETE /v1/traces``: all of a tenant's, as one; with all that was said in them."""
        erasure = await self.noted(request, Erasure(salt(request)))
        count = await self.erase(salt(request))
        self.did(erasure)
        for told in [] if self._others is None else await self._others.told(request, erasure):
            count = max(count, msgspec.json.decode(told, type=TracesDeleted).deleted)
        return json_response(TracesDeleted(count))

    async def erase(self, whose: str) -> int:
        """Forget all traces of that tenant; how many there were."""
        for trace in self._book.names(whose):
            self._forget(whose, trace)
        return await self._book.erase(whose)

    async def noted(self, request: Request, erasure: Erasure) -> str | None:
        """All routers will do it; what it is called, if anything. Raises CallFailed."""
        if self._erasures is None or asked_by_router(request):
            return request.query_params.get(PARAMETER)
        return await self._erasures.note(erasure)

    def did(self, erasure: str | None) -> None:
        """It is done here."""
        if self._erasures is not None:
            self._erasures.did(erasure)

    async def catch_up(self, erasure: Erasure, at_s: float) -> None:
        """Do of traces that this router has, and had then, what it was not told of. Raises ClusterError."""
        theirs = self._book.names(erasure.tenant, clock.wall_s() - at_s)
        if erasure.trace is not None:
            trace = TraceId(erasure.trace)
            began_since = trace not in theirs and trace in self._book.names(erasure.tenant)
            theirs = [] if began_since else [trace]
        for trace in theirs:
            await self._delete(erasure.tenant, trace, here=True)

    async def _delete(self, whose: str, trace: TraceId, *, here: bool) -> bool:
        self._forget(whose, trace)
        return await self._book.delete(whose, trace, here=here)

    async def _here(self, request: Request) -> TraceId:
        """The trace's name; it is known here, if any router knows it."""
        trace = TraceId(str(request.path_params["id"]))
        await self._book.arrive(salt(request), trace)
        return trace


def not_found(trace: TraceId) -> CallFailed:
    """404: nobody knows it, or it is another tenant's."""
    name = trace[:ID_CHARACTERS_MAX]
    return CallFailed("not_found", f"the trace {name!r} is not known", param="id", code="trace_not_found")


B = TypeVar("B", bound=msgspec.Struct)


async def _body(request: Request, kind: type[B]) -> B:
    """The body, which may be empty where nothing must be said.

    Raises:
        CallFailed: it is too long or too slow, or not what the endpoint takes; names the field.
    """
    body = await body_of(request, bytes_max=BODY_BYTES_MAX, timeout_s=BODY_TIMEOUT_S)
    return parse(body or b"{}", kind)


def _answer(trace: TraceId, view: TraceView | None) -> Response:
    if view is None:
        raise not_found(trace)
    return json_response(view)


def salt(request: Request) -> str:
    """Whose traces, or whatever else, are asked for. Raises CallFailed if it is too long."""
    salt = request.query_params.get("cache_salt", "")
    if len(salt) > SALT_CHARACTERS_MAX:
        raise invalid(f"cache_salt must have at most {SALT_CHARACTERS_MAX} characters", "cache_salt")
    return caller_of(request.scope).space(salt).salt

"""What every page is behind: keys, web pages of other origins, the access log. Calls pass it in their endpoint, which
no layer may wrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from starlette.datastructures import Headers as HeaderMap
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.calls.errors import CallFailed
from router.http.access import CALLER, PUBLIC, Gate
from router.http.asgi import Headers
from router.http.repeats import Repeats
from router.http.request_ids import REQUEST_ID
from router.http.turns import Turns
from router.http.visits import LEFT, Visit, Visits
from tracehaul.runtime import clock

EXPOSED = (
    "x-request-id",
    "x-trace-id",
    "x-tracehaul-warning",
    "idempotent-replayed",
    "retry-after",
    *(f"x-ratelimit-{name}-{kind}" for kind in ("requests", "tokens") for name in ("limit", "remaining", "reset")),
)
"""Headers that a page's script may read."""
METHODS = ("GET", "POST", "DELETE")


class Origins:
    """Web pages that may use the API from a browser."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(allowed)

    def headers(self, origin: str | None) -> Headers:
        """What an answer says to a page of that origin."""
        if origin is None or not self._allowed:
            return []
        exposed = (b"access-control-expose-headers", ", ".join(EXPOSED).encode())
        if "*" in self._allowed:
            return [(b"access-control-allow-origin", b"*"), exposed]
        vary = (b"vary", b"Origin")
        if origin not in self._allowed:
            return [vary]
        return [(b"access-control-allow-origin", origin.encode("latin-1")), exposed, vary]

    def middleware(self) -> list[Middleware]:
        """The same for pages, and answers to what browsers ask before."""
        if not self._allowed:
            return []
        # It mirrors the headers that are asked for: clients bring their own, and none of them says who they are
        # without a key in it.
        return [
            Middleware(
                CORSMiddleware,
                allow_origins=sorted(self._allowed),
                allow_methods=METHODS,
                allow_headers=["*"],
                expose_headers=EXPOSED,
            )
        ]


class Edge(NamedTuple):
    """What stands at the edge, for pages and calls."""

    gate: Gate
    origins: Origins
    visits: Visits
    turns: Turns
    repeats: Repeats


class Entrance:
    """Lets requests for pages in. ``refusal``: what those are told that it does not, in the form of their path."""

    def __init__(self, app: ASGIApp, edge: Edge, refusal: Callable[[str, CallFailed], Response]) -> None:
        self._app = app
        self._refusal = refusal
        self._gate = edge.gate
        self._visits = edge.visits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(str(scope.get(REQUEST_ID, "")), scope["method"], scope["path"])
        status, first_s = LEFT, None

        async def tell(message: Message) -> None:
            nonlocal status, first_s
            if message["type"] == "http.response.start":
                status, first_s = message["status"], clock.now_s()
            await send(message)

        try:
            if scope["path"] not in PUBLIC:
                visit.caller = scope[CALLER] = self._gate.enter(HeaderMap(scope=scope))
                visit.tenant = "" if visit.caller.key is None else visit.caller.key.tenant
            await self._app(scope, receive, tell)
        except CallFailed as refused:
            await self._refusal(scope["path"], refused)(scope, receive, tell)
        finally:
            self._visits.over(visit, status, first_s)

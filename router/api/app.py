"""The application: routes, and what is answered without running anything."""

import random
from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.config import ApiConfig
from router.api.errors import RETRY_AFTER_S, ApiError, translate
from router.api.generate import Endpoint, Generation, model_not_found
from router.api.identity import fresh_name, request_id
from router.api.requests import ChatRequest, CompletionRequest
from router.api.responses import ModelEntry, ModelList
from router.api.text import Text
from router.api.traces import TracePages
from router.dispatch.steps import Dispatcher
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.offload import Offload
from tracehaul.wire.errors import ClusterError

UNFORESEEN = random.SystemRandom()
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Health(msgspec.Struct, frozen=True):
    """``GET /health``."""

    status: str
    reason: str | None = None


class Pages:
    """The endpoints that only look."""

    def __init__(self, dispatcher: Dispatcher, metrics_render: Callable[[], bytes]) -> None:
        self._dispatcher = dispatcher
        self._metrics_render = metrics_render
        self._created = int(wall_s())

    async def models(self, request: Request) -> Response:
        """What can be asked for now."""
        return _json(ModelList(self._entries()))

    async def model(self, request: Request) -> Response:
        """One of those; ids may hold slashes."""
        name = request.path_params["name"]
        for entry in self._entries():
            if entry.id == name:
                return _json(entry)
        raise model_not_found(name)

    async def health(self, request: Request) -> Response:
        """200 while some decode worker is ready."""
        if self._dispatcher.model() is not None:
            return _json(Health("ready"))
        workers = [node for node in self._dispatcher.nodes() if node.info.role == "decode"]
        reason = "no decode worker has joined"
        if workers:
            reason = "no decode worker is ready: " + ", ".join(f"{w.info.node} is {w.health}" for w in workers[:8])
        return _json(Health("unavailable", reason), 503, {"retry-after": str(RETRY_AFTER_S)})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._metrics_render(), media_type=METRICS_TYPE)

    async def cluster(self, request: Request) -> Response:
        """Every known node."""
        return _json(self._dispatcher.nodes())

    def _entries(self) -> list[ModelEntry]:
        card = self._dispatcher.model()
        return [] if card is None else [ModelEntry(card.name, self._created, card.context_max)]


class RequestIds:
    """Gives every answer an ``X-Request-Id``: the client's own, or a fresh one."""

    def __init__(self, app: ASGIApp, dice: random.Random) -> None:
        self._app = app
        self._dice = dice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id(Headers(scope=scope).get("x-request-id"), fresh_name(self._dice))

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        await self._app(scope, receive, tell)


def create_app(
    dispatcher: Dispatcher,
    text: Text,
    metrics_render: Callable[[], bytes],
    config: ApiConfig,
    offload: Offload,
    dice: random.Random = UNFORESEEN,
) -> Starlette:
    """The whole HTTP surface.

    Args:
        dispatcher: runs steps.
        text: the served model's tokenizer and template.
        metrics_render: what ``/metrics`` answers.
        config: limits.
        offload: where long texts are tokenized; the caller closes it.
        dice: for the names of calls that have none, and the seeds of those that ask for none.
    """
    generation = Generation(dispatcher, text, config, offload, dice)
    pages = Pages(dispatcher, metrics_render)
    traces = TracePages(dispatcher.book)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", Endpoint(generation, ChatRequest), methods=["POST"]),
            Route("/v1/completions", Endpoint(generation, CompletionRequest), methods=["POST"]),
            Route("/v1/models", pages.models, methods=["GET"]),
            Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
            Route("/v1/traces", traces.list, methods=["GET"]),
            Route("/v1/traces/{id:path}/suspend", traces.suspend, methods=["POST"]),
            Route("/v1/traces/{id:path}/resume", traces.resume, methods=["POST"]),
            Route("/v1/traces/{id:path}/pin", traces.pin, methods=["POST"]),
            Route("/v1/traces/{id:path}", traces.show, methods=["GET"]),
            Route("/v1/traces/{id:path}", traces.delete, methods=["DELETE"]),
            Route("/health", pages.health, methods=["GET"]),
            Route("/metrics", pages.metrics, methods=["GET"]),
            Route("/cluster", pages.cluster, methods=["GET"]),
        ],
        middleware=[Middleware(RequestIds, dice=dice)],
        exception_handlers=dict.fromkeys((HTTPException, ApiError, ClusterError, Exception), _refuse),
    )


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        told = ApiError(
            error.status_code,
            f"{request.method} {request.url.path[:256]}: {error.detail}",
            code=codes.get(error.status_code),
        )
        return _json(told.body, told.status, dict(error.headers or {}))
    told = translate(error)
    return _json(told.body, told.status, {"retry-after": str(RETRY_AFTER_S)} if told.retry else None)


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")

"""The application: routes, and how what fails outside a call is answered."""

import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from router.calls.calls import UNFORESEEN, Calls
from router.calls.errors import CallFailed
from router.calls.text import Text
from router.dialects.base import Dialect, Teller
from router.dialects.chat import Chat
from router.dialects.completions import Completions
from router.dialects.messages import Messages
from router.dialects.messages.answers import error_body as messages_error
from router.dialects.openai.errors import error_body
from router.dispatch.steps import Dispatcher
from router.http.access import Gate
from router.http.config import ApiConfig
from router.http.endpoint import Endpoint
from router.http.entrance import Edge, Entrance, Origins
from router.http.errors import STATUS, headers_of
from router.http.jobs import Jobs, JobsServed
from router.http.keys import Keyring
from router.http.openapi import document
from router.http.pages import Pages, json_response
from router.http.request_ids import RequestIds
from router.http.responses import ResponsePages, ResponsesEndpoint
from router.http.tokens import TokenPages
from router.http.traces import TracePages
from router.http.translate import translate
from router.http.visits import Visits
from tracehaul.runtime.offload import Offload
from tracehaul.wire.errors import ClusterError

DIALECTS: Mapping[str, Dialect[Teller]] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completions(),
    "/v1/messages": Messages(),
}
"""The dialect at each path, of those that keep nothing."""
NOT_SERVED = ("/v1/embeddings", "/v1/audio/{rest:path}", "/v1/images/{rest:path}")
"""What OpenAI serves, and models of text cannot."""
METHODS = ["GET", "POST", "DELETE"]


def create_app(
    dispatcher: Dispatcher,
    texts: Mapping[str, Text],
    metrics_render: Callable[[], bytes],
    config: ApiConfig,
    offload: Offload,
    dice: random.Random = UNFORESEEN,
    dialects: Mapping[str, Dialect[Teller]] = DIALECTS,
    keyring: Keyring | None = None,
    jobs: Jobs | None = None,
) -> ASGIApp:
    """The whole HTTP surface.

    Args:
        dispatcher: runs steps.
        texts: tokenizer and template of each model that may be asked for, by its name.
        metrics_render: what ``/metrics`` answers.
        config: limits.
        offload: where long texts are tokenized; the caller closes it.
        dice: for the names of calls that have none, and the seeds of those that ask for none.
        dialects: the dialect at each path.
        keyring: the keys that are valid; None: nobody is asked for one.
        jobs: files and batches that are kept here; None: none are.
    """
    calls = Calls(dispatcher, texts, config, offload, dice)
    pages = Pages(dispatcher, metrics_render)
    traces = TracePages(dispatcher.book)
    logged = keyring is not None if config.access_log is None else config.access_log
    edge = Edge(Gate(keyring), Origins(config.origins), Visits(on=logged, content=config.log_content))
    responses = ResponsesEndpoint(calls, config, dice, edge)
    tokens = TokenPages(calls, dispatcher, responses, config, offload, dice, edge.gate, _told)
    endpoints: dict[str, ASGIApp] = {path: Endpoint(d, calls, config, dice, edge) for path, d in dialects.items()}
    endpoints["/v1/responses"] = responses
    called = [Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()]
    background = None if jobs is None else JobsServed(jobs, endpoints, texts, keyring, config, dice)
    kept = [] if background is None else background.routes()
    rest = Starlette(
        routes=[*called, *_pages(ResponsePages(responses), tokens, pages, traces), *kept],
        lifespan=_living(responses, background),
        middleware=[
            Middleware(RequestIds, dice=dice),
            *edge.origins.middleware(),
            Middleware(Entrance, edge=edge, refusal=_told),
        ],
        exception_handlers=dict.fromkeys((HTTPException, CallFailed, ClusterError, Exception), _refuse),
    )
    pages.described = document(rest.routes, keyed=keyring is not None)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Through the application's layers each event of a stream would pass three functions more.
        posted = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = endpoints.get(scope["path"]) if posted else None
        await (endpoint or rest)(scope, receive, send)

    return app


def _living(
    responses: ResponsesEndpoint, jobs: JobsServed | None
) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """What runs beside calls, as long as the server does."""

    @asynccontextmanager
    async def living(app: object) -> AsyncGenerator[None, None]:
        async with responses.living(app), nullcontext() if jobs is None else jobs.living():
            yield

    return living


def _pages(kept: ResponsePages, tokens: TokenPages, pages: Pages, traces: TracePages) -> list[Route]:
    """All but the calls."""
    return [
        Route("/v1/responses/input_tokens", tokens.response_tokens, methods=["POST"]),
        Route("/v1/responses/{id}", kept.show, methods=["GET"]),
        Route("/v1/responses/{id}", kept.delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/cancel", kept.cancel, methods=["POST"]),
        Route("/v1/responses/{id}/input_items", kept.input_items, methods=["GET"]),
        Route("/v1/messages/count_tokens", tokens.message_tokens, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        *(Route(path, not_served, methods=METHODS) for path in NOT_SERVED),
        Route("/v1/models", pages.models, methods=["GET"]),
        Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
        Route("/v1/traces", traces.list, methods=["GET"]),
        Route("/v1/traces/{id:path}/suspend", traces.suspend, methods=["POST"]),
        Route("/v1/traces/{id:path}/resume", traces.resume, methods=["POST"]),
        Route("/v1/traces/{id:path}/pin", traces.pin, methods=["POST"]),
        Route("/v1/traces/{id:path}", traces.show, methods=["GET"]),
        Route("/v1/traces/{id:path}", traces.delete, methods=["DELETE"]),
        Route("/health", pages.health, methods=["GET"]),
        Route("/version", pages.version, methods=["GET"]),
        Route("/openapi.json", pages.openapi, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
        Route("/cluster", pages.cluster, methods=["GET"]),
    ]


async def not_served(request: Request) -> Response:
    """What is not served here is told with what is."""
    served = "models of text: /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages"
    raise CallFailed("not_found", f"{request.url.path[:256]} is not served here, which has {served}", code="not_served")


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path[:256]}: {error.detail}"
        told = CallFailed("invalid", message, code=codes.get(error.status_code))
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(request)
        return json_response(error_body(told), error.status_code, headers)
    return _told(request.url.path, translate(error))


def _allowed(request: Request) -> str:
    """The methods of a path, which may be those of several routes."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    path = next(route.path for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted({method for route in routes if route.path == path for method in route.methods or ()}))


def _told(path: str, failure: CallFailed) -> Response:
    """In the form of that path's clients."""
    body = messages_error(failure) if path.startswith("/v1/messages/") else error_body(failure)
    return json_response(body, STATUS[failure.cause], headers_of(failure))

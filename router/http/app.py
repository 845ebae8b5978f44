"""The application: routes, and how what fails outside a call is answered."""

import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.cap import Cap, Grants
from jobs.runner import Runner
from jobs.webhooks.outbox import Outbox
from router.calls.calls import UNFORESEEN, Calls
from router.calls.errors import CallFailed
from router.calls.text import Text
from router.dialects.base import Dialect, Teller
from router.dialects.completions import Completions
from router.dialects.messages import Messages
from router.dialects.messages.answers import error_body as messages_error
from router.dialects.openai.errors import error_body
from router.dispatch.steps import Dispatcher
from router.http.access import ANYBODY, Caller, Gate
from router.http.chats import ChatEndpoint, ChatPages, Chats
from router.http.config import ApiConfig
from router.http.endpoint import Endpoint
from router.http.entrance import Edge, Entrance, Origins
from router.http.erasing import Erasing
from router.http.erasures import Erasures
from router.http.errors import STATUS, headers_of
from router.http.jobs import Jobs, JobsServed
from router.http.keys import Keyring
from router.http.openapi import document
from router.http.others import Others, Page, finding
from router.http.outliving import Outliving
from router.http.pages import Pages, json_response
from router.http.repeats import Repeats
from router.http.request_ids import RequestIds
from router.http.response_pages import ResponsePages
from router.http.responses import ResponsesEndpoint
from router.http.roles import RolePages
from router.http.tokens import TokenPages
from router.http.told import note_response
from router.http.traces import TracePages
from router.http.translate import translate
from router.http.turns import Turns
from router.http.visits import Visits
from tracehaul.runtime.offload import Offload
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.errors import ClusterError

DIALECTS: Mapping[str, Dialect[Teller]] = {
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
    chats: Chats | None = None,
    outbox: Outbox | None = None,
    outliving: Outliving | None = None,
    others: Others | None = None,
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
        chats: chat completions that are; None: none are.
        outbox: is told what has ended; None: nobody is.
        outliving: where what runs in the background outlives this router; None: it does not.
        others: routers that keep theirs; None: there are none.
    """
    calls = Calls(dispatcher, texts, config, offload, dice)
    pages, roles = Pages(dispatcher, metrics_render), RolePages(dispatcher)
    logged = keyring is not None if config.access_log is None else config.access_log
    runner = Runner(_grants(dispatcher, config.batch_concurrency), dice)
    gate, visits = Gate(keyring), Visits(on=logged, content=config.log_content)
    repeats = Repeats(config, gate, calls.admission, visits)
    edge = Edge(gate, Origins(config.origins), visits, Turns(runner, config), repeats)
    erasures = _erasures(outliving)
    traces = TracePages(dispatcher.book, repeats.forget, others, erasures)
    responses = ResponsesEndpoint(calls, config, dice, edge, outliving, _callers(keyring))
    if outbox is not None:
        responses.tell(partial(note_response, outbox))
    tokens = TokenPages(calls, dispatcher, responses, config, offload, dice, edge.gate, _told)
    endpoints: dict[str, ASGIApp] = {path: Endpoint(d, calls, config, dice, edge) for path, d in dialects.items()}
    endpoints["/v1/chat/completions"] = ChatEndpoint(calls, config, dice, edge, chats)
    endpoints["/v1/responses"] = responses
    called = [Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()]
    background = (
        None if jobs is None else JobsServed(jobs, endpoints, texts, keyring, config, dice, runner, outbox, others)
    )
    erasing = Erasing(traces, responses, outliving, chats, jobs, others)
    kept = [*([] if background is None else background.routes()), *([] if chats is None else _stored(ChatPages(chats)))]
    kept.append(Route("/v1/data", erasing.erase, methods=["DELETE"]))
    found = finding(others, None if outliving is None else outliving.held)
    rest = Starlette(
        routes=[*called, *_pages(ResponsePages(responses, config), tokens, pages, traces, roles, found), *kept],
        lifespan=_living(responses, repeats, background, chats, outbox, runner, erasing, erasures),
        middleware=_layers(edge, dice),
        exception_handlers=dict.fromkeys((HTTPException, CallFailed, ClusterError, Exception), _refuse),
    )
    pages.described = document(rest.routes, keyed=keyring is not None)
    return _shortest(endpoints, rest)


def _shortest(endpoints: Mapping[str, ASGIApp], rest: ASGIApp) -> ASGIApp:
    """Through the application's layers each event of a stream would pass three functions more."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = endpoints.get(scope["path"]) if posted else None
        await (endpoint or rest)(scope, receive, send)

    return app


def _erasures(outliving: Outliving | None) -> Erasures | None:
    """None: no router shares what is kept here."""
    if outliving is None or not outliving.shared:
        return None
    return Erasures(outliving.documents, outliving.router)


def _layers(edge: Edge, dice: random.Random) -> list[Middleware]:
    """What each request for a page passes."""
    entrance = Middleware(Entrance, edge=edge, refusal=_told)
    return [Middleware(RequestIds, dice=dice), *edge.origins.middleware(), entrance]


def _grants(dispatcher: Dispatcher, lines_max: int) -> Grants:
    """What the fleet has room for."""

    def granted() -> Cap:
        room = dispatcher.slack()
        return Cap(min(room.steps, lines_max), room.until_s)

    return granted


def _callers(keyring: Keyring | None) -> Callable[[str | None], Caller | None]:
    """Whose an API key is, by its id."""

    def caller(name: str | None) -> Caller | None:
        if keyring is None:
            return ANYBODY
        key = None if name is None else keyring.of(name)
        return None if key is None else Caller(key)

    return caller


def _living(
    responses: ResponsesEndpoint,
    repeats: Repeats,
    jobs: JobsServed | None,
    chats: Chats | None,
    outbox: Outbox | None,
    runner: Runner,
    erasing: Erasing,
    erasures: Erasures | None,
) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """What runs beside calls, as long as the server does."""

    @asynccontextmanager
    async def living(app: object) -> AsyncGenerator[None, None]:
        async with Tasks("background") as tasks, repeats.living():
            tasks.start(runner.run(), "queue")
            if chats is not None:
                tasks.start(chats.sweep(), "chats")
            if outbox is not None:
                tasks.start(outbox.run(), "webhooks")
            async with responses.living(app), nullcontext() if jobs is None else jobs.living():
                if erasures is not None:
                    tasks.start(erasing.catch_up(erasures), "erasures")
                    await erasures.caught_up()
                yield
            if outbox is not None:
                await outbox.flushed()

    return living


def _pages(
    kept: ResponsePages,
    tokens: TokenPages,
    pages: Pages,
    traces: TracePages,
    roles: RolePages,
    found: Callable[[Page], Page],
) -> list[Route]:
    """All but the calls; ``found`` makes of a response's page one that asks other routers, too."""
    return [
        Route("/v1/responses/input_tokens", tokens.response_tokens, methods=["POST"]),
        Route("/v1/responses/{id}", found(kept.show), methods=["GET"]),
        Route("/v1/responses/{id}", found(kept.delete), methods=["DELETE"]),
        Route("/v1/responses/{id}/cancel", found(kept.cancel), methods=["POST"]),
        Route("/v1/responses/{id}/input_items", found(kept.input_items), methods=["GET"]),
        Route("/v1/messages/count_tokens", tokens.message_tokens, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        *(Route(path, not_served, methods=METHODS) for path in NOT_SERVED),
        Route("/v1/models", pages.models, methods=["GET"]),
        Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
        Route("/v1/traces", traces.list, methods=["GET"]),
        Route("/v1/traces", traces.delete_all, methods=["DELETE"]),
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
        Route("/cluster/{id}/role", roles.change, methods=["POST"]),
        Route("/cluster/{id}/changes", roles.changes, methods=["GET"]),
    ]


def _stored(chats: ChatPages) -> list[Route]:
    """Those of chat completions that are kept."""
    one = "/v1/chat/completions/{id}"
    return [
        Route("/v1/chat/completions", chats.list, methods=["GET"]),
        Route(one, chats.show, methods=["GET"]),
        Route(one, chats.update, methods=["POST"]),
        Route(one, chats.delete, methods=["DELETE"]),
        Route(f"{one}/messages", chats.messages, methods=["GET"]),
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

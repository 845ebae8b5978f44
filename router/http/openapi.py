"""What is served, as OpenAPI says it: generated from the routes and from the types of bodies and answers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, get_args

import msgspec
from starlette.routing import BaseRoute, Route

from router.dialects.chat.requests import ChatRequest
from router.dialects.chat.responses import ChatChoice
from router.dialects.completions.requests import CompletionRequest
from router.dialects.completions.responses import TextChoice
from router.dialects.messages.answers import Answer, ContentBlock
from router.dialects.messages.answers import ErrorBody as MessagesError
from router.dialects.messages.requests import MessagesRequest
from router.dialects.openai.errors import ErrorBody
from router.dialects.openai.requests import LIMITS, NO_OPS
from router.dialects.openai.response import Response
from router.dialects.responses.answers import OutputItem
from router.dialects.responses.answers import Response as ResponsesAnswer
from router.dialects.responses.requests import ResponsesRequest
from router.dialects.tokens.requests import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from router.dispatch.flips import FlipOutcome
from router.fleet.members import NodeStatus
from router.http.access import PUBLIC
from router.http.batches import BatchBody, BatchObject
from router.http.chats import ChatDeleted, KeptChat, Update
from router.http.erasing import DataDeleted
from router.http.files import LIST_MAX, FileDeleted, FileForm, FileObject
from router.http.pages import LIMIT_MAX, Health, Listed, ModelEntry, ModelList, Version
from router.http.response_pages import ResponseDeleted
from router.http.roles import Changes, RoleBody
from router.http.tokens import MessageTokens, ResponseTokens
from router.http.traces import PinAnswer, PinBody, Resume, Suspend
from router.traces.views import TraceDeleted, TraceList, TracesDeleted, TraceView
from tracehaul import __version__

CALL = (400, 402, 404, 409, 413, 415, 422, 503, 504)
"""Statuses of what reads a body and runs, or counts as running."""
BODY = (400, 413, 415)
ALWAYS = (408, 431, 500)
"""Of any request."""
KEYED = (401, 403)
_COMPONENTS = "#/components/schemas/"
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
"""Before OpenAPI 3.2 a stream's schema is commonly read as that of each event."""
_EITHER: Mapping[Any, tuple[str, tuple[Any, ...]]] = {
    Answer: ("content", get_args(ContentBlock)),
    ResponsesAnswer: ("output", get_args(OutputItem)),
}
"""Answers with a list of several types, told apart by what they hold."""
_EITHER_FIELD: Mapping[Any, tuple[str, ...]] = {
    ResponsesRequest: ("input", "previous_response_id"),
    TokenizeRequest: ("prompt", "messages"),
}
"""Bodies that need one of these fields."""
_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")


class Operation(msgspec.Struct, frozen=True):
    """One method of one path."""

    summary: str
    body: Any = None
    answer: Any = None
    """Type of the JSON that is answered; None: none is, ever."""
    statuses: tuple[int, ...] = ()
    """Beside 200 and those of any request."""
    streams: bool = False
    limited: bool = False
    """By its key."""
    query: tuple[str, ...] = ()
    limit_max: int = LIMIT_MAX
    error: Any = ErrorBody
    media: str = "application/json"
    """Of the answer."""
    takes: str = "application/json"
    """Of the body."""


def _call(summary: str, body: Any, answer: Any, error: Any = ErrorBody) -> Operation:
    return Operation(summary, body, answer, CALL, streams=True, limited=True, error=error)


_PAGES = ("limit", "after", "cache_salt")
_OWN = ("cache_salt",)

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): _call("A chat completion", ChatRequest, Response[ChatChoice]),
    ("GET", "/v1/chat/completions"): Operation(
        "Those that are kept, the oldest first",
        None,
        Listed[msgspec.Raw],
        (400, 503),
        query=(*_PAGES, "order", "model"),
    ),
    ("GET", "/v1/chat/completions/{id}"): Operation("One of those", None, KeptChat, (400, 404, 503), query=_OWN),
    ("POST", "/v1/chat/completions/{id}"): Operation("Its metadata", Update, KeptChat, (*BODY, 404, 503), query=_OWN),
    ("DELETE", "/v1/chat/completions/{id}"): Operation("Forget it", None, ChatDeleted, (400, 404, 503), query=_OWN),
    ("GET", "/v1/chat/completions/{id}/messages"): Operation(
        "What it answers", None, Listed[msgspec.Raw], (400, 404, 503), query=(*_PAGES, "order")
    ),
    ("POST", "/v1/completions"): _call("A completion of texts", CompletionRequest, Response[TextChoice]),
    ("POST", "/v1/responses"): _call("A response", ResponsesRequest, ResponsesAnswer),
    ("POST", "/v1/messages"): _call("A message, in Anthropic's form", MessagesRequest, Answer, MessagesError),
    ("GET", "/v1/responses/{id}"): Operation(
        "A kept response", None, ResponsesAnswer, (400, 404), streams=True, query=(*_OWN, "stream", "starting_after")
    ),
    ("DELETE", "/v1/responses/{id}"): Operation("Forget it", None, ResponseDeleted, (400, 404), query=_OWN),
    ("POST", "/v1/responses/{id}/cancel"): Operation("End it", None, ResponsesAnswer, (400, 404), query=_OWN),
    ("GET", "/v1/responses/{id}/input_items"): Operation(
        "What it answers", None, Listed[msgspec.Raw], (400, 404), query=(*_PAGES, "order")
    ),
    ("POST", "/v1/responses/input_tokens"): Operation(
        "Count its prompt", ResponsesRequest, ResponseTokens, CALL, limited=True
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Count its prompt", MessagesRequest, MessageTokens, CALL, limited=True, error=MessagesError
    ),
    ("POST", "/tokenize"): Operation("A prompt in tokens", TokenizeRequest, Tokenized, CALL, limited=True),
    ("POST", "/detokenize"): Operation("Tokens as text", DetokenizeRequest, Detokenized, CALL, limited=True),
    ("GET", "/v1/models"): Operation("What can be asked for now", None, ModelList),
    ("GET", "/v1/models/{name}"): Operation("One of those", None, ModelEntry, (404,)),
    ("GET", "/v1/traces"): Operation("Traces, the last used first", None, TraceList, (400,), query=_PAGES),
    ("DELETE", "/v1/traces"): Operation("Forget all of one's own", None, TracesDeleted, (400, 503), query=_OWN),
    ("DELETE", "/v1/data"): Operation(
        "Forget all that is kept of one's own", None, DataDeleted, (400, 503), query=_OWN
    ),
    ("GET", "/v1/traces/{id}"): Operation("A trace", None, TraceView, (400, 404), query=_OWN),
    ("DELETE", "/v1/traces/{id}"): Operation("Forget it", None, TraceDeleted, (400, 404), query=_OWN),
    ("POST", "/v1/traces/{id}/suspend"): Operation("It pauses", Suspend, TraceView, (*BODY, 404, 409), query=_OWN),
    ("POST", "/v1/traces/{id}/resume"): Operation("It goes on", Resume, TraceView, (*BODY, 404, 409), query=_OWN),
    ("POST", "/v1/traces/{id}/pin"): Operation("Keep its context", PinBody, PinAnswer, (*BODY, 404, 503), query=_OWN),
    ("POST", "/v1/files"): Operation(
        "Keep a file", FileForm, FileObject, (400, 413, 415, 503), query=_OWN, takes="multipart/form-data"
    ),
    ("GET", "/v1/files"): Operation(
        "Files, the newest first",
        None,
        Listed[FileObject],
        (400,),
        query=(*_PAGES, "order", "purpose"),
        limit_max=LIST_MAX,
    ),
    ("GET", "/v1/files/{id}"): Operation("A file", None, FileObject, (400, 404), query=_OWN),
    ("DELETE", "/v1/files/{id}"): Operation("Delete it", None, FileDeleted, (400, 404, 503), query=_OWN),
    ("GET", "/v1/files/{id}/content"): Operation(
        "Its bytes", None, bytes, (400, 404, 503), query=_OWN, media="application/octet-stream"
    ),
    ("POST", "/v1/batches"): Operation(
        "Run a file of calls", BatchBody, BatchObject, (400, 404, 413, 415, 429, 503), query=_OWN
    ),
    ("GET", "/v1/batches"): Operation("Batches, the newest first", None, Listed[BatchObject], (400,), query=_PAGES),
    ("GET", "/v1/batches/{id}"): Operation("A batch", None, BatchObject, (400, 404), query=_OWN),
    ("POST", "/v1/batches/{id}/cancel"): Operation("End it", None, BatchObject, (400, 404, 503), query=_OWN),
    ("GET", "/health"): Operation("Whether a worker is ready", None, Health, (503,), error=Health),
    ("GET", "/version"): Operation("Of this build", None, Version),
    ("GET", "/openapi.json"): Operation("This", None, dict[str, Any]),
    ("GET", "/metrics"): Operation("For Prometheus", None, str, media="text/plain"),
    ("GET", "/cluster"): Operation("Every known node", None, list[NodeStatus]),
    ("POST", "/cluster/{id}/role"): Operation("Change a worker's role", RoleBody, FlipOutcome, (*BODY, 404, 409)),
    ("GET", "/cluster/{id}/changes"): Operation(
        "What was changed at it of the router's own accord", None, Changes, (404,)
    ),
}


def document(routes: Iterable[BaseRoute], *, keyed: bool) -> bytes:
    """OpenAPI 3.1 of these routes, as JSON. ``keyed``: whoever asks needs a key."""
    found: list[tuple[str, str, Operation]] = []
    for route in routes:
        if isinstance(route, Route):
            path = _PARAMETER.sub(r"{\1}", route.path)
            methods = sorted((route.methods or set()) - {"HEAD"})
            found += [(method, path, OPERATIONS.get((method, path)) or _other(route)) for method in methods]
    named, components = _schemas([kind for _, _, each in found for kind in (each.body, each.answer, each.error)])
    paths: dict[str, dict[str, Any]] = {}
    for method, path, each in found:
        paths.setdefault(path, {})[method.lower()] = _described(method, path, each, named, keyed)
    parts: dict[str, Any] = {"schemas": components}
    if keyed:
        bearer = {"type": "http", "scheme": "bearer"}
        header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
        parts["securitySchemes"] = {"bearer": bearer, "header": header}
    info = {"title": "tracehaul", "version": __version__}
    return msgspec.json.encode({"openapi": "3.1.0", "info": info, "paths": paths, "components": parts})


def _schemas(kinds: Iterable[Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """A schema for each of these types, and the components that they refer to."""
    unique = [kind for kind in dict.fromkeys(kinds) if kind is not None]
    parts = [part for kind in unique for part in _EITHER.get(kind, (None, ()))[1]]
    stated = [_open(kind) if kind in _EITHER else kind for kind in unique]
    schemas, components = msgspec.json.schema_components([*stated, *parts], ref_template=f"{_COMPONENTS}{{name}}")
    named = dict(zip([*unique, *parts], schemas, strict=True))
    for kind, (field, either) in _EITHER.items():
        if kind in named:
            component = components[named[kind]["$ref"].removeprefix(_COMPONENTS)]
            component["properties"][field]["items"] = {"anyOf": [named[part] for part in either]}
    for kind in (ChatRequest, CompletionRequest, ResponsesRequest):
        _limit(components[kind.__name__]["properties"])
    for kind, names in _EITHER_FIELD.items():
        components[kind.__name__]["anyOf"] = [{"required": [name]} for name in names]
    return named, components


def _limit(properties: dict[str, Any]) -> None:
    """Say what is checked only after a body is read."""
    for name, (low, high) in LIMITS.items():
        for option in properties.get(name, {}).get("anyOf", ()):
            if option.get("type") in ("integer", "number"):
                option |= {"minimum": low, "maximum": high}
    for name in NO_OPS.keys() & properties.keys():
        properties[name] = {"enum": [None, *NO_OPS[name]], "default": None}


def _open(kind: Any) -> type[msgspec.Struct]:
    """The same with anything in the field that holds one of several types: msgspec describes only what it can read, and
    what is answered it need not read."""
    field = _EITHER[kind][0]
    fields: list[Any] = []
    for each in msgspec.structs.fields(kind):
        kept = {"default": each.default, "default_factory": each.default_factory}
        told: Any = msgspec.field(**{name: value for name, value in kept.items() if value is not msgspec.NODEFAULT})
        fields.append((each.name, Sequence[Any] if each.name == field else each.type, told))
    made = msgspec.defstruct(kind.__name__, fields, kw_only=True, module=kind.__module__)
    made.__doc__ = kind.__doc__
    return made


def _other(route: Route) -> Operation:
    """Of a path that this module does not know: what its handler says of itself."""
    return Operation(str(getattr(route.endpoint, "__doc__", "") or route.path).strip(), statuses=(404,))


def _described(method: str, path: str, each: Operation, named: Mapping[Any, Any], keyed: bool) -> dict[str, Any]:
    guarded = keyed and path not in PUBLIC
    statuses = {*each.statuses, *ALWAYS, *(KEYED if guarded else ()), *((429,) if guarded and each.limited else ())}
    told: dict[str, Any] = {
        "summary": each.summary,
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", path)]),
        "responses": {
            **({} if each.answer is None else {"200": _answered(200, _contents(each, named))}),
            **{str(status): _answered(status, _json(_error(status, each, named))) for status in sorted(statuses)},
        },
    }
    if each.body is not None:
        # What may be said may be left out.
        required = each.body not in (Resume, PinBody)
        told["requestBody"] = {"required": required, "content": {each.takes: {"schema": named[each.body]}}}
    parameters = [_parameter(name, "path") for name in _PARAMETER.findall(path)]
    if parameters := [*parameters, *(_parameter(name, "query", each.limit_max) for name in each.query)]:
        told["parameters"] = parameters
    if guarded:
        told["security"] = [{"bearer": []}, {"header": []}]
    return told


def _error(status: int, each: Operation, named: Mapping[Any, Any]) -> Any:
    """What the server itself refuses has one form, whatever the path."""
    own = status not in (408, 431) and (each.error is not Health or status == 503)
    return named[each.error] if own else named[ErrorBody]


def _contents(each: Operation, named: Mapping[Any, Any]) -> dict[str, Any]:
    content = {each.media: {"schema": named[each.answer]}}
    if each.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    return content


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answered(status: int, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": HTTPStatus(status).phrase, "content": content}


def _parameter(name: str, where: str, limit_max: int = LIMIT_MAX) -> dict[str, Any]:
    kind: dict[str, Any] = {"type": "string"}
    if name == "limit":
        kind = {"type": "integer", "minimum": 1, "maximum": limit_max}
    if name == "order":
        kind = {"type": "string", "enum": ["asc", "desc"]}
    return {"name": name, "in": where, "required": where == "path", "schema": kind}

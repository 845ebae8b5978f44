"""The pages that only look: models, health, metrics, nodes; and what lists have in common."""

import re
from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.calls.errors import invalid, model_not_found
from router.calls.identity import ID_CHARACTERS_MAX
from router.dispatch.steps import Dispatcher
from router.http.access import caller_of
from router.http.errors import RETRY_AFTER_S
from tracehaul import __version__
from tracehaul.runtime.clock import wall_s

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LIMIT_MAX = 100
LIMIT = 20

T = TypeVar("T")

_NUMBER = re.compile(r"[0-9]{1,6}")


class ModelEntry(msgspec.Struct, frozen=True):
    """One model of ``/v1/models``."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "tracehaul"


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"


class Health(msgspec.Struct, frozen=True):
    """``GET /health``."""

    status: str
    reason: str | None = None


class Version(msgspec.Struct, frozen=True):
    """``GET /version``."""

    version: str


class Listed(msgspec.Struct, Generic[T], frozen=True):
    """Some of a list."""

    data: Sequence[T]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class Pages:
    """The endpoints that only look."""

    def __init__(self, dispatcher: Dispatcher, metrics_render: Callable[[], bytes]) -> None:
        self._dispatcher = dispatcher
        self._metrics_render = metrics_render
        self._created = int(wall_s())
        self.described = b"{}"
        """All paths in OpenAPI's form, once they are known."""

    async def models(self, request: Request) -> Response:
        """What can be asked for now."""
        return json_response(ModelList(self._entries(request)))

    async def model(self, request: Request) -> Response:
        """One of those; ids may hold slashes."""
        name = request.path_params["name"]
        for entry in self._entries(request):
            if entry.id == name:
                return json_response(entry)
        raise model_not_found(name)

    async def health(self, request: Request) -> Response:
        """200 while some decode worker is ready."""
        if self._dispatcher.models():
            return json_response(Health("ready"))
        workers = [node for node in self._dispatcher.nodes() if node.info.role == "decode"]
        reason = "no decode worker has joined"
        if workers:
            reason = "no decode worker is ready: " + ", ".join(f"{w.info.node} is {w.health}" for w in workers[:8])
        return json_response(Health("unavailable", reason), 503, {"retry-after": str(RETRY_AFTER_S)})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        caller_of(request.scope).steer("/metrics")
        return Response(self._metrics_render(), media_type=METRICS_TYPE)

    async def cluster(self, request: Request) -> Response:
        """Every known node."""
        caller_of(request.scope).steer("/cluster")
        return json_response([_whole(node) for node in self._dispatcher.nodes()])

    async def version(self, request: Request) -> Response:
        """Of this build."""
        return json_response(Version(__version__))

    async def openapi(self, request: Request) -> Response:
        """All paths, as OpenAPI says it."""
        return Response(self.described, media_type="application/json")

    def _entries(self, request: Request) -> list[ModelEntry]:
        caller = caller_of(request.scope)
        cards = self._dispatcher.models()
        return [ModelEntry(card.name, self._created, card.context_max) for card in cards if caller.serves(card.name)]


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _whole(value: object) -> object:
    """A struct with all its fields, also those that are left out on the wire."""
    if isinstance(value, msgspec.Struct):
        return {name: _whole(getattr(value, name)) for name in value.__struct_fields__}
    return value


def listed(page: Sequence[T], name: Callable[[T], str], *, more: bool) -> Response:
    """These of a list, by what they are called; ``more``: others follow."""
    ends = (name(page[0]), name(page[-1])) if page else (None, None)
    return json_response(Listed(page, *ends, has_more=more))


def page_limit(request: Request, default: int = LIMIT, most: int = LIMIT_MAX) -> int:
    """How many of a list are asked for. Raises CallFailed if that is no number, or too many."""
    text = request.query_params.get("limit", str(default))
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= most:
        raise invalid(f"limit must be from 1 to {most}", "limit", "invalid_value")
    return int(text)


def page_after(request: Request, found: Sequence[T], what: str, name: Callable[[T], str]) -> Sequence[T]:
    """What follows the one that ``after`` names, all if it names none. Raises CallFailed if there is no such."""
    if (after := request.query_params.get("after")) is None:
        return found
    for at, each in enumerate(found, start=1):
        if name(each) == after:
            return found[at:]
    raise invalid(f"no {what} {after[:ID_CHARACTERS_MAX]!r} is known to go on after", "after")

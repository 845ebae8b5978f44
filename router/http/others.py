"""What the other routers of a cluster keep: found, listed, ended and deleted at any of them.

Each answers, over the control plane, what a client asked here, by its own pages and of what it has itself; with the
client's own key, so that nobody may more than at that router.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Scope

from records.base import RecordsLost
from router.calls.errors import CallFailed, invalid, unavailable
from router.calls.identity import ID_CHARACTERS_MAX
from router.http.erasures import PARAMETER
from router.http.pages import Listed, json_response, listed
from tracehaul.rpc.peers import Peers
from tracehaul.wire.base import Ping
from tracehaul.wire.cluster import AskRouter, RouterAnswered
from tracehaul.wire.errors import ClusterError

ASKED = "tracehaul.asked"
"""In the scope of what another router asks."""
ASK_S = 3.0
ERASE_S = 40.0
"""What runs may take to end, and a batch to begin."""
AGAIN_S = 5.0
"""Who does not answer is no longer believed to live twice that later."""
PIECE_BYTES = 4 << 20
"""Of an answer, at once."""
SENT = (b"authorization", b"x-api-key", b"content-type", b"content-encoding")
"""Headers that another router is told."""
TOLD = (b"content-type", b"content-length", b"content-disposition", b"retry-after")
"""Headers that a client is told."""

Page = Callable[[Request], Awaitable[Response]]
Held = Callable[[Collection[str]], Awaitable[str | None]]


class Kept(Protocol):
    """Something in a list."""

    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> int: ...


class _Item(msgspec.Struct):
    id: str
    created_at: int


class _List(msgspec.Struct):
    data: list[msgspec.Raw]
    has_more: bool


class Answer(NamedTuple):
    """One router's, or the beginning of it."""

    router: str
    asked: AskRouter
    said: RouterAnswered


K = TypeVar("K", bound=Kept)


class _Skip:
    """What of an answer another router has already."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def sought(request: Request) -> int:
    """From where on an answer's body is wanted: whoever asks this begins there."""
    skip: _Skip | None = request.scope.get(ASKED)
    if skip is None:
        return 0
    nbytes, skip.nbytes = skip.nbytes, 0
    return nbytes


def asked_by_router(request: Request) -> bool:
    """It wants to know what is here alone."""
    return ASKED in request.scope


class Others:
    """The other routers. ``living``: those that live, and where their control planes are; None:
    that is not known yet."""

    def __init__(self, living: Callable[[], Mapping[str, str] | None], peers: Peers) -> None:
        self._known = living
        self._peers = peers

    def _living(self) -> Mapping[str, str]:
        if (living := self._known()) is None:
            raise unavailable("this router does not know yet which others there are", "router_unavailable")
        return living

    @property
    def names(self) -> Collection[str]:
        """Of those that live. Raises CallFailed: nobody knows yet."""
        return self._living().keys()

    def finding(self, page: Page, held: Held | None = None) -> Page:
        """That page; where it has not what is asked for, as the router has it that does. ``held``: which router of none
        of these names may have it all the same."""

        @wraps(page)
        async def found(request: Request) -> Response:
            body: list[bytes] = []

            async def receive() -> Message:
                message = await request.receive()
                body.append(message.get("body", b""))
                return message

            try:
                return await page(Request(request.scope, receive))
            except CallFailed as failure:
                streams = request.query_params.get("stream", "false").lower() not in ("false", "0")
                if failure.cause != "not_found" or asked_by_router(request) or streams:
                    raise
                if (answer := await self._found(asking(request, body=b"".join(body)))) is not None:
                    return self._relayed(answer)
                if held is not None and (router := await _holder(held, self.names)) is not None:
                    raise _unasked(router, "it is not heard of") from failure
                raise

        return found

    async def told(self, request: Request, erasure: str | None) -> list[bytes]:
        """Each of them does the same, which has that name, and answers so; those that know nothing of it are left out.

        Raises:
            CallFailed: one of them has not done it, or cannot be asked.
        """
        if asked_by_router(request):
            return []
        query = dict(request.query_params) | ({} if erasure is None else {PARAMETER: erasure})
        answers = await self._ask(asking(request, query), ERASE_S)
        for router, _, said in answers:
            if said.status not in (200, 404):
                raise unavailable(f"the router {router} has not done it: ask again", "not_erased")
        return [each.said.body for each in answers if each.said.status == 200]

    async def listed(
        self, request: Request, found: Sequence[K], told: Callable[[K], Any], limit: int, *, newest_first: bool
    ) -> Response:
        """So many of what is found here and at the others, in order, behind the one that ``after`` names."""
        found = sorted(found, key=_place, reverse=newest_first)
        if (mark := await self._mark(request, found)) is not None:
            found = [each for each in found if (_place(each) < mark if newest_first else _place(each) > mark)]
        more = len(found) > limit
        if asked_by_router(request):
            return listed([told(each) for each in found[:limit]], lambda each: each.id, more=more)
        query = {**request.query_params, "after": "" if mark is None else f"{mark[0]} {mark[1]}"}
        items: list[tuple[tuple[int, str], Any]] = [(_place(each), told(each)) for each in found[:limit]]
        for answer in await self._ask(asking(request, query)):
            if answer.said.status != 200:
                raise unavailable(f"the router {answer.router} does not say what it has: ask again")
            theirs = msgspec.json.decode(answer.said.body, type=_List)
            more = more or theirs.has_more
            items += [(_place(msgspec.json.decode(each, type=_Item)), each) for each in theirs.data]
        once = dict(reversed(items))  # who stood still may tell of what another has by now
        items = sorted(once.items(), key=lambda item: item[0], reverse=newest_first)
        page = items[:limit]
        ends = (page[0][0][1], page[-1][0][1]) if page else (None, None)
        return json_response(Listed([each for _, each in page], *ends, has_more=more or len(items) > limit))

    async def _mark(self, request: Request, found: Sequence[Kept]) -> tuple[int, str] | None:
        after = request.query_params.get("after")
        if after is None or (asked_by_router(request) and not after):
            return None
        if asked_by_router(request):
            created, _, name = after.partition(" ")
            return int(created), name
        if (here := next((each for each in found if each.id == after), None)) is not None:
            return _place(here)
        answer = await self._found(asking(request, path=f"{request.url.path}/{after}"))
        if answer is not None and answer.said.status == 200:
            with suppress(msgspec.DecodeError):  # it names no single thing
                return _place(msgspec.json.decode(answer.said.body, type=_Item))
        raise invalid(f"nothing {after[:ID_CHARACTERS_MAX]!r} is known to go on after", "after")

    async def _ask(self, asked: AskRouter, timeout_s: float = ASK_S) -> list[Answer]:
        """All of them. Raises CallFailed: one cannot be asked, so that nobody knows."""
        living = sorted(self._living().items())
        replies = await asyncio.gather(*(self._one(*each, asked, timeout_s) for each in living))
        return [Answer(router, asked, reply) for (router, _), reply in zip(living, replies, strict=True)]

    async def _found(self, asked: AskRouter) -> Answer | None:
        """That of who has it; None: nobody. Raises CallFailed: none that can be asked has it, and one cannot be."""

        patience_s = ASK_S if asked.method == "GET" else ERASE_S

        async def one(router: str, address: str) -> Answer | CallFailed:
            try:
                return Answer(router, asked, await self._one(router, address, asked, patience_s))
            except CallFailed as failure:
                return failure

        replies = await asyncio.gather(*(one(*each) for each in sorted(self._living().items())))
        answers = [each for each in replies if isinstance(each, Answer) and each.said.status != 404]
        answers.sort(key=lambda each: each.said.status >= 300)
        failures = [each for each in replies if isinstance(each, CallFailed)]
        if failures and not answers:
            raise failures[0]
        return answers[0] if answers else None

    async def _one(self, router: str, address: str, asked: AskRouter, timeout_s: float) -> RouterAnswered:
        try:
            if timeout_s > ASK_S:  # it lives, and will do it
                await self._peers.call(address, Ping(), timeout_s=ASK_S)
            reply = await self._peers.call(address, asked, timeout_s=timeout_s)
        except ClusterError as error:
            raise _unasked(router, str(error)) from error
        assert isinstance(reply, RouterAnswered)
        return reply

    def _relayed(self, answer: Answer) -> Response:
        said = answer.said
        headers = {name.decode(): value.decode("latin-1") for name, value in said.headers}
        if not said.more:
            return Response(said.body, said.status, headers)
        return StreamingResponse(self._rest(answer), said.status, headers)

    async def _rest(self, answer: Answer) -> AsyncGenerator[bytes]:
        said, at = answer.said, 0
        while True:
            yield said.body
            at += len(said.body)
            if not said.more:
                return
            asked = msgspec.structs.replace(answer.asked, at=at)
            said = await self._one(answer.router, self._living().get(answer.router, ""), asked, ASK_S)


def finding(others: Others | None, held: Held | None = None) -> Callable[[Page], Page]:
    """What makes of a page :meth:`Others.finding`; with no others it stays as it is."""
    return (lambda page: page) if others is None else lambda page: others.finding(page, held)


async def _holder(held: Held, living: Collection[str]) -> str | None:
    try:
        return await held(living)
    except (OSError, RecordsLost, TimeoutError) as error:
        why = f"nobody knows now which routers may have it: {error}"
        raise unavailable(why, "router_unavailable") from error


def asking(request: Request, query: Mapping[str, str] | None = None, body: bytes = b"", path: str = "") -> AskRouter:
    """What another router is asked for a request."""
    scope = request.scope
    headers = tuple((name, value) for name, value in scope["headers"] if name in SENT)
    words = scope["query_string"] if query is None else urlencode(query).encode()
    return AskRouter(scope["method"], path or scope["path"], words, headers, body)


async def answered(app: ASGIApp, asked: AskRouter) -> RouterAnswered:
    """What the application answers another router, from ``asked.at`` on, :data:`PIECE_BYTES` at most."""
    skip = _Skip(asked.at)
    scope: Scope = {
        "type": "http",
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "root_path": "",
        "query_string": asked.query,
        "headers": list(asked.headers),
        "client": None,
        "server": ("router", None),
        ASKED: skip,
    }
    enough, bodies = asyncio.Event(), [asked.body]
    begun: list[Message] = []
    taken = bytearray()

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            begun.append(message)
        data = message.get("body", b"")
        taken.extend(data[skip.nbytes :])
        skip.nbytes -= min(skip.nbytes, len(data))
        if len(taken) > PIECE_BYTES:
            enough.set()
            await asyncio.Event().wait()  # nobody takes more

    work = asyncio.ensure_future(app(scope, receive, send))
    waiting = asyncio.ensure_future(enough.wait())
    try:
        await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (work, waiting):
            task.cancel()
        await asyncio.wait((work, waiting))
    if not work.cancelled() and work.exception() is not None and not begun:
        raise ClusterError("the router did not answer")
    headers = tuple((name, value) for name, value in begun[0]["headers"] if name in TOLD)
    return RouterAnswered(begun[0]["status"], headers, bytes(taken[:PIECE_BYTES]), len(taken) > PIECE_BYTES)


def _unasked(router: str, why: str) -> CallFailed:
    message = f"the router {router} cannot be asked now, and may have it: {why}"
    return CallFailed("unavailable", message, code="router_unavailable", retry_after_s=AGAIN_S)


def _place(each: Kept) -> tuple[int, str]:
    return each.created_at, each.id

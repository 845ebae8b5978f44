"""Chat completions that are kept: kept as they are answered, and their pages."""

import asyncio
import random
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from records.base import RecordsLost
from records.documents import Document, Documents, Mark, Shelf
from router.calls.call import Call
from router.calls.calls import Calls
from router.calls.errors import CallFailed, invalid, unavailable
from router.calls.identity import ID_CHARACTERS_MAX
from router.calls.run import Run
from router.dialects.body import parse
from router.dialects.chat import Chat
from router.dialects.chat.responses import ChatChoice
from router.dialects.chat.stored import checked, completion, messages, stored
from router.dialects.chat.teller import ChatTeller
from router.dialects.openai.response import Response as Completion
from router.http.asgi import body_of
from router.http.config import ApiConfig
from router.http.endpoint import Endpoint
from router.http.entrance import Edge
from router.http.pages import json_response, listed, page_after, page_limit
from router.http.telling import Replying
from router.http.traces import salt
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log

log = Log(__name__)

KIND = "chat"
KEEP_S = 5.0
"""An answer whose end waits longer to be kept is told without."""
AGAIN_S = 10.0
"""After one that could not be kept no other waits for so long."""
SWEEP_S = 60.0
SWEEP_SHARE = 1 / 32
"""Of what may be kept: after so much more it is looked what is too much."""
ERASED = 100
"""At once."""
BODY_BYTES_MAX = 64 * 2**10
BODY_TIMEOUT_S = 10.0


class ChatStats(msgspec.Struct):
    """Of chat completions that were to be kept."""

    kept: int = 0
    not_kept: int = 0
    forgotten: int = 0


class KeptChat(Completion[ChatChoice], frozen=True):
    """A chat completion as it is told again: with what of its request it is told with, too."""

    request_id: str | None = None
    input_user: str | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)


class ChatDeleted(msgspec.Struct, frozen=True):
    """``DELETE /v1/chat/completions/{id}``."""

    id: str
    deleted: Literal[True] = True
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"


class Update(msgspec.Struct, frozen=True):
    """``POST /v1/chat/completions/{id}``."""

    metadata: dict[str, Any] | None


class Named(msgspec.Struct, frozen=True):
    """What finds a completion or a message in a list."""

    id: str


class Chats:
    """What is kept of them, by tenants. ``stats``: what is counted."""

    def __init__(self, documents: Documents, config: ApiConfig, stats: ChatStats) -> None:
        self.documents = documents
        self._config = config
        self._stats = stats
        self._again_s = 0.0
        self._new = self._new_bytes = 0
        """Since it was looked what is too much."""
        self._full = asyncio.Event()

    async def keep(self, tenant: str, name: str, tags: Mapping[str, str], body: bytes) -> bool:
        """False: it is not, or nobody knows."""
        now_s = clock.now_s()
        if now_s < self._again_s:
            self._stats.not_kept += 1
            return False
        document = Document(name, int(clock.wall_s() * 1e6), tags, body)
        try:
            async with asyncio.timeout(KEEP_S):
                await self.documents.put(Shelf(KIND, tenant), document)
        except (RecordsLost, TimeoutError) as error:
            self._again_s = now_s + AGAIN_S
            self._stats.not_kept += 1
            log.warning("a chat completion is not kept", name=name, why=str(error) or "it takes too long")
            return False
        self._stats.kept += 1
        self._new, self._new_bytes = self._new + 1, self._new_bytes + len(body)
        config = self._config
        if self._new > SWEEP_SHARE * config.chats_max or self._new_bytes > SWEEP_SHARE * config.chats_bytes_max:
            self._full.set()
        return True

    async def erase(self, tenant: str) -> int:
        """None of theirs is kept any more; how many there were. Raises RecordsLost."""
        shelf, count = Shelf(KIND, tenant), 0
        while page := await self.documents.list(shelf, {}, None, ERASED):
            count += await self.documents.delete(shelf, [each.name for each in page])
        return count

    async def sweep(self) -> None:
        """Forget what is too old or too much, from time to time: runs beside what is kept."""
        config = self._config
        while True:
            try:
                async with asyncio.timeout(SWEEP_S):
                    await self._full.wait()
            except TimeoutError:
                if not self._new:
                    continue
            self._full.clear()
            self._new = self._new_bytes = 0
            before_us = int((clock.wall_s() - config.chats_age_s) * 1e6)
            try:
                gone = await self.documents.trim(KIND, before_us, config.chats_max, config.chats_bytes_max)
            except RecordsLost as error:
                self._new = 1
                log.warning("old chat completions are not forgotten yet", why=error)
            else:
                self._stats.forgotten += gone


class ChatEndpoint(Endpoint[ChatTeller]):
    """Answers ``POST /v1/chat/completions``; ``chats``: where those are kept that are to be."""

    def __init__(self, calls: Calls, config: ApiConfig, dice: random.Random, edge: Edge, chats: Chats | None) -> None:
        super().__init__(Chat(), calls, config, dice, edge)
        self._chats = chats

    async def _serve(
        self, call: Call, teller: ChatTeller, headers: Mapping[str, str], fresh: str, reply: Replying, visit: Any
    ) -> None:
        if teller.asked is not None and self._chats is not None:
            teller.store = UNSET  # whether it is kept is known at its end, which a stream has not told before
        await super()._serve(call, teller, headers, fresh, reply, visit)

    async def _before_end(self, call: Call, run: Run, teller: ChatTeller, reply: Replying) -> None:
        if (asked := teller.asked) is None or self._chats is None:
            return
        request = next((value.decode() for name, value in reply.headers if name == b"x-request-id"), None)
        body = stored(asked, teller.whole(run.choices(), run.usage()), request)
        tags = {"model": call.model, **_tags(asked.metadata)}
        teller.store = await self._chats.keep(call.tenant, call.id, tags, body) or None


class ChatPages:
    """What can be asked of those that are kept. A tenant (its key's, else ``cache_salt``) sees its own only."""

    def __init__(self, chats: Chats) -> None:
        self._documents = chats.documents

    async def list(self, request: Request) -> Response:
        """``GET /v1/chat/completions?model=&metadata[KEY]=&limit=&order=&after=``: the oldest first."""
        asked, shelf = request.query_params, _shelf(request)
        wanted = {key[9:-1]: value for key, value in asked.items() if key.startswith("metadata[") and key[-1] == "]"}
        tags = _tags(wanted)
        if (model := asked.get("model")) is not None:
            tags["model"] = model
        limit, newest_first = page_limit(request), _newest_first(request)
        try:
            after = await self._mark(shelf, asked.get("after"))
            found = await self._documents.list(shelf, tags, after, limit, newest_first=newest_first)
            more = bool(found) and await self._documents.list(shelf, tags, found[-1].mark, 1, newest_first=newest_first)
        except RecordsLost as error:
            _lost(error)
        return listed([_told(each) for each in found], _id, more=bool(more))

    async def show(self, request: Request) -> Response:
        """``GET /v1/chat/completions/{id}``."""
        return json_response(_told(await self._document(request)))

    async def messages(self, request: Request) -> Response:
        """``GET /v1/chat/completions/{id}/messages?limit=&order=&after=``: what it answers, the first said first."""
        all_ = list(messages((await self._document(request)).body))
        if _newest_first(request):
            all_.reverse()
        limit = page_limit(request)
        rest = page_after(request, all_, "message", _id)
        return listed(rest[:limit], _id, more=len(rest) > limit)

    async def update(self, request: Request) -> Response:
        """``POST /v1/chat/completions/{id}``: its metadata is this from now on."""
        body = await body_of(request, bytes_max=BODY_BYTES_MAX, timeout_s=BODY_TIMEOUT_S)
        metadata = checked(parse(body, Update).metadata)
        document = await self._document(request)
        tags = {"model": document.tags["model"], **_tags(metadata)}
        try:
            if not await self._documents.tag(_shelf(request), document.name, tags):
                _not_found(document.name)
        except RecordsLost as error:
            _lost(error)
        return json_response(_told(document._replace(tags=tags)))

    async def delete(self, request: Request) -> Response:
        """``DELETE /v1/chat/completions/{id}``."""
        name = str(request.path_params["id"])
        try:
            if not await self._documents.delete(_shelf(request), [name]):
                _not_found(name)
        except RecordsLost as error:
            _lost(error)
        return json_response(ChatDeleted(name))

    async def _document(self, request: Request) -> Document:
        name = str(request.path_params["id"])
        try:
            found = await self._documents.get(_shelf(request), name)
        except RecordsLost as error:
            _lost(error)
        if found is None:
            _not_found(name)
        return found

    async def _mark(self, shelf: Shelf, after: str | None) -> Mark | None:
        if after is None:
            return None
        if (found := await self._documents.get(shelf, after)) is None:
            shown = after[:ID_CHARACTERS_MAX]
            raise invalid(f"no chat completion {shown!r} is known to go on after", "after")
        return found.mark


def _shelf(request: Request) -> Shelf:
    return Shelf(KIND, salt(request))


def _tags(metadata: Mapping[str, str]) -> dict[str, str]:
    return {f"metadata.{key}": value for key, value in metadata.items()}


def _told(document: Document) -> msgspec.Raw:
    metadata = {
        key.removeprefix("metadata."): value for key, value in document.tags.items() if key.startswith("metadata.")
    }
    return completion(document.body, metadata)


def _newest_first(request: Request) -> bool:
    if (order := request.query_params.get("order", "asc")) not in ("asc", "desc"):
        raise invalid("order must be asc or desc", "order", "invalid_value")
    return order == "desc"


def _not_found(name: str) -> NoReturn:
    message = f"No chat completion found with id '{name[:ID_CHARACTERS_MAX]}'."
    raise CallFailed("not_found", message, param="completion_id")


def _lost(error: RecordsLost) -> NoReturn:
    raise unavailable(f"what is kept cannot be asked now: {error}", "records_unavailable") from error


def _id(message: msgspec.Raw) -> str:
    return msgspec.json.decode(message, type=Named).id

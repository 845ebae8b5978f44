"""``/v1/responses``: responses that go on from others, run in the background, and are looked up again."""

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from router.calls.call import Call
from router.calls.calls import Calls
from router.calls.errors import CallFailed, invalid, unavailable, unsupported
from router.calls.identity import ID_CHARACTERS_MAX, fresh_name
from router.calls.noise import without_noise
from router.dialects.responses import Responses
from router.dialects.responses.answers import Response
from router.dialects.responses.kept import Entry, Kept, Key, Limits, Turn, chain, items_of
from router.dialects.responses.requests import REFERENCE, Item
from router.dialects.responses.teller import ResponseTeller
from router.http.access import Caller
from router.http.asgi import Reply
from router.http.config import ApiConfig
from router.http.endpoint import Collected, Endpoint
from router.http.entrance import Edge
from router.http.errors import STATUS
from router.http.pages import json_response, page_after, page_limit
from router.http.traces import salt
from router.http.translate import translate
from router.http.visits import LEFT, Visit
from tracehaul.runtime import clock


class ResponseDeleted(msgspec.Struct, frozen=True):
    """``DELETE /v1/responses/{id}``."""

    id: str
    deleted: Literal[True] = True
    object: Literal["response"] = "response"


class ItemPage(msgspec.Struct, frozen=True):
    """``GET /v1/responses/{id}/input_items``."""

    data: Sequence[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class Kind(msgspec.Struct, frozen=True):
    """What of an item finds it in a list."""

    id: str


class _Running(NamedTuple):
    """What runs in the background."""

    task: asyncio.Task[None]
    begun: Response
    tenant: str
    """Whose it is."""


class ResponsesEndpoint(Endpoint[ResponseTeller]):
    """Answers ``POST /v1/responses``, and keeps what it answers."""

    def __init__(self, calls: Calls, config: ApiConfig, dice: random.Random, edge: Edge) -> None:
        super().__init__(Responses(), calls, config, dice, edge)
        limits = Limits(config.responses_max, config.responses_bytes_max, config.responses_age_s)
        self.kept = Kept(limits)
        self._running: dict[Key, _Running] = {}
        """In the background."""

    async def _serve(
        self, call: Call, teller: ResponseTeller, headers: Mapping[str, str], fresh: str, reply: Reply, visit: Visit
    ) -> None:
        key = (call.tenant, call.id)
        call, before = self.continued(call, teller)
        if teller.begun.background:
            tenant = call.tenant if call.quota is None else call.quota
            self._check_room(tenant, shared=visit.caller.key is not None)
            self.kept.begin(key, teller.begun, teller.asked, before, clock.now_s())
            work = self._work(call, teller, headers, fresh, visit.again())
            task = asyncio.create_task(work, name=f"background-{call.id}")
            self._running[key] = _Running(task, teller.begun, tenant)
            self._edge.gate.went_on(visit.caller)
            task.add_done_callback(lambda _: self._over(key, visit.caller))
            await reply.json(200, msgspec.json.encode(teller.begun))
            return
        reply.broken = teller.broken
        if teller.begun.store:

            def keep(response: Response) -> None:
                self.kept.begin(key, teller.begun, teller.asked, before, clock.now_s())
                self.kept.change(key, response, ended=True)

            teller.keep = keep
        await super()._serve(call, teller, headers, fresh, reply, visit)

    def counted(self, body: bytes, caller: Caller) -> Call:
        """The call whose prompt such a body has. Raises CallFailed as the dialect and :meth:`continued` do."""
        call, teller = self._dialect.read(body, fresh_name(self._dice), 0, self._calls)
        return self.continued(caller.placed(call), teller)[0]

    def continued(self, call: Call, teller: ResponseTeller) -> tuple[Call, Turn | None]:
        """The call with what was said before it, and where that is kept.

        Raises:
            CallFailed: it goes on from a response that is not kept, or has not ended, or it names an item that is not.
        """
        before = self._before(call)
        names = [item.type == REFERENCE for item in teller.asked]
        if any(names):
            teller.asked = tuple(self._item(call.tenant, item, at) for at, item in enumerate(teller.asked))
        if before is not None or any(names):
            items = chain(before)
            call, _ = without_noise(teller.continued(call, items_of(items), sum(map(len, items))))
        return call, before

    def _item(self, tenant: str, item: Item, at: int) -> Item:
        """The item, or the one that it names."""
        if item.type != REFERENCE:
            return item
        found = self.kept.item(tenant, item.id or "")
        if found is None:
            shown = (item.id or "")[:ID_CHARACTERS_MAX]
            raise CallFailed("not_found", f"Item with id {shown!r} not found.", param=f"input[{at}].id")
        return found

    def _before(self, call: Call) -> Turn | None:
        """What the response leads to that the call goes on from."""
        name = call.trace.previous_response_id
        if name is None:
            return None
        entry = self.kept.get((call.tenant, name), clock.now_s())
        param = "previous_response_id"
        if entry is None:
            message = f"Previous response with id {name[:ID_CHARACTERS_MAX]!r} not found."
            raise invalid(message, param, "previous_response_not_found")
        if entry.output is None:
            raise invalid(f"the response {name!r} has not ended", param, "previous_response_not_completed")
        return entry.output

    # --- in the background ----------------------------------------------------------------------------------

    def _check_room(self, tenant: str, *, shared: bool) -> None:
        """For one more. ``shared``: with tenants who have as good a right to it.

        Raises:
            CallFailed: there is none, or the tenant would have more places than it leaves to others.
        """
        free = self._config.background_max - len(self._running)
        if free <= 0:
            raise unavailable("too many responses run in the background", "overloaded")
        own = sum(running.tenant == tenant for running in self._running.values())
        if shared and own >= free:
            message = f"{own} responses of this API key's tenant run in the background, which leaves as many to others"
            raise CallFailed("limited", message, code="rate_limit_exceeded")

    def _over(self, key: Key, caller: Caller) -> None:
        del self._running[key]
        self._edge.gate.ended(caller)

    async def _work(
        self, call: Call, teller: ResponseTeller, headers: Mapping[str, str], fresh: str, visit: Visit
    ) -> None:
        """Run a call that nobody waits for; whatever happens is told in its response."""
        key, gate, caller = (call.tenant, call.id), self._edge.gate, visit.caller
        teller.keep = lambda response: self.kept.change(key, response, ended=True)
        status = LEFT
        try:
            with self._calls.admission.admitted(), self._calls.identified(call, headers, fresh) as identity:
                visit.trace = identity.trace
                async with await self._calls.accept(call, identity) as run:
                    going = msgspec.structs.replace(teller.begun, status="in_progress")
                    self.kept.change(key, going, ended=False)
                    run.outlet = Collected()
                    gate.spent(caller, run.prompt_tokens)
                    try:
                        while not run.done:
                            await run.next()
                    finally:
                        gate.spent(caller, run.output_tokens)
                        self._edge.visits.ran(visit, run)
                    teller.whole(run.choices(), run.usage())
            status = 200
        except Exception as error:
            failure = translate(error)
            status = STATUS[failure.cause]
            self.kept.change(key, teller.failed(failure), ended=True)
        finally:
            self._edge.visits.over(visit, status, None)

    async def cancel(self, key: Key) -> None:
        """End a response that runs in the background; returns when it has."""
        if (running := self._running.get(key)) is not None:
            running.task.cancel()
            await asyncio.wait((running.task,))
            self.kept.change(key, msgspec.structs.replace(running.begun, status="cancelled"), ended=True)

    async def close(self) -> None:
        """End all of them."""
        for key in list(self._running):
            await self.cancel(key)

    @asynccontextmanager
    async def living(self, app: object) -> AsyncGenerator[None, None]:
        """As long as the server runs."""
        yield
        await self.close()


class ResponsePages:
    """What can be asked of a response later. A tenant (its key's, else ``cache_salt``) sees its own only."""

    def __init__(self, responses: ResponsesEndpoint) -> None:
        self._responses = responses

    async def show(self, request: Request) -> HttpResponse:
        """``GET /v1/responses/{id}``."""
        entry = self._entry(request)
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise unsupported("stream", "streaming a response that was kept")
        return _body(entry)

    async def delete(self, request: Request) -> HttpResponse:
        """``DELETE /v1/responses/{id}``: if it still runs, it ends."""
        key = self._entry(request).key
        await self._responses.cancel(key)
        self._responses.kept.drop(key)
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
        rest = page_after(request, items, "item", _id)
        page = rest[:limit]
        ends: tuple[Any, Any] = (_id(page[0]), _id(page[-1])) if page else (None, None)
        return json_response(ItemPage(page, *ends, has_more=len(rest) > limit))

    def _entry(self, request: Request) -> Entry:
        name = str(request.path_params["id"])
        entry = self._responses.kept.get((salt(request), name), clock.now_s())
        if entry is None:
            shown = name[:ID_CHARACTERS_MAX]
            raise CallFailed("not_found", f"Response with id {shown!r} not found.", param="response_id")
        return entry


def _body(entry: Entry) -> HttpResponse:
    return HttpResponse(entry.body, media_type="application/json")


def _id(item: msgspec.Raw) -> str:
    return msgspec.json.decode(item, type=Kind).id

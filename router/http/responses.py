"""``/v1/responses``: responses that go on from others, run in the background, and are looked up again."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec

from router.calls.call import Call
from router.calls.calls import Calls
from router.calls.errors import CallFailed, invalid, unavailable
from router.calls.identity import ID_CHARACTERS_MAX, Identity, fresh_name
from router.calls.noise import without_noise
from router.dialects.responses import Responses
from router.dialects.responses.answers import Response
from router.dialects.responses.kept import Entry, Kept, Key, Limits, Turn, chain, items_of
from router.dialects.responses.requests import REFERENCE, Item
from router.dialects.responses.teller import ResponseTeller
from router.http.access import ANYBODY, Caller
from router.http.config import ApiConfig
from router.http.endpoint import Endpoint
from router.http.entrance import Edge
from router.http.errors import STATUS
from router.http.idempotency import Told
from router.http.outliving import Outliving, Running, Written, begun
from router.http.places import Places
from router.http.response_items import output, raw
from router.http.telling import Replying, Telling
from router.http.translate import translate
from router.http.turns import LATER_S
from router.http.visits import LEFT, Visit
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.tasks import Tasks

log = Log(__name__)

READY_S = 0.25
"""So often it is looked whether anybody serves a response's model."""
RESTORE_S = 5.0
"""Clients wait at a start so long for what an earlier life left."""


class ResponsesEndpoint(Endpoint[ResponseTeller]):
    """Answers ``POST /v1/responses``, and keeps what it answers."""

    def __init__(
        self,
        calls: Calls,
        config: ApiConfig,
        dice: random.Random,
        edge: Edge,
        outliving: Outliving | None = None,
        callers: Callable[[str | None], Caller | None] = lambda key: ANYBODY,
    ) -> None:
        """``outliving``: what runs in the background outlives this router there. ``callers``: whose an API key is, by
        its id; None: nobody's any more."""
        super().__init__(Responses(), calls, config, dice, edge)
        self._outliving = outliving
        self._callers = callers
        limits = Limits(config.responses_max, config.responses_bytes_max, config.responses_age_s)
        self.kept = Kept(limits)
        self._running: dict[Key, Running] = {}
        """In the background."""
        self._places = Places(config.background_max)
        self._tellings: dict[Key, Telling] = {}
        """What is told of those, for whoever streams them."""

    async def _serve(
        self, call: Call, teller: ResponseTeller, headers: Mapping[str, str], fresh: str, reply: Replying, visit: Visit
    ) -> None:
        key = (call.tenant, call.id)
        if call.keyed and teller.begun.background and await self._is_there(key, reply, streams=call.options.stream):
            return
        call, before = self.continued(call, teller)
        if teller.begun.background:
            telling = await self._take_in(call, teller, headers, fresh, visit, before)
            if call.options.stream:
                await telling.follow(reply, [])
            else:
                await reply.json(200, msgspec.json.encode(teller.begun))
            return
        reply.broken = teller.broken
        if teller.begun.store:

            def keep(response: Response) -> None:
                self.kept.begin(key, teller.begun, teller.asked, before, clock.now_s())
                self.kept.change(key, response, ended=True)

            teller.keep = keep
        await super()._serve(call, teller, headers, fresh, reply, visit)

    def tell(self, note: Callable[[str, str, str], None]) -> None:
        """It hears tenant, name and status of each that ran in the background and has ended: somebody may wait."""

        def ended(key: Key, response: Response) -> None:
            if response.background:
                note(*key, response.status)

        self.kept.ended = ended

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

    async def _is_there(self, key: Key, reply: Replying, *, streams: bool) -> bool:
        """Answer with a response that was asked for by this name before, also in an earlier life of the router."""
        running, entry, telling = self._running.get(key), self.kept.get(key, clock.now_s()), self._tellings.get(key)
        if streams:
            if telling is None and entry is not None and isinstance(entry.stream, Told):
                telling = self.telling(entry)
            if telling is not None:
                await telling.follow(reply, [])
            return telling is not None
        body = entry.body if entry else msgspec.json.encode(running.begun) if running else b""
        if body:
            await reply.json(200, body)
        return bool(body)

    async def _take_in(
        self,
        call: Call,
        teller: ResponseTeller,
        headers: Mapping[str, str],
        fresh: str,
        visit: Visit,
        before: Turn | None,
    ) -> Telling:
        """One begins in the background; what is told of it. A client that leaves before it hears of it asked nothing.

        Raises:
            CallFailed: there is no place.
        """
        key, api_key = (call.tenant, call.id), visit.caller.key
        running = [each.tenant for each in self._running.values()]
        tenant = call.tenant if call.quota is None else call.quota
        with self._places.entering(key, tenant, running, shared=api_key is not None):
            self.kept.begin(key, teller.begun, teller.asked, before, clock.now_s())
            written = None
            if self._outliving is not None:
                asked = [(item.id or "", msgspec.json.encode(item)) for item in teller.asked]
                at, whose = teller.begun.created_at, api_key and api_key.id
                written = Written(fresh, at, call.tenant, whose, {}, teller.body, asked, None)
                written = begun(written, headers, None if before is None else chain(before))
                try:
                    await self._outliving.begin(written)
                except asyncio.CancelledError:
                    self.kept.drop(key)
                    raise
            return self._begin(call, teller, headers, fresh, visit.again(), written)

    def _begin(
        self,
        call: Call,
        teller: ResponseTeller,
        headers: Mapping[str, str],
        fresh: str,
        visit: Visit,
        written: Written | None,
    ) -> Telling:
        """In a task of its own; what is told of it."""
        key, tenant = (call.tenant, call.id), call.tenant if call.quota is None else call.quota
        telling = self._tellings[key] = Telling(teller.broken)
        telling.streams()
        task = asyncio.create_task(self._work(call, teller, headers, fresh, visit), name=f"background-{call.id}")
        self._running[key] = Running(task, teller.begun, tenant, written)
        self._edge.gate.went_on(visit.caller)
        task.add_done_callback(lambda _: self._over(key, visit.caller))
        return telling

    def _over(self, key: Key, caller: Caller) -> None:
        del self._running[key]
        self._edge.gate.ended(caller)

    async def _outlive(self, key: Key, written: Written | None) -> None:
        """How it ended, too, unless it was deleted meanwhile, or is another router's by now."""
        entry = self.kept.get(key, clock.now_s())
        if self._outliving is None or written is None or entry is None:
            return
        if await self._outliving.has(written.fresh):
            await self._outliving.put(msgspec.structs.replace(written, told=entry.body))
        else:
            self.kept.drop(key)

    async def _restore(self, outliving: Outliving) -> None:
        """What an earlier life of this router left: what had ended is known again, what had not runs again."""
        self._restore_all(await outliving.all())

    async def _adopt(self, outliving: Outliving) -> None:
        """What routers left that are gone; and what they took, as this one stood still, is let go."""
        async for found in outliving.left():
            if found is None:
                await self._let_go(outliving)
            else:
                self._restore_all(found)

    async def _let_go(self, outliving: Outliving) -> None:
        """What another router runs by now is not run here."""
        for key, running in list(self._running.items()):
            if running.written is None or await outliving.has(running.written.fresh):
                continue
            if (telling := self._tellings.pop(key, None)) is not None:
                telling.over(unavailable("another router goes on with it: ask again", "router_changed"))
            running.task.cancel()
            await asyncio.wait((running.task,))
            self.kept.drop(key)

    def _restore_all(self, found: Sequence[Written]) -> None:
        for written in found:
            try:
                self._restored(written)
            except Exception as error:
                log.warning("a response in the background cannot be gone on with", response=written.fresh, why=error)

    def _restored(self, written: Written) -> None:
        caller = self._callers(written.key)
        call, teller = self._dialect.read(written.body, written.fresh, written.created, self._calls)
        call = call if caller is None else caller.placed(call)
        key = (written.tenant, call.id)
        teller.asked = tuple(msgspec.json.decode(item, type=Item) for _, item in written.asked)
        before = None if written.before is None else Turn(None, raw(written.before))
        if written.told is not None:
            turn = Turn(before, raw(written.asked))
            self.kept.restore(key, written.told, turn, output(written.told), clock.now_s())
            return
        self.kept.begin(key, teller.begun, teller.asked, before, clock.now_s())
        if caller is None:
            gone = CallFailed("unauthorized", "the API key is not valid any more", code="invalid_api_key")
            self.kept.change(key, teller.failed(gone), ended=True)
            return
        items = chain(before)
        call, _ = without_noise(teller.continued(call, items_of(items), sum(map(len, items))))
        visit = Visit(written.fresh, "POST", "/v1/responses")
        visit.caller, visit.model, visit.tenant = caller, call.model, call.tenant
        self._begin(call, teller, written.headers, written.fresh, visit, written)

    async def _work(
        self, call: Call, teller: ResponseTeller, headers: Mapping[str, str], fresh: str, visit: Visit
    ) -> None:
        """Run a call that nobody waits for; whatever happens is told in its response."""
        key = (call.tenant, call.id)
        telling = self._tellings.setdefault(key, Telling(teller.broken))
        call = msgspec.structs.replace(call, keyed=True)  # run anew, it is told in the same events
        teller.keep = lambda response: self.kept.change(key, response, ended=True)
        status = LEFT
        try:
            await self._ready(call.model)
            async with self._edge.turns.later() as step_class:
                await self._calls.fetched(call, headers, fresh)
                with self._calls.admission.admitted(), self._calls.identified(call, headers, fresh) as identity:
                    visit.trace = identity.trace
                    urgency = msgspec.structs.replace(identity.urgency, step_class=step_class)
                    await self._run(call, msgspec.structs.replace(identity, urgency=urgency), teller, telling, visit)
            status = 200
            await self._outlive(key, self._running[key].written)
        except asyncio.CancelledError:
            if key in self._tellings:  # else it goes on elsewhere
                telling.add(teller.cancelled())
            raise
        except Exception as error:
            failure = translate(error)
            status = STATUS[failure.cause]
            self.kept.change(key, teller.failed(failure), ended=True)
            telling.add(teller.broken(failure))
            await self._outlive(key, self._running[key].written)
        finally:
            self._edge.visits.over(visit, status, None)
            self._told(key)

    async def _ready(self, model: str) -> None:
        """Somebody serves the model, or will not: a router that starts does not know all workers yet."""
        until_s = clock.now_s() + LATER_S
        while clock.now_s() < until_s and not self._calls.ready(model):  # noqa: ASYNC110
            await asyncio.sleep(READY_S)

    def _told(self, key: Key) -> None:
        """Nothing is added to what was told of a response; as long as it is kept, so is that."""
        telling = self._tellings.pop(key, None)
        if telling is not None:
            telling.streams()
            telling.over()
            telling.told.pack()
            self.kept.streamed(key, telling.told)

    def telling(self, entry: Entry) -> Telling:
        """What is, or was, told of a response that runs in the background.

        Raises:
            CallFailed: it did not, or nobody knows any more.
        """
        if not entry.background:
            raise invalid("only a response that was made with background=true can be streamed later", "stream")
        if (telling := self._tellings.get(entry.key)) is not None:
            return telling
        if not isinstance(entry.stream, Told):
            message = "the events of this response are not kept any more: ask for it without stream"
            raise invalid(message, "stream", "stream_not_kept")
        return Telling(self._dialect.broken, entry.stream)

    async def _run(
        self, call: Call, identity: Identity, teller: ResponseTeller, telling: Telling, visit: Visit
    ) -> None:
        """To its end."""
        gate, caller = self._edge.gate, visit.caller
        async with await self._calls.accept(call, identity) as run:
            going = msgspec.structs.replace(teller.begun, status="in_progress")
            self.kept.change((call.tenant, call.id), going, ended=False)
            gate.spent(caller, run.prompt_tokens_anew)
            try:
                while not run.done:
                    telling.add(teller.events(await run.next()))
            finally:
                gate.spent(caller, run.output_tokens_anew)
                self._edge.visits.ran(visit, run)
            telling.add(teller.end(run.usage()))

    async def cancel(self, key: Key) -> None:
        """End a response that runs in the background; returns when it has."""
        if (running := self._running.get(key)) is not None:
            running.task.cancel()
            await asyncio.wait((running.task,))
            self._told(key)  # it may not have begun
            self.kept.change(key, msgspec.structs.replace(running.begun, status="cancelled"), ended=True)
            await self._outlive(key, running.written)

    async def forget(self, key: Key) -> None:
        """End it, and know nothing of it any more."""
        entry = self.kept.get(key, clock.now_s())
        background = entry is not None and entry.background
        await self.cancel(key)
        self.kept.drop(key)
        if self._outliving is not None and background:
            await self._outliving.forget(key[1].removeprefix("resp_"))

    async def close(self) -> None:
        """End all of them; those that outlive this router are run by the next."""
        for running in list(self._running.values()):
            running.task.cancel()
            await asyncio.wait((running.task,))
        if self._outliving is not None:
            await self._outliving.close()

    @asynccontextmanager
    async def living(self, app: object) -> AsyncGenerator[None, None]:
        """As long as the server runs."""
        async with Tasks("responses") as tasks:
            if self._outliving is not None:
                restoring = tasks.start(self._restore(self._outliving), "restore")
                await asyncio.wait((restoring,), timeout=RESTORE_S)
                tasks.start(self._adopt(self._outliving), "adopt")
            yield
            await self.close()

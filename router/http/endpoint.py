"""One dialect at one path: from a body to a run, from what happens to an answer."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Generic, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from router.calls.call import Call
from router.calls.calls import Calls
from router.calls.errors import invalid, unavailable
from router.calls.events import Piece
from router.calls.identity import Identity, fresh_name
from router.calls.run import Run
from router.dialects.base import Dialect, Teller
from router.http.access import CALLER, caller_of
from router.http.asgi import CHUNKS, ClientGone, Reply, attended, read_body
from router.http.config import ApiConfig
from router.http.entrance import Edge
from router.http.idempotency import Numbers, fingerprint, key_of, last_event
from router.http.reading import WARNING, read
from router.http.request_ids import request_id
from router.http.telling import Replying, Telling
from router.http.translate import translate
from router.http.visits import LEFT, Visit
from tracehaul.runtime.clock import wall_s

T = TypeVar("T", bound=Teller)


class Endpoint(Generic[T]):
    """An ASGI application. Answers each call, whatever happens."""

    def __init__(self, dialect: Dialect[T], calls: Calls, config: ApiConfig, dice: random.Random, edge: Edge) -> None:
        self._dialect = dialect
        self._calls = calls
        self._config = config
        self._dice = dice
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(Headers(scope=scope))
        chunks = scope.get("extensions", {}).get(CHUNKS)
        reply = Reply(send, self._dialect, self._config.send_timeout_s, self._config.keepalive_s, chunks)
        name = request_id(headers.get("x-request-id"), fresh_name(self._dice))
        reply.headers.append((b"x-request-id", name.encode()))
        reply.headers += self._edge.origins.headers(headers.get("origin"))
        visit = Visit(name, scope["method"], scope["path"])
        status = LEFT
        try:
            try:
                await self._enter(scope, headers, receive, reply, visit)
            except asyncio.CancelledError:
                # Only the server's end cancels this task, and it ends here anyway.
                await reply.fail(unavailable("the server is stopping"))
            except ClientGone:
                return
            except Exception as error:
                await reply.fail(translate(error))
            status = reply.status or LEFT
        except ClientGone:
            pass
        finally:
            self._edge.visits.over(visit, status, reply.first_s)

    async def _enter(
        self, scope: Scope, headers: Mapping[str, str], receive: Receive, reply: Reply, visit: Visit
    ) -> None:
        gate = self._edge.gate
        # Only what the router asks itself says of its scope whose it is.
        visit.inside = CALLER in scope
        caller = visit.caller = caller_of(scope) if visit.inside else gate.enter(headers)
        visit.tenant = "" if caller.key is None else caller.key.tenant
        if "x-decode-worker" in headers:
            caller.steer("X-Decode-Worker", "x-decode-worker")
        reply.standing = partial(gate.standing, caller)
        gate.began(caller)
        try:
            await self._admit(scope, headers, receive, reply, visit)
        finally:
            gate.ended(caller)

    async def _admit(
        self, scope: Scope, headers: Mapping[str, str], receive: Receive, reply: Reply, visit: Visit
    ) -> None:
        config = self._config
        with self._calls.admission.admitted():
            body = await read_body(scope, receive, bytes_max=config.body_bytes_max, timeout_s=config.body_timeout_s)
            await attended(self._answer(headers, body, reply, visit), receive, reply)

    async def _answer(self, headers: Mapping[str, str], body: bytes, reply: Reply, visit: Visit) -> None:
        caller = visit.caller
        if self._edge.visits.content:
            visit.asked = body.decode(errors="replace")
        key, has = key_of(headers.get("idempotency-key")), last_event(headers.get("last-event-id"))
        tenant = "" if caller.key is None else caller.key.tenant
        fresh = fresh_name(self._dice) if key is None else fingerprint(tenant, visit.path, key, body)
        call, teller, warnings = read(self._dialect, body, fresh, int(wall_s()), self._calls)
        reply.headers += [(WARNING, warning.encode()) for warning in warnings]
        call = caller.placed(call)
        visit.model, visit.tenant = call.model, call.tenant if call.quota is None else call.quota
        if has is not None and (key is None or not call.options.stream):
            message = "Last-Event-ID goes on with a stream: send the stream's own body and Idempotency-Key with it"
            raise invalid(message, "Last-Event-ID", "nothing_to_resume")
        if key is None:
            await self._serve(call, teller, headers, fresh, reply, visit)
            return
        named = msgspec.structs.replace(call, keyed=True)

        async def work(telling: Telling, own: Visit) -> None:
            await self._serve(named, teller, headers, fresh, telling, own)

        name = (call.tenant, visit.path, key)
        await self._edge.repeats.answer(name, fresh, reply, visit, has, self._dialect.broken, work)

    async def _serve(
        self, call: Call, teller: T, headers: Mapping[str, str], fresh: str, reply: Replying, visit: Visit
    ) -> None:
        gate, visits, caller = self._edge.gate, self._edge.visits, visit.caller
        await self._calls.fetched(call, headers, fresh)
        with self._calls.identified(call, headers, fresh) as identity:
            visit.trace = identity.trace
            reply.headers.append((b"x-trace-id", identity.trace.encode()))
            async with (
                nullcontext() if visit.inside else self._edge.turns.turn(identity.urgency),
                await self._accepted(call, headers, fresh, identity, waited=not visit.inside) as run,
            ):
                gate.spent(caller, run.prompt_tokens_anew)
                try:
                    if not call.options.stream:
                        await self._collect(call, run, teller, reply)
                    elif call.keyed:
                        await self._stream_numbered(call, run, teller, reply)
                    else:
                        await self._stream(call, run, teller, reply)
                finally:
                    gate.spent(caller, run.output_tokens_anew)
                    visits.ran(visit, run)

    async def _accepted(
        self, call: Call, headers: Mapping[str, str], fresh: str, identity: Identity, *, waited: bool
    ) -> Run:
        if waited and identity.urgency.step_class == "background":
            await self._calls.fetched(call, headers, fresh)  # another router may have its trace by now
        return await self._calls.accept(call, identity)

    async def _before_end(self, call: Call, run: Run, teller: T, reply: Replying) -> None:
        """All that is to be told has happened, and its end was not told yet."""

    async def _collect(self, call: Call, run: Run, teller: T, reply: Replying) -> None:
        run.outlet = Collected()
        while not run.done:
            await run.next()
        await self._before_end(call, run, teller, reply)
        await reply.json(200, teller.whole(run.choices(), run.usage()))

    async def _stream(self, call: Call, run: Run, teller: T, reply: Replying) -> None:
        reply.streams()
        run.outlet = _Straight(teller, reply)
        data = b""
        while not run.done:
            if data:
                await reply.events(data)
            data = teller.events(await run.next())
        await self._before_end(call, run, teller, reply)
        await reply.events(data + teller.end(run.usage()), last=True)

    async def _stream_numbered(self, call: Call, run: Run, teller: T, reply: Replying) -> None:
        """Each event with its id. Tokens come one by one, so that it is the same events again whenever it is told."""
        reply.streams()
        numbers = Numbers(len(call.prompts) * call.options.n)
        while not run.done:
            events = await run.next()
            await reply.events(b"".join(numbers.numbered(event.choice, teller.events((event,))) for event in events))
        await self._before_end(call, run, teller, reply)
        await reply.events(numbers.numbered(0, teller.end(run.usage())), last=True)


class Collected:
    """Implements :class:`router.calls.run.Outlet` where the answer is told as a whole."""

    ready = True

    def take(self, piece: Piece) -> None:
        pass


class _Straight:
    """Implements :class:`router.calls.run.Outlet` where it is streamed."""

    def __init__(self, teller: Teller, reply: Replying) -> None:
        self._teller = teller
        self._reply = reply

    @property
    def ready(self) -> bool:
        return self._reply.writable

    def take(self, piece: Piece) -> None:
        data = self._teller.events((piece,))
        if data:
            self._reply.write(data)

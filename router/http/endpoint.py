"""One dialect at one path: from a body to a run, from what happens to an answer."""

import asyncio
import random
from collections.abc import Mapping
from functools import partial
from typing import Generic, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from router.calls.call import Call
from router.calls.calls import Calls
from router.calls.errors import unavailable
from router.calls.events import Piece
from router.calls.identity import fresh_name
from router.calls.run import Run
from router.dialects.base import Dialect, Teller
from router.http.access import CALLER, caller_of
from router.http.asgi import CHUNKS, ClientGone, Reply, disconnected, read_body
from router.http.config import ApiConfig
from router.http.entrance import Edge
from router.http.reading import WARNING, read
from router.http.request_ids import request_id
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
        caller = visit.caller = caller_of(scope) if CALLER in scope else gate.enter(headers)
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
            work = asyncio.create_task(self._answer(headers, body, reply, visit))
            watch = asyncio.create_task(disconnected(receive))
            try:
                await self._attend(work, watch, reply)
                if not work.done():
                    raise ClientGone
                work.result()
            finally:
                work.cancel()
                watch.cancel()
                await asyncio.gather(work, watch, return_exceptions=True)
                del work  # its exception leads back to this frame, and would keep the body alive

    async def _attend(self, work: asyncio.Task[None], watch: asyncio.Task[None], reply: Reply) -> None:
        """Until one of the two has ended; meanwhile the answer is looked after."""
        done: set[asyncio.Task[None]] = set()
        while not done:
            pause_s = await reply.look()
            done, _ = await asyncio.wait((work, watch), timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)

    async def _answer(self, headers: Mapping[str, str], body: bytes, reply: Reply, visit: Visit) -> None:
        caller = visit.caller
        if self._edge.visits.content:
            visit.asked = body.decode(errors="replace")
        fresh = fresh_name(self._dice)
        call, teller, warnings = read(self._dialect, body, fresh, int(wall_s()), self._calls)
        reply.headers += [(WARNING, warning.encode()) for warning in warnings]
        call = caller.placed(call)
        visit.model, visit.tenant = call.model, call.tenant if call.quota is None else call.quota
        await self._serve(call, teller, headers, fresh, reply, visit)

    async def _serve(
        self, call: Call, teller: T, headers: Mapping[str, str], fresh: str, reply: Reply, visit: Visit
    ) -> None:
        gate, visits, caller = self._edge.gate, self._edge.visits, visit.caller
        with self._calls.identified(call, headers, fresh) as identity:
            visit.trace = identity.trace
            reply.headers.append((b"x-trace-id", identity.trace.encode()))
            async with await self._calls.accept(call, identity) as run:
                gate.spent(caller, run.prompt_tokens)
                try:
                    await (
                        self._stream(run, teller, reply) if call.options.stream else self._collect(run, teller, reply)
                    )
                finally:
                    gate.spent(caller, run.output_tokens)
                    visits.ran(visit, run)

    async def _collect(self, run: Run, teller: Teller, reply: Reply) -> None:
        run.outlet = Collected()
        while not run.done:
            await run.next()
        await reply.json(200, teller.whole(run.choices(), run.usage()))

    async def _stream(self, run: Run, teller: Teller, reply: Reply) -> None:
        reply.streams()
        run.outlet = _Straight(teller, reply)
        data = b""
        while not run.done:
            if data:
                await reply.events(data)
            data = teller.events(await run.next())
        await reply.events(data + teller.end(run.usage()), last=True)


class Collected:
    """Implements :class:`router.calls.run.Outlet` where the answer is told as a whole."""

    ready = True

    def take(self, piece: Piece) -> None:
        pass


class _Straight:
    """Implements :class:`router.calls.run.Outlet` where it is streamed."""

    def __init__(self, teller: Teller, reply: Reply) -> None:
        self._teller = teller
        self._reply = reply

    @property
    def ready(self) -> bool:
        return self._reply.writable

    def take(self, piece: Piece) -> None:
        data = self._teller.events((piece,))
        if data:
            self._reply.write(data)

"""The edge to the server: bodies in, answers out, and clients that leave."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from router.calls.errors import CallFailed
from router.dialects.base import Dialect, Teller
from router.http.errors import STATUS, headers_of
from router.http.inflate import Inflation, inflation
from tracehaul.runtime import clock

Headers = list[tuple[bytes, bytes]]

LOOK_S_MIN = 0.001
"""A clock may not tell a shorter time from none."""


class ClientGone(Exception):
    """Nobody is there to answer."""


async def read_body(scope: Scope, receive: Receive, *, bytes_max: int, timeout_s: float) -> bytes:
    """The request's body, unpacked if its ``Content-Encoding`` says that it is packed.

    Raises:
        CallFailed: it is too long, packed or unpacked; it takes too long; or it cannot be unpacked.
        ClientGone: the client left.
    """
    too_long = CallFailed("too_large", f"the body is longer than {bytes_max} bytes", code="body_too_large")
    announced = header(scope, b"content-length")
    if announced.isdigit() and int(announced[:20]) > bytes_max:
        raise too_long
    packed = inflation(header(scope, b"content-encoding").decode("latin-1"))
    parts: list[bytes] = []
    arrived = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                data = message.get("body", b"")
                arrived += len(data)
                if arrived > bytes_max:
                    raise too_long
                if packed is None:
                    parts.append(data)
                elif not await _unpack(packed, data, parts, bytes_max):
                    raise too_long
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise CallFailed("too_slow", f"the body did not arrive within {timeout_s} s", code="timeout") from None
    if packed is not None:
        packed.end()
    return b"".join(parts)


async def _unpack(packed: Inflation, data: bytes, parts: list[bytes], bytes_max: int) -> bool:
    """Add what ``data`` holds to the parts, in turns with everything else on this loop. False: it is too much."""
    for part in packed.feed(data):
        if packed.size > bytes_max:
            return False
        parts.append(part)
        await asyncio.sleep(0)
    return True


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of that name, in lower case; empty if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


async def body_of(request: Request, *, bytes_max: int, timeout_s: float) -> bytes:
    """The same, of a page.

    Raises:
        CallFailed: likewise, or the client left.
    """
    try:
        return await read_body(request.scope, request.receive, bytes_max=bytes_max, timeout_s=timeout_s)
    except ClientGone:
        raise CallFailed("invalid", "the client left", code="client_gone") from None


async def disconnected(receive: Receive) -> None:
    """Returns when the client leaves. Only after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Chunks(Protocol):
    """What a server may offer in a call's scope, as the extension :data:`CHUNKS`: to send a part of a body that has
    begun without waiting."""

    @property
    def writable(self) -> bool:
        """It can be sent now, and would not wait."""
        ...

    def write(self, data: bytes) -> None:
        """Send it; only while writable."""
        ...


CHUNKS = "tracehaul.chunks"


class Reply:
    """One call's answer: a JSON body, or a stream that starts with its first event. ``dialect``: says how it fails.
    ``chunks``: where the server has them.

    One task answers. Another looks after it, for what would cost too much to watch over with each event.
    """

    def __init__(
        self, send: Send, dialect: Dialect[Teller], timeout_s: float, silence_s: float, chunks: Chunks | None = None
    ) -> None:
        self._send = send
        self._chunks = chunks
        self._dialect = dialect
        self.broken: Callable[[CallFailed], bytes] = dialect.broken
        """How a stream that has begun ends with an error."""
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._clock = asyncio.get_running_loop().time
        self._since_s = self._clock()
        """When something was sent last, or began to be."""
        self._sending = False
        self._streams = False
        self._keeping: asyncio.Event | None = None
        """Set once a sign of life was sent, where one is."""
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """There is something to look after; until then nobody need look."""
        self._started = False
        self._ended = False
        self.headers: Headers = []
        self.standing: Callable[[], Headers] | None = None
        """More headers, as they are when the answer begins."""
        self.status: int | None = None
        """Of the answer that has begun."""
        self.first_s: float | None = None
        """When it began."""

    async def json(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Answer at once."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [(b"content-type", b"application/json"), length, *(headers or [])])
        await self._say({"type": "http.response.body", "body": body}, last=True)

    def streams(self) -> None:
        """It will be a stream: from now on silence counts."""
        self._streams, self._since_s = True, self._clock()
        self._begin()

    async def events(self, data: bytes, *, last: bool = False) -> None:
        """Send these events now; the first ones start the stream."""
        if self._keeping is not None:
            await self._keeping.wait()
        await self._tell(data, last=last)

    @property
    def writable(self) -> bool:
        """The stream has begun, and :meth:`write` can be called."""
        chunks = self._chunks
        return chunks is not None and not self._sending and self._keeping is None and chunks.writable

    def write(self, data: bytes) -> None:
        """As :meth:`events`, without waiting."""
        assert self._chunks is not None
        self._since_s = self._clock()
        self._chunks.write(data)

    async def look(self) -> float:
        """Look after it: keep a silent stream alive. Returns in how many seconds to look again.

        Raises:
            ClientGone: what was sent is not taken.
        """
        pause_s = min(self._timeout_s, self._silence_s)
        quiet_s = self._clock() - self._since_s
        if self._sending:
            if quiet_s >= self._timeout_s:
                raise ClientGone
            return max(LOOK_S_MIN, min(pause_s, self._timeout_s - quiet_s))
        if not self._streams or self._ended:
            return pause_s
        if quiet_s < self._silence_s:
            return max(LOOK_S_MIN, min(pause_s, self._silence_s - quiet_s))
        self._keeping = asyncio.Event()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._tell(self._dialect.keepalive, last=False)
        except TimeoutError:
            raise ClientGone from None
        finally:
            self._keeping.set()
            self._keeping = None
        return pause_s

    async def fail(self, failure: CallFailed) -> None:
        """End with an error: a status if nothing was sent yet, else as the dialect ends a broken stream."""
        if self._ended:
            return
        failure.request = next((value.decode() for name, value in self.headers if name == b"x-request-id"), None)
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._started:
                    await self.events(self.broken(failure), last=True)
                    return
                headers = [(name.encode(), value.encode()) for name, value in headers_of(failure).items()]
                await self.json(STATUS[failure.cause], self._dialect.failed(failure), headers)
        except TimeoutError:
            raise ClientGone from None

    def _begin(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)

    async def _tell(self, data: bytes, *, last: bool) -> None:
        if not self._started:
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            # The last one asks proxies not to collect events.
            await self._start(200, [kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])
        await self._say({"type": "http.response.body", "body": data, "more_body": not last}, last=last)

    async def _start(self, status: int, headers: Headers) -> None:
        self._started = True
        self.status, self.first_s = status, clock.now_s()
        more = self.standing() if self.standing is not None else []
        await self._say({"type": "http.response.start", "status": status, "headers": headers + self.headers + more})

    async def _say(self, message: dict[str, object], *, last: bool = False) -> None:
        self._ended = last
        self._sending, self._since_s = True, self._clock()
        self._begin()
        try:
            await self._send(message)
        except OSError as error:
            self._ended = True
            raise ClientGone from error
        self._sending = False


async def attended(work: Coroutine[Any, Any, None], receive: Receive, reply: Reply) -> None:
    """Answer, as long as the client is there and takes what is sent.

    Raises:
        ClientGone: it is not, or does not.
        Exception: what ``work`` raises.
    """
    answering = asyncio.create_task(work)
    watch = asyncio.create_task(disconnected(receive))
    try:
        await _attend(answering, watch, reply)
        if not answering.done():
            raise ClientGone
        answering.result()
    finally:
        answering.cancel()
        watch.cancel()
        await asyncio.gather(answering, watch, return_exceptions=True)
        del answering  # its exception leads back to this frame, and would keep the body alive


async def _attend(answering: asyncio.Task[None], watch: asyncio.Task[None], reply: Reply) -> None:
    """Until one of the two has ended; meanwhile the answer is looked after. While a call waits there is none: nothing
    of it runs."""
    await asyncio.wait((answering, watch, reply.begun), return_when=asyncio.FIRST_COMPLETED)
    while not (answering.done() or watch.done()):
        pause_s = await reply.look()
        await asyncio.wait((answering, watch), timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)

"""An answer that is kept while it is told, for whoever reads it: now, from some event on, or once more."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.calls.errors import CallFailed
from router.dialects.base import Dialect, Teller
from router.http.asgi import ClientGone, Headers, Reply, attended
from router.http.config import ApiConfig
from router.http.idempotency import Told

REQUEST = b"x-request-id"
"""A header that is each reader's own."""


class Cut(Protocol):
    """What of a stream, read from its beginning, a reader wants."""

    def of(self, data: bytes) -> bytes:
        """Of the next events. Raises CallFailed."""
        ...

    def over(self) -> None:
        """There are no more. Raises CallFailed."""
        ...


class Replying(Protocol):
    """Takes a call's answer: :class:`router.http.asgi.Reply`, or what keeps it."""

    headers: Headers
    broken: Callable[[CallFailed], bytes]

    async def json(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Answer at once."""
        ...

    def streams(self) -> None:
        """It will be a stream."""
        ...

    async def events(self, data: bytes, *, last: bool = False) -> None:
        """Send these events now."""
        ...

    @property
    def writable(self) -> bool:
        """:meth:`write` can be called."""
        ...

    def write(self, data: bytes) -> None:
        """As :meth:`events`, without waiting."""
        ...


class Telling:
    """Implements :class:`Replying`: what is told is there to be read. ``told``: what was told before, all of it."""

    writable = False

    def __init__(self, broken: Callable[[CallFailed], bytes], told: Told | None = None) -> None:
        self.headers: Headers = []
        self.broken = broken
        self.told = told or Told()
        self.ended = told is not None
        """Nothing follows."""
        self.failure: CallFailed | None = None
        """With which it ended; readers are told so."""
        self._streams = told is not None
        self._status: int | None = None
        """Of an answer that is no stream."""
        self._readers: set[asyncio.Future[None]] = set()
        """Who waits for more."""

    # --- telling ------------------------------------------------------------------------------------------------

    async def json(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        self._status = status
        self.headers += headers or []
        self.told.append(body)

    def streams(self) -> None:
        self._streams = True
        self._wake()

    async def events(self, data: bytes, *, last: bool = False) -> None:
        self.add(data)

    def add(self, data: bytes) -> None:
        """The same at once."""
        if data:
            self.told.append(data)
            self._wake()

    def write(self, data: bytes) -> None:
        raise AssertionError("it is never writable")

    def over(self, failure: CallFailed | None = None) -> None:
        """Nothing follows."""
        if not self.ended:
            self.ended, self.failure = True, failure
            self._wake()

    # --- reading ------------------------------------------------------------------------------------------------

    async def follow(self, reply: Replying, more: Headers, cut: Cut | None = None) -> None:
        """Answer with it, as far as ``cut`` leaves it and as it comes. ``more``: further headers.

        Raises:
            CallFailed: what it ended with.
        """
        while not (self._streams or self.ended):
            await self._grown()
        reply.headers += [header for header in self.headers if header[0] != REQUEST]
        reply.headers += more
        reply.broken = self.broken
        if self._status is not None:
            await reply.json(self._status, self.told.read(0))
            return
        if self._streams:
            reply.streams()
        at = 0
        while True:
            data = self.told.read(at)
            at += len(data)
            last = self.ended and self.failure is None and at == self.told.size
            wanted = data if cut is None else cut.of(data)
            if last and cut is not None:
                cut.over()
            if wanted or last:
                await reply.events(wanted, last=last)
            if last:
                return
            if not data:
                if self.failure is not None:
                    raise self.failure
                await self._grown()

    async def _grown(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._readers.add(waiter)
        try:
            await waiter
        finally:
            self._readers.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._readers:
            if not waiter.done():
                waiter.set_result(None)


class Followed(Response):
    """A page that tells it, as a stream of a dialect."""

    def __init__(self, telling: Telling, cut: Cut, dialect: Dialect[Teller], config: ApiConfig) -> None:
        super().__init__()
        self._telling = telling
        self._cut = cut
        self._dialect = dialect
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, self._dialect, self._config.send_timeout_s, self._config.keepalive_s)
        with suppress(ClientGone):
            try:
                await attended(self._telling.follow(reply, [], self._cut), receive, reply)
            except CallFailed as failure:
                await reply.fail(failure)

"""HTTP between simulated clients and the router, without sockets: the router's application is called as a server would.

A request runs inside the router's process; its answer crosses to the client's at once.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.types import Message

from sim.answers import Answer, CallFailed
from sim.nodes import Life

JSON = {"content-type": "application/json"}


class Exchange:
    """One request, on a connection of its own."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._arrived: asyncio.Queue[Message | CallFailed] = asyncio.Queue()
        self._answered = self._cut = False

    # --- the router's side ----------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """ASGI's: the body in one piece, then the client's leaving, which a frozen router hears of late."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI's."""
        assert not self._answered, f"{message} after the answer"
        self._answered = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not (self._gone.is_set() or self._cut):
            self._arrived.put_nowait(message)

    def cut(self, why: str) -> None:
        """No more comes, unless all of it has."""
        if not (self._answered or self._cut):
            self._cut = True
            self._arrived.put_nowait(CallFailed("peer_lost", why, retriable=True))

    # --- the client's side ----------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Something has arrived that was not taken."""
        return not self._arrived.empty()

    async def start(self) -> Answer:
        """The answer's beginning.

        Raises:
            CallFailed: the connection is lost.
        """
        message = await self._take()
        assert message["type"] == "http.response.start", message
        headers = {name.decode(): value.decode() for name, value in message["headers"]}
        return Answer(message["status"], headers)

    async def more(self) -> tuple[bytes, bool]:
        """The next piece of the body, and whether it is the last.

        Raises:
            CallFailed: the connection is lost.
        """
        message = await self._take()
        assert message["type"] == "http.response.body", message
        return message.get("body", b""), not message.get("more_body", False)

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()

    async def _take(self) -> Message:
        message = await self._arrived.get()
        if isinstance(message, CallFailed):
            raise message
        return message


class Gateway:
    """Where clients find a router: the first that listens."""

    def __init__(self) -> None:
        self.routers: dict[str, Life] = {}
        self._open: dict[asyncio.Task[Any], tuple[Exchange, Life]] = {}

    @property
    def process(self) -> str:
        """Of that router as it is now.

        Raises:
            CallFailed: nobody listens.
        """
        return self._listening().process

    def _listening(self) -> Life:
        for node in sorted(self.routers):
            if self.routers[node].alive and self.routers[node].app is not None:
                return self.routers[node]
        raise CallFailed("peer_lost", "connection refused", retriable=True)

    def post(self, path: str, headers: Mapping[str, str], body: bytes) -> Exchange:
        """Make a request, until its exchange is left.

        Raises:
            CallFailed: nobody listens.
        """
        exchange, life = Exchange(body), self._listening()
        assert life.app is not None
        sent = {**JSON, "content-length": str(len(body)), **headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
            "client": ("client", 1),
            "server": ("router", 80),
        }
        serving = life.app(scope, exchange.receive, exchange.send)
        task = life.context().run(asyncio.ensure_future, serving)
        self._open[task] = exchange, life
        task.add_done_callback(self._served)
        return exchange

    def lost(self, life: Life) -> None:
        """A router's process is gone, and all connections to it."""
        for task, (exchange, served_by) in list(self._open.items()):
            if served_by is life:
                exchange.cut("connection reset")
                del self._open[task]

    def _served(self, task: asyncio.Task[Any]) -> None:
        served = self._open.pop(task, None)
        if served is not None:
            served[0].cut("connection closed")

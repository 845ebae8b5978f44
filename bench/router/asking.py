"""A program: ``tracehaul``, whose router also asks itself.

``POST /bench/calls``, a JSON object with ``calls`` and a ``body``, sends so many of it to the router's own chat
completions, as a server would but with no sockets, and answers when all of them were read. ``GET`` tells how many are
open and how many were answered, by their status. Their clients do not leave.
"""

import asyncio
from collections import Counter
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.cli import main
from router.http import server
from router.http.asgi import read_body

PATH = "/bench/calls"
BODY_BYTES_MAX = 1 << 20
BODY_TIMEOUT_S = 10.0
TOGETHER = 20
"""Calls begin in such parties, so that the nodes are heard meanwhile."""


class Asked(msgspec.Struct):
    """What is to be asked."""

    calls: int
    body: msgspec.Raw


class Asking:
    """The router's application and, at :data:`PATH`, what asks it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open: set[asyncio.Task[None]] = set()
        self._told: Counter[int] = Counter()
        self._unread = 0
        self._read = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != PATH:
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST":
            body = await read_body(scope, receive, bytes_max=BODY_BYTES_MAX, timeout_s=BODY_TIMEOUT_S)
            await self._begin(msgspec.json.decode(body, type=Asked))
        said = {"open": len(self._open), "answered": {str(status): count for status, count in self._told.items()}}
        told = msgspec.json.encode(said)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(told))]})
        await send({"type": "http.response.body", "body": told})

    async def _begin(self, asked: Asked) -> None:
        self._unread += asked.calls
        self._read.clear()
        for at in range(asked.calls):
            task = asyncio.create_task(self._call(bytes(asked.body)))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
            if at % TOGETHER == 0:
                await asyncio.sleep(0)
        await self._read.wait()

    async def _call(self, body: bytes) -> None:
        unread = [body]

        async def receive() -> dict[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            self._unread -= 1
            if not self._unread:
                self._read.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._told[message["status"]] += 1

        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        path = "/v1/chat/completions"
        await self._app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)


if __name__ == "__main__":
    serve = server.serve

    async def serve_asking(app: ASGIApp, host: str, port: int, **more: Any) -> server.ApiServer:
        """In the place of :func:`router.http.server.serve`."""
        return await serve(Asking(app), host, port, **more)

    server.serve = serve_asking
    main()

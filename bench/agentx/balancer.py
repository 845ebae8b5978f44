"""A reverse proxy that sends each call where a rule says: what stands before the fleet in every arrangement."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from bench.agentx.routing import Routing
from router.http.server import serve

SESSION = b"x-correlation-id"
"""How the harness names the session of a call."""
TIMEOUT_S = 300.0
"""Longest silence of a worker."""
HOP = frozenset((b"host", b"connection", b"content-length", b"transfer-encoding", b"keep-alive"))

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Balancer:
    """An ASGI application before ``urls``."""

    def __init__(self, urls: Sequence[str], routing: Routing) -> None:
        self._urls = urls
        self._routing = routing
        self._running = [0] * len(urls)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        body = await _body(receive)
        session = dict(scope["headers"]).get(SESSION)
        worker = self._routing.choose(session, prompt_of(body), self._running) if scope["method"] == "POST" else 0
        self._running[worker] += 1
        passing = asyncio.ensure_future(self._pass(scope, body, self._urls[worker], send))
        leaving = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                await passing
        finally:
            passing.cancel()
            leaving.cancel()
            await asyncio.wait((passing, leaving))
            self._running[worker] -= 1

    async def _pass(self, scope: Message, body: bytes, url: str, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP]
        target = url + scope["path"] + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
        begun = False
        try:
            async with self._http.stream(scope["method"], target, headers=headers, content=body) as answer:
                told = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in HOP]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": told})
                begun = True
                async for piece in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except httpx.HTTPError as error:
            if begun:
                raise
            await send({"type": "http.response.start", "status": 502, "headers": []})
            await send({"type": "http.response.body", "body": f"{type(error).__name__} {error}".encode()})

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()


def prompt_of(body: bytes) -> bytes:
    """What the model is to read of a chat completion's body: tools, then messages."""
    try:
        said = json.loads(body)
        return json.dumps([said.get("tools"), *said.get("messages", [])]).encode()
    except (ValueError, AttributeError, TypeError):
        return body


async def _body(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    return b"".join(pieces)


@asynccontextmanager
async def balanced(urls: Sequence[str], routing: Routing) -> AsyncGenerator[str]:
    """Its address, while the context lasts.

    Raises:
        OSError: it does not come up.
    """
    balancer = Balancer(urls, routing)
    server = await serve(balancer, "127.0.0.1", 0, grace_s=1)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.close()
        await balancer.aclose()

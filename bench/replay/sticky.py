"""Several servers as one, without a router: each session stays with the one that its first step was sent to."""

from collections import Counter
from collections.abc import Sequence

import httpx

SESSION_HEADER = "X-Session-Id"


class Sticky(httpx.AsyncBaseTransport):
    """Sends what names a session to its server, a new one to the server with the fewest, and the rest in turn."""

    def __init__(self, urls: Sequence[str], beneath: httpx.AsyncBaseTransport | None = None) -> None:
        assert urls
        self._urls = [httpx.URL(url) for url in urls]
        self._sessions: dict[str, int] = {}
        self._turn = 0
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._beneath = beneath or httpx.AsyncHTTPTransport(limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = self._urls[self._server_of(request.headers.get(SESSION_HEADER))]
        request.url = request.url.copy_with(scheme=url.scheme, host=url.host, port=url.port)
        request.headers["Host"] = url.netloc.decode()
        return await self._beneath.handle_async_request(request)

    def _server_of(self, session: str | None) -> int:
        if session is None:
            self._turn += 1
            return self._turn % len(self._urls)
        if session not in self._sessions:
            there = Counter(self._sessions.values())
            self._sessions[session] = min(range(len(self._urls)), key=lambda server: there[server])
        return self._sessions[session]

    async def aclose(self) -> None:
        await self._beneath.aclose()

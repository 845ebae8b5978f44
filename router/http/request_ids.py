"""The id of a request: the client's own, or a fresh one."""

import random
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.calls.identity import ID_CHARACTERS_MAX, fresh_name

_REQUEST_ID = re.compile(rf"[!-~]{{1,{ID_CHARACTERS_MAX}}}", re.ASCII)

REQUEST_ID = "tracehaul.request_id"
"""Where a page's scope has it."""


class RequestIds:
    """Gives every answer an ``X-Request-Id``: the client's own, or a fresh one."""

    def __init__(self, app: ASGIApp, dice: random.Random) -> None:
        self._app = app
        self._dice = dice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = scope[REQUEST_ID] = request_id(Headers(scope=scope).get("x-request-id"), fresh_name(self._dice))

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        await self._app(scope, receive, tell)


def request_id(sent: str | None, fresh: str) -> str:
    """The client's own request id if it can be echoed, else ``fresh``."""
    return sent if sent and _REQUEST_ID.fullmatch(sent) else fresh

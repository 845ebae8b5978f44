"""The id of a request: the client's own, or a fresh one."""

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.calls.identity import ID_CHARACTERS_MAX

_REQUEST_ID = re.compile(rf"[!-~]{{1,{ID_CHARACTERS_MAX}}}", re.ASCII)


class RequestIds:
    """Gives every answer an ``X-Request-Id``: the client's own, or a fresh one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id(Headers(scope=scope).get("x-request-id"), secrets.token_hex(16))

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        await self._app(scope, receive, tell)


def request_id(sent: str | None, fresh: str) -> str:
    """The client's own request id if it can be echoed, else ``fresh``."""
    return sent if sent and _REQUEST_ID.fullmatch(sent) else fresh

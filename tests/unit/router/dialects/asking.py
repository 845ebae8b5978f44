"""Asks a whole application over a scripted cluster, and reads what streams tell."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from router.calls.fakes import FakeDispatcher, FakeText
from router.http.app import create_app
from router.http.chats import Chats
from router.http.config import ApiConfig
from router.http.keys import Key, Keyring, hashed
from router.http.outliving import Outliving
from sim.lifespan import living
from tracehaul.runtime.offload import InlineOffload


class NotedText(FakeText):
    """Thinks, if it is told to, and keeps what its template was given."""

    def __init__(self, *, thinks: bool = False) -> None:
        super().__init__()
        self.chat_template = "<think></think>" if thinks else None
        self.rendered: list[Sequence[dict[str, Any]]] = []
        self.variables: list[Any] = []

    def render(self, messages: Sequence[dict[str, Any]], *rest: Any, **named: Any) -> str:
        self.rendered.append(messages)
        self.variables.append(rest[2] if len(rest) > 2 else named.get("variables"))
        return super().render(messages, *rest, **named)


def key_of(tenant: str, at: int, **fields: Any) -> tuple[str, Key]:
    """A key as it is sent, and as it is kept."""
    sent = f"th-{at:08x}-" + "s" * 43
    return sent, Key(f"{at:08x}", hashed(sent), tenant, **fields)


def served(
    dispatcher: FakeDispatcher,
    use: Callable[[httpx.AsyncClient], Awaitable[None]],
    *,
    text: FakeText | None = None,
    config: ApiConfig | None = None,
    keyring: Keyring | None = None,
    chats: Chats | None = None,
    outliving: Outliving | None = None,
) -> None:
    """Run ``use`` with a client of it."""

    async def main() -> None:
        texts = {"org/fake": text or FakeText()}
        more: dict[str, Any] = {"keyring": keyring, "chats": chats, "outliving": outliving}
        app = create_app(dispatcher, texts, lambda: b"", config or ApiConfig(), InlineOffload(), **more)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client_of = httpx.AsyncClient(transport=transport, base_url="http://test")
        async with asyncio.timeout(20), living(app), client_of as client:
            await use(client)

    asyncio.run(main())


def post(
    dispatcher: FakeDispatcher,
    path: str,
    *bodies: Any,
    text: FakeText | None = None,
    config: ApiConfig | None = None,
    headers: dict[str, str] | None = None,
) -> list[httpx.Response]:
    """The answers to these bodies, one after the other."""
    answers: list[httpx.Response] = []

    async def use(client: httpx.AsyncClient) -> None:
        for body in bodies:
            answers.append(await client.post(path, json=body, headers=headers))

    served(dispatcher, use, text=text, config=config)
    return answers


def told(stream: str) -> list[dict[str, Any]]:
    """The events of a stream; each says its type twice."""
    events: list[dict[str, Any]] = []
    for block in stream.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
